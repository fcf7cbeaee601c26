"""One call of a Pyro objective, made again through `CompiledELBO` and compared. Used by `pyro_tests_plugin.py`.

A call is made again from the same random state, with the same parameters: by Pyro once more (the first call of an
objective may also look for the depth of the plates, which draws), then up to four times by `CompiledELBO`, so that it
runs as it is, is recorded and is replayed. Afterwards everything is as Pyro's own call left it.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

from pyro_vae.compiled import CompiledELBO
from pyro_vae.compiled.untraceable import Untraceable
from pyro_vae.pairs.parameters import graph_leaves

MOST_JITS = int(os.environ.get("PYRO_TESTS_JITS", "1"))  # calls for each reason, as the JIT is slow
RUNS = 4  # as it is, recorded, replayed, replayed
TOLERANCE = 1e-9  # relative, in double precision: sums of gradients may be taken in another order


class State:
    """What a call of an objective may change: the random generators, the parameters and their gradients."""

    def __init__(self) -> None:
        store = pyro.get_param_store()
        self.random = get_rng_state()
        self.params = [(name, t, t.detach().clone(), t.grad) for name, t in store._params.items()]
        self.constraints, self.names = dict(store._constraints), dict(store._param_to_name)

    def restore(self, random: Any, *, gradients: bool) -> None:
        """Puts parameters back. With `gradients`, these as well; else they become None."""
        store = pyro.get_param_store()
        store._params = {name: t for name, t, _, _ in self.params}
        store._constraints, store._param_to_name = dict(self.constraints), dict(self.names)
        for _, t, value, grad in self.params:
            t.data.copy_(value)
            t.grad = grad if gradients else None
        set_rng_state(random)


class Guard:
    """Counts Pyro's own runs inside of ours, which are not to be compared again."""

    def __init__(self) -> None:
        self.inside, self.runs = False, 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before


guard = Guard()
refusals: list[dict[str, Any]] = []  # since the last call
causes: dict[str, dict[str, Any]] = {}  # by the message of an `Untraceable`, of this test
tried: Counter[tuple] = Counter()  # by Pyro's JIT


def warn(message: Any, *args: Any, original: Callable = warnings.warn, **kwargs: Any) -> None:
    """In place of `warnings.warn`: what `CompiledELBO` says when it refuses is taken down, with where it comes from."""
    if str(message).startswith("CompiledELBO: "):
        found = next((causes[text] for text in causes if text in str(message)), {})
        refusals.append({"message": str(message).removeprefix("CompiledELBO: "), **found})
        return
    if len(args) >= 2:
        args = (args[0], args[1] + 1, *args[2:])
    else:
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
    original(message, *args, **kwargs)


def untraceable(self: Untraceable, message: str) -> None:
    """In place of the constructor of `Untraceable`: notes where the error that it comes from stands."""
    RuntimeError.__init__(self, message)
    causes[message] = origin(sys.exc_info()[1])


def origin(error: BaseException | None) -> dict[str, Any]:
    """The torch function that reads a value, and the last lines of code on the way to it."""
    if error is None:
        return {}
    error = error.__cause__ or error
    function, lines = "", []
    for frame, number in traceback.walk_tb(error.__traceback__):
        name = frame.f_globals.get("__name__", "")
        if name.startswith("pyro_vae.compiled.handler") and "func" in frame.f_locals:
            function = getattr(frame.f_locals["func"], "__qualname__", str(frame.f_locals["func"]))
        elif name.endswith("proxy_tensor") and "func" in frame.f_locals and not function:
            function = str(frame.f_locals["func"])
        if not name.startswith(("pyro_vae.compiled", "torch.fx", "torch.utils", "torch._", "torch.overrides")):
            source = traceback.FrameSummary(frame.f_code.co_filename, number, frame.f_code.co_name).line
            lines.append(f"{name}:{number}: {source}")
    return {"function": function, "lines": lines[-6:], "error": f"{type(error).__name__}: {error}"[:300]}


def result_of(elbo: Any, method: str, call: tuple, random: Any, state: State) -> dict[str, Any]:
    """Loss, gradients, seen parameters and the random state after a call."""
    state.restore(random, gradients=False)
    model, guide, args, kwargs = call
    with poutine.trace(param_only=True) as seen:
        loss = getattr(elbo, method)(model, guide, *args, **kwargs)
    after = get_rng_state()
    store = pyro.get_param_store()._params
    if method == "differentiable_loss" and isinstance(loss, Tensor) and loss.requires_grad:
        leaves = {id(t): t for t in (*graph_leaves(loss), *(t for t in store.values() if t.requires_grad))}
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        named = {id(t): name for name, t in store.items()}
        grads = {named.get(i, i): g for i, g in zip(leaves, found, strict=True)}
    else:
        grads = {name: t.grad for name, t in store.items()}
    grads = {name: g.detach().clone() for name, g in grads.items() if g is not None}
    loss = loss.detach().clone() if isinstance(loss, Tensor) else torch.as_tensor(loss)
    names = sorted(seen.trace.param_nodes)
    return {"loss": loss, "grads": grads, "params": names, "store": sorted(store), "random": after["torch"]}


def difference(expected: dict[str, Any], found: dict[str, Any]) -> tuple[str, bool]:
    """What differs between two results, and whether they are the same floats."""
    notes, exact = [], True
    pairs: list[tuple] = [("loss", expected["loss"], found["loss"])]
    for name in sorted({*expected["grads"], *found["grads"]}, key=str):
        pairs.append((name, expected["grads"].get(name), found["grads"].get(name)))
    for name, a, b in pairs:
        if isinstance(name, int) and (a is None or b is None):  # a leaf that each call makes anew
            continue
        if a is None or b is None:
            other = a if b is None else b
            exact = False
            if bool((other != 0).any()):
                notes.append(f"gradient of {name}: {describe(a)} → {describe(b)}")
            continue
        a, b = a.double(), b.double()
        exact = exact and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
        scale = float(a.abs().max()) if a.numel() and bool(a.isfinite().all()) else 1.0
        if a.shape != b.shape or not torch.allclose(a, b, TOLERANCE, TOLERANCE * max(scale, 1e-3), equal_nan=True):
            what = name if name == "loss" else f"gradient of {name}"
            notes.append(f"{what}: {describe(a)} → {describe(b)}")
    if expected["params"] != found["params"]:
        notes.append(f"seen parameters: {expected['params']} → {found['params']}")
    if expected["store"] != found["store"]:
        notes.append(f"stored parameters: {expected['store']} → {found['store']}")
    if not torch.equal(expected["random"], found["random"]):
        notes.append("random state afterwards")
    return "; ".join(notes), exact


def describe(t: Tensor | None) -> str:
    if t is None:
        return "none"
    return f"{t.flatten()[:4].tolist()}{list(t.shape)}" if t.dim() else f"{t.item():.8g}"


def compare(elbo: ELBO, compiled: CompiledELBO, method: str, call: tuple, random: Any, jit: type | None) -> dict:
    """Makes a call of Pyro's again, through `CompiledELBO`, and tells how it went.

    Args:
        elbo: Pyro's objective, which has just made this call.
        compiled: ours of it.
        method: the name of the method that was called.
        call: model, guide, args, kwargs.
        random: the state of the generators before the call.
        jit: Pyro's own compiled class, which is tried where ours refuses.
    """
    state = State()
    refusals.clear()
    report: dict[str, Any] = {"how": "plain", "same": "equal", "exact": True, "note": ""}
    try:
        with guard():
            expected = result_of(elbo, method, call, random, state)
            report |= runs_of_ours(compiled, method, call, random, state, expected)
            if report["same"] == "different":
                again, _ = difference(expected, result_of(elbo, method, call, random, state))
                if again:
                    report |= {"same": "not repeatable", "note": f"Pyro itself: {again}"}
            first = report["why"][0] if isinstance(report.get("why"), list) else {}
            asked = (type(elbo), method, first.get("function"), *first.get("lines", ())[-1:])
            if report["how"] in ("refused", "plain") and tried[asked] < MOST_JITS:
                tried[asked] += 1
                report["jit"] = try_jit(elbo, jit, method, call, random, state, expected)
    except Exception as error:
        report |= {"same": "not repeatable", "note": f"Pyro itself: {type(error).__name__}: {error}"[:300]}
    finally:
        state.restore(state.random, gradients=True)
    return report


def runs_of_ours(
    compiled: CompiledELBO, method: str, call: tuple, random: Any, state: State, expected: dict[str, Any]
) -> dict[str, Any]:
    known: dict[tuple, Any] = compiled.__dict__.setdefault("_benchmark", {})
    key = (id(call[0]), id(call[1]))  # both are kept alive by `compiled`
    report: dict[str, Any] = {"how": "plain", "same": "equal", "exact": True, "note": ""}
    for run in range(RUNS):
        before = guard.runs
        try:
            found = result_of(compiled, method, call, random, state)
        except Exception as error:
            lines = origin(error).get("lines")
            report |= {"same": "error", "note": f"run {run}: {type(error).__name__}: {error}"[:500], "lines": lines}
            break
        note, exact = difference(expected, found)
        replayed = guard.runs == before
        report["exact"] &= exact
        if replayed:
            report["how"] = "replayed"
        if note:
            kind = "replayed" if replayed else "not replayed"
            report |= {"same": "different", "note": f"run {run}, {kind}: {note}"}
            break
        if replayed and (key, method) in known:
            break
    if refusals:
        known[key] = list(refusals)
    if report["how"] == "replayed":
        known[key, method] = True
    elif key in known:
        report |= {"how": "refused", "why": known[key]}
    else:
        report["why"] = silent_reason(call)
    return report


def silent_reason(call: tuple) -> str:
    """Why `CompiledELBO` may have left a call to Pyro without a word."""
    handlers = [type(h).__name__ for h in _PYRO_STACK if not isinstance(h, TraceMessenger)]
    if handlers:
        return f"inside of {', '.join(handlers)}"
    leaves = torch.utils._pytree.tree_leaves(call[2:])
    if any(isinstance(t, Tensor) and t.requires_grad for t in leaves):
        return "an argument requires a gradient"
    return "not known"


def try_jit(
    elbo: ELBO, jit: type | None, method: str, call: tuple, random: Any, state: State, expected: dict[str, Any]
) -> str:
    """Whether Pyro's own JIT has this call: "works", or how it fails in its second run, which is compiled."""
    if jit is None or method == "loss":
        return "there is none"
    other = jit.__new__(jit)
    other.__dict__.update(elbo.__dict__)
    other.ignore_jit_warnings = True
    try:
        with warnings.catch_warnings(), torch.jit.optimized_execution(False):
            warnings.simplefilter("ignore")
            for _ in range(2):
                found = result_of(other, method, call, random, state)
    except Exception as error:
        return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:200]
    note, _ = difference(expected, found)
    return f"other numbers: {note}" if note else "works"
