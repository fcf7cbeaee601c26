"""Watches what a function reads: whether anything is another object, or another number, than when it was recorded.

A recorded graph keeps what its run read besides tensors. So each replay asks first whether one of these has changed.
What is mutable is compared by identity, numbers and strings by value. Tensors are inputs of the graph, which reads
their values anew; only one that is replaced is a change.
"""

from __future__ import annotations

from typing import Any

from pyro_vae.compiled.reach import Reach
from pyro_vae.compiled.watched import Arrays, Attributes, Contents, Entries

__all__ = ["Watch"]


class Watch:
    """Remembers what some functions and objects can read (`pyro_vae.compiled.reach`), and says what has changed.

    Args:
        *roots: the functions, modules and other objects to start from.

    Attributes:
        tensors: that it can read, and a run may change in place.
        moving: what gives something else whenever it is read, such as an iterator, by name. None if nothing does.

    Example:
        >>> from types import SimpleNamespace
        >>> scaled = SimpleNamespace(beta=0.5)
        >>> watch = Watch(scaled)
        >>> scaled.beta = 0.6
        >>> watch.changed()
        "'beta' of SimpleNamespace"
    """

    def __init__(self, *roots: Any) -> None:
        found = Reach(*roots)
        self.moving, self.tensors = found.moving, found.tensors
        self._entries = Entries(found.entries)
        self._contents = Contents(found.containers, found.sized)
        self._parts = (self._entries, self._contents, Attributes(found.attributes), Arrays(found.arrays))

    def changed(self) -> str | None:
        """The name of something that has changed. None if nothing has."""
        for part in self._parts:
            if not part.is_identical():
                for name in part.changes():
                    return name
                part.remember()  # other objects, but the same numbers
        return None

    def changed_by_run(self) -> str | None:
        """As `changed`, where only a run of the functions can have changed something since the last look.

        What an object of a library makes anew in every run, such as the plates of an autoguide, is its scratch and no
        number that is read: it is not watched from now on.
        """
        self._entries.add(self._contents.drop_scratch())
        return self.changed()

    def restore(self) -> None:
        """Puts back what has changed."""
        for part in self._parts:
            if not part.is_identical():
                part.restore()
