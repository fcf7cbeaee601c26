"""Calls of a loss, taken apart, and the recordings that answer them.

A recording answers a call that has the same signature: the nesting of the arguments, the shape, strides, dtype and
device of each tensor, and each other argument. It holds as long as what it was made from stays the same: the
parameters, their properties, and what `watch.py` watches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vae.compiled.audit import Audit
from pyro_vae.compiled.recording import Graph
from pyro_vae.compiled.watch import Watch

__all__ = ["Call", "Plan", "call_of"]

SETTINGS = [name for name in pyro.settings.get() if not name.startswith("validate")]  # of Pyro: those of numbers
PAYS_AFTER = (
    1000  # replays of a recording, if it is not the only one: as numbers or shapes change, it may not live long
)


@dataclass
class Plan:
    """A recording and what it depends on.

    Args:
        graph: of loss and gradients.
        watch: on what the recorded run can have read.
        stored: {name: unconstrained tensor} of the parameters in Pyro's store that the run used.
        kept: arguments that are compared by identity. They are kept alive, so that no other object gets their id.
        first: whether it is the first recording of its pair.
        audit: holds it against plain Pyro.

    Attributes:
        in_a_row: whether it answered the call before, too.
        last: number of the replay that was its last one.
    """

    graph: Graph
    watch: Watch
    stored: dict[str, Tensor]
    kept: Any
    first: bool
    audit: Audit

    def __post_init__(self) -> None:
        self.properties = self._properties()
        self.in_a_row, self.last = False, 0

    def change(self) -> str | None:
        """What is not as it was when this was recorded. None if a replay does what a run would do now."""
        params = dict(pyro.get_param_store().named_parameters())
        for name, tensor in self.stored.items():
            if params.get(name) is not tensor:
                return f"parameter {name!r}"
        if not self.graph.reads_the_same():
            return "the value of a tensor that is read"
        return "a tensor's properties" if self._properties() != self.properties else self.watch.changed()

    @property
    def pays(self) -> bool:
        """Whether it is worth code of its own, which takes seconds to generate."""
        return (self.first and self.in_a_row) or self.audit.replays >= PAYS_AFTER

    def _properties(self) -> list[tuple]:
        """What a user may change about a tensor without replacing it, such as freezing it or moving it to a device."""
        return [(t.requires_grad, t.device, t.dtype, t.shape, _hooks(t)) for t in self.graph.tensors]


class Call(NamedTuple):
    """A call of a loss, taken apart.

    Attributes:
        method: of the objective that is called: "loss_and_grads" or "differentiable_loss".
        args: positional arguments.
        kwargs: named arguments.
        key: the signature.
        spec: the nesting of the arguments.
        leaves: the arguments without their nesting.
        is_input: which of these are inputs of a graph: tensors, and floats that change from call to call.
        inputs: these, as tensors.
        static: all others.
        plan: the recording that answers the call, if there is one.
    """

    method: str
    args: tuple
    kwargs: dict[str, Any]
    key: tuple
    spec: pytree.TreeSpec
    leaves: list[Any]
    is_input: list[bool]
    inputs: list[Tensor]
    static: list[Any]
    plan: Plan | None = None

    def with_inputs(self, inputs: tuple[Tensor, ...]) -> tuple[tuple, dict[str, Any]]:
        """The nested arguments, with other `inputs`."""
        own, rest = iter(inputs), iter(self.static)
        leaves = [next(own) if is_input else next(rest) for is_input in self.is_input]
        return pytree.tree_unflatten(leaves, self.spec)


def call_of(method: str, args: tuple, kwargs: dict[str, Any], moving_floats: bool) -> Call | None:
    """Takes a call apart. None if an argument allows no recording.

    Such arguments are tensors that require a gradient, and numpy arrays, which may change in place.

    Args:
        method: of the objective.
        args: positional arguments.
        kwargs: named arguments.
        moving_floats: whether floats change from call to call and so are inputs, with the precision of the tensors.
            Otherwise a recording keeps them, as exact and as ready to take any dtype as they are.
    """
    leaves, spec = _flatten(args, kwargs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    inputs, is_input = tensors, [isinstance(leaf, Tensor) for leaf in leaves]
    if moving_floats:
        device = tensors[0].device if tensors else None
        dtype = torch.get_default_dtype()
        for t in tensors:
            dtype = torch.promote_types(dtype, t.dtype) if t.is_floating_point() else dtype
        is_input = [isinstance(leaf, (Tensor, float)) for leaf in leaves]
        inputs = [
            leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, device=device, dtype=dtype)
            for leaf, own in zip(leaves, is_input, strict=True)
            if own
        ]
    static = [leaf for leaf, own in zip(leaves, is_input, strict=True) if not own]
    if any(t.requires_grad for t in inputs) or any(isinstance(a, np.ndarray) for a in static):
        return None
    constants = tuple((type(a), _value(a)) for a in static)
    shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
    modes = (torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    settings = tuple(map(pyro.settings.get, SETTINGS))
    key = (method, spec, shapes, constants, modes, settings)
    return Call(method, args, kwargs, key, spec, leaves, is_input, inputs, static)


def _flatten(args: tuple, kwargs: dict[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
    """The arguments without their nesting, and the nesting, which is known where there is none."""
    if not kwargs and all(type(a) is Tensor for a in args):
        return list(args), _flat(len(args))
    return pytree.tree_flatten((args, kwargs))


@lru_cache(maxsize=64)
def _flat(size: int) -> pytree.TreeSpec:
    return pytree.tree_flatten(((0,) * size, {}))[1]


def _hooks(tensor: Tensor) -> tuple | None:
    """The hooks of a tensor's gradient, by identity. They may be added, changed and taken away."""
    hooks = tensor._backward_hooks
    return tuple(map(id, hooks.values())) if hooks else None


def _value(constant: Any) -> Any:
    """What a constant is told by: its value, where it has one that cannot change, else its identity."""
    if isinstance(constant, float):
        return constant.hex()  # of which NaN is equal to itself, and −0 is not 0
    return constant if isinstance(constant, (bool, int, str, type(None))) else id(constant)
