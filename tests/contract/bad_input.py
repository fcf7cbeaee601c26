"""Bad input: every argument of every public function, replaced by what it should not be.

Each case works, or raises a ValueError or TypeError that says where, what was expected, what came, and what to try; and
it leaves everything as it was. `python tests/contract/bad_input.py` prints the counts.
"""

from __future__ import annotations

import gc
import inspect
import os
import random
import re
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from bad_input_calls import CALLS
from bad_input_rows import Change, Mine
from bad_input_values import VALUES
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

KINDS = {
    "count": """num_particles num_samples num_epochs batch_size num_draws num_simulations num_temperatures num_leapfrog
        patience chunk_size cache_size rank num_components num_categories period out_features in_features kernel_size
        stride num size total n_components num_steps""",
    "count_or_zero": "num_simulated context_size",
    "seed": "seed",
    "plate": "plate",
    "flag": "progress smooth resample mean doubly_reparameterized",
    "auto": "parallel compile adaptive",
    "choice": "method correction start schedule backend family norm kinds site",
    "share": "defensive level dropout probability",
    "positive": "smallest",
    "number": "value",
    "rows": "args",
    "pair": "model",
    "function": "guide",
    "shape": "event_shape in_shape shape",
    "sizes": "hidden_sizes channels",
    "mapping": "exact_draw draws",
    "labels": "coords dims stack",
    "elbo": "loss elbo",
    "optimizer": "optimizer",
    "scheduler": "scheduler",
    "device": "device",
    "path": "checkpoint path",
    "name": "name prefix",
    "layers": "layers",
    "fixed": "concentration total_count scale df",
    "features": "features",
    "names": "given",
    "end": "low high",
    "numbers": "limits",
    "predictions": "predictions",
    "contexts": "context",
    "maker": "activation estimator inputs",
    "pseudo_inputs": "pseudo_inputs",
    "skip": """kwargs options parameter_shapes outside event_dims label
        quantity ax row_labels column_labels cmap class_names dimensions y role""",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}
PARTS_OF_PAIRS = {"VAE.model", "VAE.guide", "VAE.sample_model", "VAE.sample_guide", "VAE.posterior_given"}
PARTS_OF_PAIRS |= {"VAE.likelihood_given"}  # they draw, and declare parameters, as they go
REFUSE, WORK = 1.0, 5.0  # seconds: a refusal has no right to more, work takes as long as it takes


class Case(NamedTuple):
    function: str
    parameter: str
    value: str
    make: Any
    verdict: str

    def __str__(self) -> str:
        return f"{self.function}-{self.parameter}-{self.value}"


def kind_of(function: str, parameter: str) -> str:
    return CALLS[function].kinds.get(parameter) or KIND_OF.get(parameter, "unknown")


def cases() -> Iterator[Case]:
    for function, call in CALLS.items():
        for p in inspect.signature(call.function).parameters.values():
            kind = kind_of(function, p.name)
            for name, make, verdict in VALUES.get(kind, ()):
                optional = p.default is None or "None" in str(p.annotation)
                if name == "none" and optional:
                    verdict = "right"
                yield Case(function, p.name, name, make, verdict)


# -- what has to stay as it was ---------------------------------------------------------------------------------------


def state_of(call: dict[str, Any]) -> dict[str, Any]:
    """What no refused call may change, as plain values that can be compared."""
    store = pyro.get_param_store()
    return {
        "torch": torch.get_rng_state().sum().item(),
        "numpy": (np.random.get_state()[1].tobytes(), np.random.get_state()[2]),
        "python": hash(random.getstate()),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "store": {name: value.detach().sum().item() for name, value in store.items()},
        "validation": (pyro.settings.get("validate_infer"), torch.distributions.Distribution._validate_args),
        "handlers": len(_PYRO_STACK),
        "filters": list(warnings.filters),
        "files": sorted(map(str, Path.cwd().rglob("*"))),
        "modules": [_module(x) for x in _modules(call)],
        "data": [_numbers(x) for x in _tensors(call)],
    }


def _modules(call: dict[str, Any]) -> list[nn.Module]:
    owners = [getattr(x, "__self__", x) for x in call.values()]
    owners += [x for value in call.values() if isinstance(value, list) for x in value]
    return [x for x in owners if isinstance(x, nn.Module)]


def _module(module: nn.Module) -> Any:
    parameters = [(n, p.requires_grad, p.grad is None, _numbers(p)) for n, p in module.named_parameters()]
    return parameters, [m.training for m in module.modules()], [_numbers(b) for b in module.buffers()]


def _tensors(call: dict[str, Any]) -> list[Tensor]:
    values = [x for value in call.values() for x in (value if isinstance(value, (tuple, list)) else [value])]
    return [x for x in values if isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested]


def _numbers(x: Tensor) -> Any:
    if x.device.type == "meta":
        return x.shape
    return x.dtype, x.requires_grad, x.detach().cpu().numpy().tobytes()


# -- one case ---------------------------------------------------------------------------------------------------------


def arguments_of(case: Case) -> dict[str, Any]:
    call = CALLS[case.function].arguments()
    value = case.make(call)
    if isinstance(value, Change):
        return call | value
    variadic = inspect.signature(CALLS[case.function].function).parameters[case.parameter].kind
    return call | {case.parameter: (value,) if variadic is inspect.Parameter.VAR_POSITIONAL else value}


def run(case: Case) -> tuple[str, str]:
    """What became of a case: "fine", "silent", "obscure", "changed" or "slow", and what there is to say about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's nested tensors are a prototype
        arguments = arguments_of(case)
    before, error, found = state_of(arguments), None, None
    limit = REFUSE if case.verdict in ("wrong", "mine") else WORK
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with limited(limit):
                found = CALLS[case.function](arguments)
        except Slow:
            return "slow", f"more than {limit} s"
        except Exception as e:
            error = e
    after = state_of(arguments)
    if error is None:
        if case.verdict in ("wrong", "mine"):
            return "silent", f"gave {' '.join(str(found).split())[:120]}"
        if case.verdict != "through" and not sane(found):
            return "silent", f"gave {' '.join(str(found).split())[:120]}"
    else:
        reason = obscure(case, error)
        if reason:
            return "obscure", reason
        may = ("torch", "store") if case.function in PARTS_OF_PAIRS else ()
        changed = [name for name in before if before[name] != after[name] and name not in may]
        if changed:
            return "changed", f"{changed}: {error}"
    return "fine", ""


class Slow(BaseException):
    """A call that takes too long."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Ends a call that takes too long, in time of this process, so that a machine with much to do is no reason."""

    def stop(*_: Any) -> None:
        raise Slow

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def sane(found: Any) -> bool:
    """Whether a result has no NaN where all numbers are known: log-evidence, losses, draws."""
    for name in ("log_evidence", "loss", "log_likelihood"):
        value = getattr(found, name, None)
        if isinstance(value, (Tensor, list)) and not torch.as_tensor(value).isfinite().all():
            return False
    return not (isinstance(found, Tensor) and found.is_floating_point() and found.isnan().any())


def obscure(case: Case, error: Exception) -> str | None:
    """Why an error does not help, or None."""
    if case.verdict == "mine":
        return None if isinstance(error, Mine) else _short(error)
    if case.verdict == "through" or (kind_of(case.function, case.parameter) == "path" and isinstance(error, OSError)):
        return None
    if case.verdict == "right" or not isinstance(error, (ValueError, TypeError)):
        return _short(error)
    message = "\n".join([str(error), *getattr(error, "__notes__", ())])
    missing = [word for word in ("expected", "got", "Try ") if not re.search(rf"\b{word}", message)]
    return f"without {missing}: {_short(error)}" if missing else None


def _short(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:200]!r} ({Path(frame.filename).name}:{frame.lineno})"


def main() -> None:
    import tempfile

    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    counts, start = Counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for case in cases():
            if not re.search(pattern, str(case)):
                continue
            pyro.clear_param_store()
            try:
                outcome, text = run(case)
            except Exception as e:
                outcome, text = "broken", _short(e)
            counts[outcome] += 1
            if outcome != "fine":
                print(f"{outcome:8} {case.verdict:6} {case}: {text}")  # noqa: T201
        os.chdir("/")
    print(f"{counts.total()} cases of {len(CALLS)} functions: {dict(counts)}, {time.process_time() - start:.0f} s")  # noqa: T201


if __name__ == "__main__":
    gc.freeze()
    torch.set_num_threads(1)
    main()
