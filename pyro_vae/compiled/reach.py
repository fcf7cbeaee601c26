"""What a function can read, as far as its code names it: found by walking through closures, globals and objects.

The walk starts from functions and objects. It collects the names that their code mentions, in nested functions too, and
follows these names through closures, globals, modules, classes and attributes to more code, until nothing is added.
What a library's object holds is followed whatever its name, as the library's code is not looked into.
"""

from __future__ import annotations

import argparse
import dis
import os
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from inspect import getmro
from types import BuiltinMethodType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType, SimpleNamespace
from typing import Any
from weakref import ref

import numpy as np
import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.pairs.libraries import FRAMEWORK, USER, holder, is_library

__all__ = ["MISSING", "NUMBERS", "Reach", "read_attribute"]

NUMBERS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, np.generic)
CONTAINERS = (dict, list, tuple, deque, set, frozenset)
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
MISSING = object()
MOST_OBJECTS = 20_000  # so many are looked into, nearest first, and no more
LONGEST = 20_000  # elements of a container that are looked at one by one
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
NAMESPACES = (SimpleNamespace, argparse.Namespace)  # the user's, whoever wrote their class
CODE = (FunctionType, staticmethod, classmethod, property)
PARTS = ("_parameters", "_buffers", "_modules")  # of a module
NOT_READING = {"__init__", "__new__", "__post_init__", "__repr__", "__str__", "__init_subclass__", "__reduce__"}
NOT_READING |= {"__getstate__", "__setstate__", "__del__", "__set_name__"}  # methods that no running model calls
# by which code reads names that it does not mention
DYNAMIC = {"getattr", "vars", "__dict__", "attrgetter", "methodcaller", "eval", "exec", "globals", "format", "asdict"}


class Reach:
    """All that functions and objects can read.

    Args:
        *roots: functions, modules and other objects.

    Attributes:
        entries: (mapping or class, name, owner): one value of a namespace.
        containers: (container, owner, whether an object of torch or Pyro holds it): all elements are read.
        sized: (namespace, owner): of which names may be read that are not there yet.
        attributes: (object, name, owner): what only `getattr` reads.
        arrays: (NumPy array, owner): read element by element.
        moving: what gives something else whenever it is read, such as an iterator, by name. None if nothing does.
        tensors: that may be changed in place.
        names: that the code mentions.
    """

    def __init__(self, *roots: Any) -> None:
        self.names: set[str] = set()
        size = -1
        while size < len(self.names):  # each round may find more code, which names more
            size = len(self.names)
            self._start(roots)

    def _start(self, roots: Iterable[Any]) -> None:
        self.entries: list[tuple[Mapping | type, str, str]] = []
        self.containers: list[tuple[Any, str, bool]] = []
        self.sized: list[tuple[Any, str]] = []
        self.attributes: list[tuple[Any, str, str]] = []
        self.arrays: list[tuple[np.ndarray, str]] = []
        self.tensors: list[Tensor] = []
        self.moving: str | None = None
        self._kept: dict[int, Any] = {}  # what was seen: kept alive, so that no other object gets its id
        self._left: deque[tuple[Any, str, int]] = deque((root, "", USER) for root in roots)
        while self._left and len(self._kept) < MOST_OBJECTS:
            self._visit(*self._left.popleft())

    def _follow(self, value: Any, name: str, held: int = USER) -> None:
        """Looks into a value later. `held`: whose object it is that holds it (`libraries.holder`)."""
        self._left.append((value, name, held))

    def _visit(self, thing: Any, name: str, held: int) -> None:
        if id(thing) in self._kept or isinstance(thing, (*NUMBERS, Trace)):
            return
        self._kept[id(thing)] = thing
        if isinstance(thing, Tensor):
            self.tensors.append(thing)
            return
        if isinstance(thing, (Iterator, *GENERATORS)) and held == USER and self.moving is None:
            self.moving = name
        if isinstance(thing, FunctionType):
            self._function(thing)
        elif isinstance(thing, MethodType):
            self._follow(thing.__self__, name, held)
            self._follow(thing.__func__, name, held)
        elif isinstance(thing, partial):
            for part in (thing.func, *thing.args, thing.keywords):
                self._follow(part, name, held)
        elif isinstance(thing, ModuleType):
            self._module(thing)
        elif isinstance(thing, type):
            self._class(thing, constructed=True)
        elif isinstance(thing, (staticmethod, classmethod)):
            self._follow(thing.__func__, name)
        elif isinstance(thing, property):
            self._follow(thing.fget, name)
        elif isinstance(thing, BuiltinMethodType):
            self._follow(thing.__self__, name, held)
        elif isinstance(thing, VIEWS):
            self._follow(thing.mapping, name, held)  # type: ignore[attr-defined]
        elif isinstance(thing, ref):
            self._follow(thing(), name, held)
        else:
            self._object(thing, held)

    # -- code ---------------------------------------------------------------------------------------------------------

    def _function(self, function: FunctionType) -> None:
        owner, held = function.__qualname__, holder(function.__globals__.get("__name__"))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._attribute(cell, "cell_contents", f"{name!r} of {owner}", held)
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            self._attribute(function, name, f"{name!r} of {owner}", held)
        self._follow(function.__dict__, owner, held)
        if held != USER:
            return
        mentioned = set(_mentioned(function.__code__))
        self.names |= mentioned
        names = function.__globals__
        if mentioned & {"globals", "eval", "exec"}:  # any that is no code
            mentioned |= {
                name for name, value in names.items() if isinstance(value, (*NUMBERS, *CONTAINERS, np.ndarray))
            }
        for name in mentioned:
            if name in names:
                self._entry(names, name, f"{owner}'s module")
        for name in _imported(function.__code__):
            for module in (name, f"{names.get('__package__')}.{name}"):
                self._follow(sys.modules.get(module), name)

    def _module(self, module: ModuleType) -> None:
        """Takes what code may read from a module by name. Of a library's module this is data, not code."""
        inside, library = vars(module), is_library(module.__name__)
        for name in self.names & inside.keys():
            value = inside[name]
            if value is sys.modules:
                continue
            if not library or isinstance(value, (*NUMBERS, list, dict, np.ndarray, type(os.environ))):
                self._entry(inside, name, f"module {module.__name__!r}")
        if module is os and "getenv" in self.names:
            self._entry(inside, "environ", "module 'os'")

    def _class(self, cls: type, *, constructed: bool) -> None:
        """Takes what code may read from a class by name, and the methods that Python calls by itself."""
        for base in (*getmro(cls), *getmro(type(cls))):
            if is_library(base.__module__):
                continue
            inside = vars(base)
            self.sized.append((base, base.__qualname__))
            libraries = [b for b in getmro(base)[1:] if is_library(b.__module__)]
            for name, value in inside.items():
                # what Python or a library calls, by a name that the user's code need not mention
                special = isinstance(value, CODE) and (
                    name.startswith("__") or any(hasattr(library, name) for library in libraries)
                )
                if name in self.names or (special and (constructed or name not in NOT_READING)):
                    self.entries.append((base, name, base.__qualname__))
                    self._follow(value, f"{name!r} of {base.__qualname__}")

    # -- objects ------------------------------------------------------------------------------------------------------

    def _object(self, thing: Any, held: int) -> None:
        cls, owner = type(thing), type(thing).__qualname__
        own = USER if cls in NAMESPACES else holder(cls.__module__)
        if isinstance(thing, np.ndarray):
            self.arrays.append((thing, "an array"))
        elif isinstance(thing, (*CONTAINERS, MappingProxyType)):
            self._container(thing, f"a {owner}", held)
        if own == USER:
            self._class(cls, constructed=False)
            for name in _slots(cls):
                self._attribute(thing, name, f"{name!r} of {owner}")
        inside = getattr(thing, "__dict__", None)
        if not isinstance(inside, dict) or (own != USER and isinstance(thing, CONTAINERS)):
            return
        for part in PARTS if isinstance(thing, nn.Module) else ():
            self._follow(inside[part], owner)  # buffers that are replaced are no scratch
        if own != USER or _has_library_parts(cls):
            # what a framework's part of the user's class makes anew is scratch, unless the user's code names it
            self._container(inside, owner, max(holder(base.__module__) for base in cls.__mro__))
        else:
            self.sized.append((inside, owner))
        if own == USER:
            for name in inside:
                of_module = isinstance(thing, nn.Module) and (name.startswith("_") or name == "training")
                if of_module or name in self.names or self.names & DYNAMIC:
                    self._entry(inside, name, owner)

    def _container(self, container: Any, owner: str, held: int) -> None:
        if len(container) > LONGEST:
            self.sized.append((container, owner))
            return
        self.containers.append((container, owner, held == FRAMEWORK))
        for value in container.values() if isinstance(container, Mapping) else container:
            self._follow(value, f"an element of {owner}", held)

    def _entry(self, mapping: Mapping, name: str, owner: str) -> None:
        self.entries.append((mapping, name, owner))
        self._follow(mapping[name], f"{name!r} of {owner}")

    def _attribute(self, thing: Any, name: str, owner: str, held: int = USER) -> None:
        self.attributes.append((thing, name, owner))
        self._follow(read_attribute(thing, name), owner, held)


def read_attribute(thing: Any, name: str) -> Any:
    """The attribute, or `MISSING`: slots and cells may be empty."""
    try:
        return getattr(thing, name)
    except (AttributeError, ValueError):
        return MISSING


def _mentioned(code: CodeType) -> Iterator[str]:
    """Names and strings in the code of a function and of the functions in it: a string may be a name or a key."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, (tuple, frozenset)):
            yield from (part for part in constant if isinstance(part, str))
        elif isinstance(constant, CodeType):
            yield from _mentioned(constant)


def _imported(code: CodeType) -> Iterator[str]:
    """Modules that the code of a function imports when it runs."""
    yield from (step.argval for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _imported(constant)


def _slots(cls: type) -> list[str]:
    """Attributes that objects of a class keep outside of their `__dict__`."""
    found = [vars(base).get("__slots__", ()) for base in cls.__mro__ if not is_library(base.__module__)]
    names = [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]
    mangled = [f"_{cls.__name__.lstrip('_')}{n}" if n.startswith("__") and not n.endswith("__") else n for n in names]
    return [name for name in mangled if name not in ("__dict__", "__weakref__")]


def _has_library_parts(cls: type) -> bool:
    """Whether a library's code may read the attributes of the user's class, by names that the user's does not mention.

    What torch reads of a module begins with an underscore.
    """
    harmless = ("builtins", "abc", "typing", "enum", "torch.nn.modules.module", "pyro.nn.module")
    bases = [base for base in cls.__mro__ if is_library(base.__module__)]
    return any(base.__module__ not in harmless for base in bases)
