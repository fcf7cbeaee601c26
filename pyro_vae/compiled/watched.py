"""Parts of what is watched: each knows how it was, whether it still is, and how to put it back.

The question is asked in every step. So it is first answered by a few loops in C over what is the very same object, and
only where something is not, one by one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import chain
from math import copysign
from operator import getitem, is_
from types import MethodType
from typing import Any

import numpy as np

from pyro_vae.compiled.reach import MISSING, NUMBERS, read_attribute

__all__ = ["Arrays", "Attributes", "Contents", "Entries"]

LARGEST_ARRAY = 2**20  # bytes of a NumPy array that is compared with a copy


class Entries:
    """Single values of namespaces: dicts, and classes."""

    def __init__(self, entries: list[tuple[Any, str, str]]) -> None:
        self.entries = entries
        self.remember()

    def remember(self) -> None:
        self.spaces = [vars(space) if isinstance(space, type) else space for space, _, _ in self.entries]
        self.keys = [key for _, key, _ in self.entries]
        self.values = list(map(getitem, self.spaces, self.keys))

    def add(self, entries: list[tuple[Any, str, str, Any]]) -> None:
        """Adds entries, with the values that they had."""
        for space, key, owner, value in entries:
            self.entries.append((space, key, owner))
            self.spaces.append(space)
            self.keys.append(key)
            self.values.append(value)

    def is_identical(self) -> bool:
        try:
            return all(map(is_, map(getitem, self.spaces, self.keys), self.values))
        except KeyError:
            return False

    def changes(self) -> Iterator[str]:
        for space, value, (_, key, owner) in zip(self.spaces, self.values, self.entries, strict=True):
            if not _same(space.get(key, MISSING), value):
                yield f"{key!r} of {owner}"

    def restore(self) -> None:
        for space, value, (target, key, _) in zip(self.spaces, self.values, self.entries, strict=True):
            if space.get(key, MISSING) is value:
                continue
            if isinstance(target, type):
                setattr(target, key, value)
            else:
                target[key] = value


class Contents:
    """All elements of containers, and how many names some namespaces have."""

    def __init__(self, containers: list[tuple[Any, str, bool]], sized: list[tuple[Any, str]]) -> None:
        self.containers = [(*entry, _copy(entry[0])) for entry in containers]
        self.sized = [vars(space) if isinstance(space, type) else space for space, _ in sized]
        self.owners = [owner for _, owner in sized]
        self.remember()

    def remember(self) -> None:
        self.containers = [(*entry, _copy(entry[0])) for *entry, _ in self.containers]
        self._flatten()

    def _flatten(self) -> None:
        before = [copy for *_, copy in self.containers]
        self.elements = list(chain.from_iterable(chain.from_iterable(map(_views, before))))
        filled = [container for container, _, _, copy in self.containers if copy]
        self.views = list(chain.from_iterable(map(_views, filled)))  # live ones
        self.spaces = [*(container for container, *_ in self.containers), *self.sized]
        self.sizes = list(map(len, self.spaces))

    def is_identical(self) -> bool:
        same = list(map(len, self.spaces)) == self.sizes
        return same and all(map(is_, chain.from_iterable(self.views), self.elements))

    def changes(self) -> Iterator[str]:
        for container, owner, _, copy in self.containers:
            for key in _differences(container, copy):
                yield f"{key!r} of {owner}" if isinstance(container, Mapping) else f"an element of {owner}"
        sizes = self.sizes[len(self.containers) :]
        for space, before, owner in zip(self.sized, sizes, self.owners, strict=True):
            if len(space) != before:
                yield f"an attribute of {owner}"

    def drop_scratch(self) -> list[tuple[Any, str, str, Any]]:
        """Drops the containers of libraries in which objects were replaced; returns their entries that were not."""
        kept, left = [], []
        for container, owner, library, copy in self.containers:
            differ = _differences(container, copy) if library else []
            if not differ:
                kept.append((container, owner, library, copy))
            elif isinstance(container, Mapping):
                named = {key: value for key, value in copy.items() if key not in differ or isinstance(value, NUMBERS)}
                left += [(container, key, owner, value) for key, value in named.items()]
        if len(kept) < len(self.containers):
            self.containers = kept
            self._flatten()
        return left

    def restore(self) -> None:
        for container, _, _, copy in self.containers:
            if isinstance(container, (dict, set, list, deque)) and _differences(container, copy):
                container.clear()
                container.extend(copy) if isinstance(container, (list, deque)) else container.update(copy)


class Attributes:
    """What only `getattr` reads: slots, cells of closures, the code and defaults of functions."""

    def __init__(self, attributes: list[tuple[Any, str, str]]) -> None:
        self.things, self.names = [thing for thing, _, _ in attributes], [name for _, name, _ in attributes]
        self.owners = [owner for _, _, owner in attributes]
        self.remember()

    def remember(self) -> None:
        self.values = list(map(read_attribute, self.things, self.names))

    def is_identical(self) -> bool:
        return all(map(is_, map(read_attribute, self.things, self.names), self.values))

    def changes(self) -> Iterator[str]:
        for thing, name, value, owner in zip(self.things, self.names, self.values, self.owners, strict=True):
            if not _same(read_attribute(thing, name), value):
                yield owner

    def restore(self) -> None:
        for thing, name, value in zip(self.things, self.names, self.values, strict=True):
            if read_attribute(thing, name) is not value:
                delattr(thing, name) if value is MISSING else setattr(thing, name, value)


class Arrays:
    """Elements of NumPy arrays, if these are small."""

    def __init__(self, arrays: list[tuple[np.ndarray, str]]) -> None:
        self.arrays = [array for array, _ in arrays if array.nbytes <= LARGEST_ARRAY]
        self.owners = [owner for array, owner in arrays if array.nbytes <= LARGEST_ARRAY]
        self.remember()

    def remember(self) -> None:
        self.copies = [array.copy() for array in self.arrays]
        self.bytes = [array.tobytes() for array in self.arrays]

    def is_identical(self) -> bool:
        return [array.tobytes() for array in self.arrays] == self.bytes

    def changes(self) -> Iterator[str]:
        for array, before, owner in zip(self.arrays, self.bytes, self.owners, strict=True):
            if array.tobytes() != before:
                yield owner

    def restore(self) -> None:
        for array, before in zip(self.arrays, self.copies, strict=True):
            array[...] = before


def _same(now: Any, before: Any) -> bool:
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, NUMBERS):
        if isinstance(now, float) and now == 0:
            return before == 0 and copysign(1, now) == copysign(1, before)
        return bool(now == before or (now != now and before != before))  # NaN is as it was
    return isinstance(now, MethodType) and now == before


def _copy(container: Any) -> Any:
    """Its elements: a dict, else a list."""
    return dict(container) if isinstance(container, Mapping) else list(container)


def _views(container: Any) -> tuple:
    return (container.keys(), container.values()) if isinstance(container, Mapping) else (container,)


def _differences(container: Any, copy: Any) -> list:
    """Keys, or places, of elements that are not what they were."""
    if isinstance(container, Mapping):
        gone = [key for key, value in copy.items() if not _same(container.get(key, MISSING), value)]
        moved = [key for key, before in zip(container, copy, strict=False) if key is not before and key != before]
        return gone or [key for key in container if key not in copy] or moved[:1]  # or they have another order
    if len(container) != len(copy):
        return [None]
    return [i for i, (now, before) in enumerate(zip(container, copy, strict=True)) if not _same(now, before)]
