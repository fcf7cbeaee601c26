"""How a pair runs: modules in evaluation mode, random generators that are put back, under a recording or not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "all_owners",
    "all_random_states",
    "evaluation_mode",
    "fork_random_state",
    "is_recording",
    "owners",
    "random_state",
    "recording",
    "set_all_random_states",
    "set_random_state",
]

_recording: ContextVar[bool] = ContextVar("recording", default=False)


def owners(*functions: Any) -> list[nn.Module]:
    """The modules that functions are or belong to, also under `functools.partial` and Pyro's handlers."""
    return [owner for owner in all_owners(*functions) if isinstance(owner, nn.Module)]


def all_owners(*functions: Any) -> list[Any]:
    """The objects that functions are methods of, and those of them that are modules."""
    found: dict[int, Any] = {}
    left = list(functions)
    while left:
        function = left.pop(0)
        if isinstance(function, partial):  # Pyro's handlers are partials too, with what they handle as an argument
            left += [f for f in (function.func, *function.args) if callable(f)]
            continue
        owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        if owner is not None:
            found[id(owner)] = owner
    return list(found.values())


def named_modules(*functions: Any) -> list[nn.Module]:
    """The modules in closures and among the globals of functions, also under `functools.partial` and handlers."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    left = list(functions)
    while left:
        function = left.pop()
        function = getattr(function, "__func__", function)
        if id(function) in seen:
            continue
        seen.add(id(function))
        if isinstance(function, partial):
            left += [f for f in (function.func, *function.args) if callable(f)]
        if not isinstance(function, FunctionType):
            continue
        names = function.__globals__
        values = [names[name] for name in function.__code__.co_names if name in names]
        values += [cell.cell_contents for cell in function.__closure__ or () if _is_bound(cell)]
        found |= {id(value): value for value in values if isinstance(value, nn.Module)}
        left += [value for value in values if isinstance(value, (FunctionType, MethodType, partial))]
    return list(found.values())


def _is_bound(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # not yet
        return False
    return True


@contextmanager
def evaluation_mode(*functions: Callable) -> Iterator[None]:
    """Runs modules in evaluation mode (dropout off, batch norm frozen), and puts each back into the mode it was in.

    Every `nn.Module` that is called inside is switched, wherever a model or guide keeps it. So are the owners of
    `functions` and the modules that they name, with all their parts: a method of a module may ask for `self.training`
    without the module being called.
    """
    changed: list[nn.Module] = []

    def switch(module: nn.Module, _: Any) -> None:
        if module.training:
            module.training = False
            changed.append(module)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(switch)
    try:
        for owner in [*owners(*functions), *named_modules(*functions)]:
            for module in owner.modules():
                switch(module, None)
        yield
    finally:
        handle.remove()
        for module in changed:
            module.training = True


def random_state() -> tuple[Tensor, list[Tensor]]:
    """The state of torch's generators: the CPU's, and those of CUDA if CUDA has been used."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    """Restores what `random_state` returned."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def all_random_states() -> tuple:
    """The states of the generators of torch, NumPy and Python."""
    return random_state(), np.random.get_state(), random.getstate()


def set_all_random_states(states: tuple) -> None:
    """Restores what `all_random_states` returned."""
    ours, numpy, python = states
    set_random_state(ours)
    np.random.set_state(numpy)
    random.setstate(python)


@contextmanager
def fork_random_state() -> Iterator[None]:
    """Restores the generators of torch, NumPy and Python afterwards."""
    states = all_random_states()
    try:
        yield
    finally:
        set_all_random_states(states)


def is_recording() -> bool:
    """Whether the run is being recorded as a graph, in this thread: values may not be read then."""
    return _recording.get()


@contextmanager
def recording() -> Iterator[None]:
    """Marks what runs inside as recorded."""
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)
