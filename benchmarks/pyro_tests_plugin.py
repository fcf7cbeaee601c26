"""A plugin of pytest for Pyro's own tests, started by `pyro_tests.py`.

Two things happen while the tests run, and everything is written down, a line of JSON for each, as it happens:

- Each call of an objective of Pyro that a test makes is made again through `CompiledELBO` and compared.
- `JitTrace_ELBO` and its siblings are replaced by `CompiledELBO` of the objectives that they compile.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro.infer
import pyro_tests_calls as calls
import pytest
from pyro.infer import ELBO
from pyro.util import get_rng_state
from pyro_tests_calls import guard

from pyro_vae.compiled import CompiledELBO
from pyro_vae.compiled.untraceable import Untraceable

METHODS = ("loss", "differentiable_loss", "loss_and_grads")
JITS = {
    pyro.infer.Trace_ELBO: pyro.infer.JitTrace_ELBO,
    pyro.infer.TraceGraph_ELBO: pyro.infer.JitTraceGraph_ELBO,
    pyro.infer.TraceEnum_ELBO: pyro.infer.JitTraceEnum_ELBO,
    pyro.infer.TraceMeanField_ELBO: pyro.infer.JitTraceMeanField_ELBO,
}
OTHERS = (pyro.infer.RenyiELBO, pyro.infer.TraceTMC_ELBO, pyro.infer.TraceTailAdaptive_ELBO)
COMPARED = (*JITS, *OTHERS)
MOST = int(os.environ.get("PYRO_TESTS_CALLS", "12"))  # so many calls of a test are compared


class Log:
    """What happened, written to a file of JSON lines."""

    def __init__(self, path: str) -> None:
        self.path, self.test = Path(path), ""
        self.calls = 0
        self.compiled: dict[int, tuple[ELBO, CompiledELBO]] = {}
        self.replaced: Counter[str] = Counter()

    def write(self, **fields: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"test": self.test, **fields}, default=str) + "\n")

    def start(self, test: str) -> None:
        self.test, self.calls = test, 0
        self.compiled.clear()
        self.replaced.clear()
        calls.refusals.clear()
        calls.causes.clear()

    def of(self, elbo: ELBO) -> CompiledELBO:
        """Ours of an objective, one for each."""
        if id(elbo) not in self.compiled:
            self.compiled[id(elbo)] = elbo, CompiledELBO(elbo, backend="eager")
        return self.compiled[id(elbo)][1]


log = Log(os.environ["PYRO_TESTS_LOG"])


def compared(original: Callable, method: str) -> Callable:
    """A method of Pyro's objectives that is compared whenever a test calls it."""

    def call(self: ELBO, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Any:
        if guard.inside:
            guard.runs += 1
        if guard.inside or type(self) not in COMPARED or not log.test:
            return original(self, model, guide, *args, **kwargs)
        random = get_rng_state()
        with guard():
            result = original(self, model, guide, *args, **kwargs)
        log.calls += 1
        if log.calls > MOST:
            return result
        report = calls.compare(self, log.of(self), method, (model, guide, args, kwargs), random, JITS.get(type(self)))
        log.write(kind="call", elbo=type(self).__name__, method=method, **report)
        return result

    call.__name__, call.__doc__ = original.__name__, original.__doc__
    return call


def replaced(plain: type[ELBO], jit: type[ELBO]) -> type[CompiledELBO]:
    """A class with the name and the arguments of Pyro's jitted one."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        CompiledELBO.__init__(self, plain(*args, **kwargs), backend="eager")

    def method(name: str) -> Callable:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            before = guard.runs
            with guard():
                result = getattr(CompiledELBO, name)(self, *args, **kwargs)
            log.replaced["calls"] += 1
            log.replaced["replayed"] += guard.runs == before
            return result

        return call

    return type(jit.__name__, (CompiledELBO,), {"__init__": init, **{name: method(name) for name in METHODS}})


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYRO_TESTS_PLAIN"):
        return
    warnings.warn = calls.warn
    Untraceable.__init__ = calls.untraceable
    for plain, jit in JITS.items():
        ours = replaced(plain, jit)
        for module in (pyro.infer, sys.modules[jit.__module__]):
            setattr(module, jit.__name__, ours)
    for plain in COMPARED:
        for name in METHODS:
            if name in vars(plain):
                setattr(plain, name, compared(vars(plain)[name], name))


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = items[:: int(os.environ.get("PYRO_TESTS_EVERY", "1"))]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    log.start(item.nodeid)
    yield
    if log.replaced["calls"]:
        log.write(kind="jit", why=list(calls.refusals), **log.replaced)
    if log.calls > MOST:
        log.write(kind="rest", calls=log.calls - MOST)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    outcome: str = report.outcome
    if hasattr(report, "wasxfail"):
        outcome = "xfailed" if report.skipped else "xpassed"
    message = str(report.longrepr)[-1500:] if outcome == "failed" else ""
    log.write(kind="outcome", outcome=outcome, id=report.nodeid, message=message)
