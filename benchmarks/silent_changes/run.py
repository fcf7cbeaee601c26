"""Runs of a way, by Pyro as it is and compiled, and the verdict."""

from __future__ import annotations

import builtins
import decimal
import importlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.fx.experimental import proxy_tensor

from pyro_vae import CompiledELBO, fit, importance_sampling
from pyro_vae.compiled import recording
from silent_changes.way import Way

__all__ = ["CHANGE", "SETTINGS", "STEPS", "Outcome", "has_effect"]

STEPS = 68  # with an audit at the 64th replay
CHANGE = 12  # between audits at the 8th and the 16th replay
AS_IT_IS, AUDIT = "Pyro runs as it is", "audit"
ROUNDING = 1e-4  # relative; a change moves a loss by far more
WARNING = "CompiledELBO|not compiled|audit"


@dataclass
class Run:
    """What came out, and what was said.

    Attributes:
        values: in the order of time: losses of steps or epochs, or log-evidences.
        final: numbers that have to agree at the end: parameters, statistics.
        said: (how many values there were before, the text of a warning).
        recordings: how many were made.
    """

    values: list[float] = field(default_factory=list)
    final: list[float] = field(default_factory=list)
    said: list[tuple[int, str]] = field(default_factory=list)
    recordings: int = 0

    def first(self, words: str) -> int | None:
        """How many values there were before the first warning with these words."""
        return next((before for before, text in self.said if words in text), None)


@dataclass(frozen=True)
class Outcome:
    """One of KINDS, and more words."""

    kind: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.note})" if self.note else self.kind


@contextmanager
def scene(way: Way) -> Iterator[ModuleType]:
    """The script of a way, imported in a folder of its own. All that it may change is put back afterwards."""
    kept = dict(os.environ), list(sys.argv), list(sys.path), set(sys.modules), Path.cwd(), dict(vars(builtins))
    limit, context, dtype = sys.getrecursionlimit(), decimal.getcontext().copy(), torch.get_default_dtype()
    script = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = f"from silent_changes.script import *\n{way.source}"
            for name, text in {f"{way.module}.py": source, **way.files}.items():
                Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
                Path(folder, name).write_text(text)
            os.chdir(folder)
            sys.path.insert(0, folder)
            importlib.invalidate_caches()
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            script = importlib.import_module(way.module)
            yield script
        finally:
            os.chdir(kept[4])
            with suppress(NameError):  # nothing was done yet
                getattr(script, "undo", lambda: None)()
            os.environ.clear()
            os.environ.update(kept[0])
            sys.argv, sys.path[:] = kept[1], kept[2]
            for name in set(sys.modules) - kept[3]:
                if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
                    del sys.modules[name]
            for name in set(vars(builtins)) - set(kept[5]):
                delattr(builtins, name)
            sys.setrecursionlimit(limit)
            decimal.setcontext(context)
            torch.set_default_dtype(dtype)


@contextmanager
def listening(run: Run) -> Iterator[None]:
    """Notes warnings and recordings while something runs."""

    def heard(message: Any, *_: Any, **__: Any) -> None:
        run.said.append((len(run.values), str(message)))

    make, set_meta = recording.make_fx, proxy_tensor.set_meta

    def counted(*args: Any, **kwargs: Any) -> Callable:
        traced = make(*args, **kwargs)

        def record(*inputs: Any) -> Any:
            graph = traced(*inputs)
            run.recordings += 1
            return graph

        return record

    recording.make_fx = counted
    # what shapes nodes have takes two thirds of the time of a recording, and replays do not read it
    proxy_tensor.set_meta = lambda proxy, value: proxy
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", message=f".*({WARNING})")
            warnings.showwarning = heard
            yield
    finally:
        recording.make_fx, proxy_tensor.set_meta = make, set_meta


def _move(script: ModuleType, step: int, changing: bool) -> None:
    if changing and hasattr(script, "every"):
        script.every(step)
    if changing and step == CHANGE and hasattr(script, "change"):
        script.change()


def _args(script: ModuleType, step: int, changing: bool = True) -> tuple:
    return script.args(step if changing else 0) if hasattr(script, "args") else (script.X,)


def _final(script: ModuleType) -> list[float]:
    parts = [p.detach().double().flatten() for _, p in sorted(pyro.get_param_store().items())]
    if hasattr(script, "final"):
        parts.append(script.final().detach().double().flatten())
    return torch.cat(parts).tolist() if parts else []


def svi(way: Way, compiled: bool, changing: bool = True, steps: int = STEPS) -> Run:
    """Steps of `SVI`."""
    run = Run()
    with scene(way) as script, listening(run):
        elbo = getattr(script, "elbo", None) or Trace_ELBO()
        loss = CompiledELBO(elbo, backend="eager") if compiled else elbo
        inference = SVI(script.model, script.guide, pyro.optim.Adam({"lr": 0.02}), loss=loss)
        for step in range(steps):
            _move(script, step, changing)
            if changing and step == CHANGE and hasattr(script, "with_svi"):
                script.with_svi(inference)
            torch.manual_seed(step)
            with script.around(step) if changing and hasattr(script, "around") else nullcontext():
                run.values.append(inference.step(*_args(script, step, changing)))
        run.final = _final(script)
    return run


def fitted(way: Way, compiled: bool) -> Run:
    """`STEPS` epochs of `fit` of one step each; a scheduler makes the changes."""
    run = Run()
    with scene(way) as script, listening(run):

        class Scheduler:
            epoch = 0

            def step(self) -> None:
                self.epoch += 1
                run.values.append(float("nan"))  # the losses are known at the end; this counts them
                _move(script, self.epoch, True)

        how = {"loss": CompiledELBO(backend="eager")} if compiled else {"compile": False}
        options: dict[str, Any] = {"batch_size": 8, "learning_rate": 0.02, "seed": 0, "progress": False}
        result = fit(
            script.model,
            script.guide,
            script.X,
            num_epochs=STEPS,
            scheduler=lambda optimizer: Scheduler(),
            **how,
            **options,
        )
        run.values = list(result.loss)
        run.final = _final(script)
    return run


def evidence(way: Way, compiled: bool) -> Run:
    """Log-evidences of eight rows in 32 passes, and again after the change, if one is made."""
    run = Run()
    with scene(way) as script, listening(run):
        changes = any(hasattr(script, name) for name in ("change", "every", "args"))
        for step in (0, CHANGE) if changes else (0,):
            _move(script, step, True)
            torch.manual_seed(step)
            found = importance_sampling(
                script.model,
                script.guide,
                *_args(script, step),
                num_particles=32,
                chunk_size=8,
                compile="auto" if compiled else False,
                progress=False,
            )
            run.values += found.log_evidence.tolist()
    return run


SETTINGS: dict[str, Callable[[Way], Outcome]] = {
    "SVI": lambda way: _outcome(way, svi),
    "fit": lambda way: _outcome(way, fitted) if way.fit else Outcome("–"),
    "evidence": lambda way: _outcome(way, evidence) if way.evidence else Outcome("–"),
}


def has_effect(way: Way) -> bool:
    """Whether plain Pyro has other losses with the change than without, or with the model's state moving."""
    with scene(way) as script:
        if not any(hasattr(script, name) for name in ("change", "every", "around", "with_svi")):
            elbo, values = getattr(script, "elbo", None) or Trace_ELBO(), []
            for _ in range(40):
                torch.manual_seed(0)
                values.append([elbo.loss_and_grads(script.model, script.guide, *_args(script, 0)), *_final(script)])
            if any(not _same(values[0], other) for other in values):
                return True
    with_change, without = (svi(way, False, changing, steps=CHANGE + 5) for changing in (True, False))
    return not (_same(with_change.values, without.values) and _same(with_change.final, without.final))


def _outcome(way: Way, setting: Callable[[Way, bool], Run]) -> Outcome:
    try:
        plain = setting(way, False)
    except Exception as error:
        if setting is evidence:  # what an estimator refuses needs no compiling
            return Outcome("–", "refused in plain Pyro too")
        return Outcome("error", f"plain: {_short(error)}")
    try:
        compiled = setting(way, True)
    except Exception as error:
        return Outcome("error", _short(error))
    return verdict(plain, compiled, way.irreproducible, counts=setting is not evidence)


def verdict(plain: Run, compiled: Run, irreproducible: bool = False, counts: bool = True) -> Outcome:
    """What became of a way.

    Args:
        plain: the run by Pyro as it is.
        compiled: the other run.
        irreproducible: two plain runs differ too.
        counts: whether Pyro, where it runs in place of a recording, has to give the very numbers of the plain run. In
            evidence the data are checked by a pass of their own, so that a model that counts its runs counts one more.
    """
    audit, as_it_is = compiled.first(AUDIT), compiled.first(AS_IT_IS)
    pairs = zip(plain.values, compiled.values, strict=True)
    wrong = [i for i, (a, b) in enumerate(pairs) if not _same([a], [b])]
    if irreproducible:
        if audit is not None:
            return Outcome("audit", f"at {audit}")
        return Outcome("plain") if as_it_is is not None or not compiled.recordings else Outcome("SILENT", "frozen")
    if not wrong and _same(plain.final, compiled.final):
        if audit is not None:
            return Outcome("audit", "0 wrong before")
        if as_it_is is not None:
            return Outcome("plain")
        if compiled.recordings == 0:
            return Outcome("plain", "without a word")
        return Outcome("re-recorded", f"× {compiled.recordings}") if compiled.recordings > 1 else Outcome("equal")
    if audit is not None:
        return Outcome("audit", f"{sum(i < audit for i in wrong)} wrong before")
    if as_it_is is None:
        return Outcome("SILENT", f"from {wrong[0]}" if wrong else "final numbers")
    if not counts:
        return Outcome("plain")
    return Outcome("SILENT", f"from {wrong[0] if wrong else 'the end'}, Pyro from {as_it_is}")


def _same(a: list[float], b: list[float]) -> bool:
    if len(a) != len(b):
        return False
    x, y = torch.tensor([a, b], dtype=torch.float64)
    return torch.allclose(x, y, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:90]
