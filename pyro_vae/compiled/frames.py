"""Who reads a value, and what for: asked of the Python frames above a torch function that is being handled."""

from __future__ import annotations

import dis
import inspect
from functools import lru_cache
from types import CodeType
from typing import Any

from torch import Tensor

__all__ = ["caller", "in_pair", "only_raises"]

TRACES = "pyro.poutine.trace_messenger"  # calls models and guides
VALIDATES = "torch.distributions.distribution"  # `bool` of a test of parameters or values, only to raise


def caller() -> str:
    """Name of the module whose code called the torch function that is being handled."""
    return inspect.currentframe().f_back.f_back.f_globals.get("__name__", "")


def in_pair() -> bool:
    """Whether a model or guide is running, rather than an objective that runs them."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == TRACES:
            return True
        frame = frame.f_back
    return False


def only_raises(func: Any) -> bool:
    """Whether the value that is read only decides whether an error is raised: an `assert`, or validation."""
    frame = inspect.currentframe().f_back.f_back
    if func is not Tensor.__bool__ or frame is None:
        return False
    return frame.f_globals.get("__name__") == VALIDATES or frame.f_lasti in _asserts(frame.f_code)


@lru_cache(maxsize=256)
def _asserts(code: CodeType) -> frozenset[int]:
    """Where in a function's code the truth of a value decides whether an AssertionError is raised."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "NOT_TAKEN")]
    raising = {step.offset for step in steps if "ASSERTION" in step.opname or step.argrepr == "AssertionError"}
    found = set()
    for before, jump, after in zip([None, *steps], steps, [*steps[1:], None], strict=False):
        ways = {jump.argval, after.offset if after is not None else None}
        if "JUMP" in jump.opname and "IF_" in jump.opname and ways & raising:
            found.add(jump.offset)
            if before is not None and before.opname == "TO_BOOL":
                found.add(before.offset)
    return frozenset(found)
