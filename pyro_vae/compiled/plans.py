"""Calls of a loss, taken apart, and the recordings that answer them.

A recording answers a call that has the same signature: model and guide, the nesting of the arguments, the shape,
strides, dtype and device of each tensor, and each other argument. It holds as long as what it was made from stays the
same: the parameters, their properties, and what `watch.py` watches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vae.compiled.recording import Graph
from pyro_vae.compiled.watch import Watch

__all__ = ["Call", "Plan", "call_of"]


@dataclass
class Plan:
    """A recording and what it depends on.

    Args:
        graph: of loss and gradients.
        watch: on what the recorded run can have read.
        stored: {name: unconstrained tensor} of the parameters in Pyro's store that the run used.
        kept: arguments that are compared by identity. They are kept alive, so that no other object gets their id.
    """

    graph: Graph
    watch: Watch
    stored: dict[str, Tensor]
    kept: Any

    def __post_init__(self) -> None:
        self.properties = self._properties()

    def holds(self) -> bool:
        """Whether a replay would do what a run would do now."""
        params = dict(pyro.get_param_store().named_parameters())
        return (
            all(params.get(name) is t for name, t in self.stored.items())
            and self._properties() == self.properties
            and self.watch.changed() is None
        )

    def _properties(self) -> list[tuple]:
        """What a user may change about a tensor without replacing it, such as freezing it or moving it to a device."""
        return [(t.requires_grad, t.device, t.dtype, t.shape) for t in self.graph.tensors]


class Call(NamedTuple):
    """A call of a loss, taken apart.

    Attributes:
        key: the signature; it begins with model, guide and the nesting of the arguments.
        leaves: the arguments without their nesting.
        inputs: those of them that are tensors or floats, as tensors.
        static: all others.
        plan: the recording that answers the call, if there is one.
    """

    key: tuple
    leaves: list[Any]
    inputs: list[Tensor]
    static: list[Any]
    plan: Plan | None = None

    def arguments(self, inputs: tuple[Tensor, ...]) -> tuple[tuple, dict[str, Any]]:
        """The nested arguments, with other `inputs`."""
        own, rest = iter(inputs), iter(self.static)
        leaves = [next(own) if isinstance(leaf, (Tensor, float)) else next(rest) for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.key[2])


def call_of(model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> Call | None:
    """Takes a call apart. None if an argument allows no recording.

    Such arguments are tensors that require a gradient, and numpy arrays, whose values nobody watches.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    inputs: list[Tensor] = []
    static: list[Any] = []
    device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), None)
    for leaf in leaves:
        if isinstance(leaf, float):
            leaf = torch.tensor(leaf, device=device)  # an input, as it may be annealed
        (inputs if isinstance(leaf, Tensor) else static).append(leaf)
    if any(t.requires_grad for t in inputs) or any(isinstance(a, np.ndarray) for a in static):
        return None
    constants = tuple((type(a), a if isinstance(a, (bool, int, str, type(None))) else id(a)) for a in static)
    shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
    return Call((model, guide, spec, shapes, constants), leaves, inputs, static)
