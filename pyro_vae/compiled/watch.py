"""Watches what a function reads: numbers in closures, globals and attributes, and the tensors that modules hold.

A recorded graph keeps the numbers that its run read. So each replay asks first whether one of them has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Watch"]

NUMBERS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
MOST = 5000  # so many objects are looked into, and no more
LIBRARIES = ("torch", "numpy", "pyro.distributions", "pyro.ops", "pyro.infer.util", "builtins", "math")
PYRO = ("pyro", __name__.partition(".")[0])  # only closures of their functions: these read no global that changes


class Watch:
    """Remembers what some functions and objects can reach: numbers by value, tensors and modules by identity.

    It looks into closures, the globals that a function names, bound objects, `functools.partial`, attributes of objects
    and modules, lists, tuples and dicts. It does not look into libraries.

    Args:
        *roots: the functions, modules and other objects to start from.

    Example:
        >>> class Scaled(nn.Module):
        ...     beta = 1.0
        >>> scaled = Scaled()
        >>> scaled.beta = 0.5
        >>> watch = Watch(scaled)
        >>> scaled.beta = 0.6
        >>> watch.changed()
        "'beta' of Scaled"
    """

    def __init__(self, *roots: Any) -> None:
        self._items: list[tuple[Callable, Any, Any, str]] = []  # how to read it, its key, its value, whose it is
        self._sizes: list[tuple[Any, int, str]] = []
        self._seen: set[int] = set()
        self._kept: list[Any] = []  # what was seen: kept alive, so that no other object gets its id
        for root in roots:
            self._walk(root)

    def changed(self) -> str | None:
        """The name of something that has changed. None if nothing has."""
        for container, size, owner in self._sizes:
            if len(container) != size:
                return f"an attribute of {owner}"
        for read, key, value, owner in self._items:
            try:
                now = read(key)
            except (KeyError, IndexError, ValueError):
                return f"{key!r} of {owner}"
            if now is not value and not (type(now) is type(value) and isinstance(now, NUMBERS) and now == value):
                return f"{key!r} of {owner}"
        return None

    def _walk(self, root: Any) -> None:
        if id(root) in self._seen or isinstance(root, (*NUMBERS, Tensor, type)) or len(self._seen) > MOST:
            return
        self._seen.add(id(root))
        self._kept.append(root)
        if isinstance(root, MethodType):
            self._walk(root.__self__)
            self._walk(root.__func__)
        elif isinstance(root, partial):
            for part in (root.func, root.args, root.keywords):
                self._walk(part)
        elif isinstance(root, FunctionType):
            self._function(root)
        elif isinstance(root, dict):
            self._mapping(root, "a dict")
        elif isinstance(root, (list, tuple)) and len(root) <= 64:
            for i, value in enumerate(root):
                self._take(root.__getitem__, i, value, f"a {type(root).__name__}")
        elif hasattr(root, "__dict__") and not _belongs_to(type(root).__module__, LIBRARIES):
            self._mapping(vars(root), type(root).__name__)
            self._forward(root)
        elif isinstance(root, nn.Module):
            self._mapping(vars(root), type(root).__name__)

    def _forward(self, root: Any) -> None:
        for name in ("forward", "__call__"):
            function = getattr(type(root), name, None)
            if isinstance(function, FunctionType):
                self._walk(function)

    def _function(self, function: FunctionType) -> None:
        library = _belongs_to(function.__module__, (*LIBRARIES, *PYRO))
        if library and not function.__closure__:
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not bound yet
                continue
            self._take(_Cell(cell), name, value, function.__qualname__)
        if not library:
            self._globals(function)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._walk(value)

    def _globals(self, function: FunctionType) -> None:
        """Takes the globals that a function names, and the numbers that it may read from modules among them."""
        names = function.__globals__
        for name in function.__code__.co_names:
            if name not in names or isinstance(names[name], type):
                continue
            if isinstance(names[name], ModuleType):
                inside = vars(names[name])
                for attribute in function.__code__.co_names:
                    if isinstance(inside.get(attribute), NUMBERS) and attribute in inside:
                        self._take(inside.__getitem__, attribute, inside[attribute], f"module {name!r}")
            else:
                self._take(names.__getitem__, name, names[name], f"{function.__qualname__}'s module")

    def _mapping(self, mapping: dict, owner: str) -> None:
        if len(mapping) > 1000:
            return
        self._sizes.append((mapping, len(mapping), owner))
        for key, value in list(mapping.items()):
            self._take(mapping.__getitem__, key, value, owner)

    def _take(self, read: Callable, key: Any, value: Any, owner: str) -> None:
        if isinstance(value, (*NUMBERS, Tensor, nn.Module, FunctionType)):
            self._items.append((read, key, value, owner))
        self._walk(value)


class _Cell:
    """Reads the cell of a closure. The key, its name, is of no use here."""

    def __init__(self, cell: CellType) -> None:
        self._cell = cell

    def __call__(self, key: Any) -> Any:
        return self._cell.cell_contents


def _belongs_to(module: str | None, packages: tuple[str, ...]) -> bool:
    """Whether a module is one of these packages or inside of one; `torch_nets` is not in `torch`."""
    return any(module == package or (module or "").startswith(f"{package}.") for package in packages)
