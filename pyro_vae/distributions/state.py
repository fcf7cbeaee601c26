"""What a distribution holds: its tensors, whether one of them was changed in place, and copies of it.

A distribution that remembers something about its parameters, such as the noise of its last draw, has to forget it when
a parameter changes. torch counts the changes in place of every tensor, also those through a view.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.utils import lazy_property

__all__ = ["Copied", "computed", "tensors_of", "versions"]

HOLDERS = (torch.distributions.Distribution, Transform, nn.Module)


def tensors_of(*holders: Any) -> list[Tensor]:
    """The tensors that distributions, transforms and modules hold, and what is in these.

    Example:
        >>> loc, scale = torch.zeros(2), torch.ones(2)
        >>> len(tensors_of(torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)))
        2
    """
    found, seen, left = [], set(), list(holders)
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, HOLDERS):
            left += vars(thing).values()
        elif isinstance(thing, dict):
            left += thing.values()
        elif isinstance(thing, (list, tuple)):
            left += thing
        elif isinstance(thing, partial):
            left += [thing.func, thing.args, thing.keywords]
        elif isinstance(thing, MethodType):
            left.append(thing.__self__)
    return found


def versions(tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    """How often each tensor was changed in place. None where torch does not count, under `torch.inference_mode`.

    Example:
        >>> x = torch.zeros(2)
        >>> before = versions([x])
        >>> _ = x.add_(1)
        >>> versions([x]) == before
        False
    """
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple(tensor._version for tensor in tensors)


class computed(lazy_property):
    """A property that is computed each time, as parameters may change in place. Like torch's lazy properties, which are
    computed once, it is left out where torch validates the arguments of a distribution."""

    def __get__(self, instance: Any, obj_type: Any = None) -> Any:
        return self if instance is None else self.wrapped(instance)


class Copied:
    """A distribution with a deep copy: of values, without the graph that computed them, which torch cannot copy."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        for tensor in tensors_of(self):
            if not tensor.is_leaf and id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in vars(self).items():
            new.__dict__[name] = copy.deepcopy(value, memo)
        return new
