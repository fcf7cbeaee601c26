"""`Handler`: the torch operations that a recorded run performs in another way, or may not perform at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pyro_vae.compiled.constants import Constants
from pyro_vae.compiled.frames import caller, in_pair, only_raises
from pyro_vae.compiled.untraceable import Untraceable
from pyro_vae.pairs.parameters import graph_leaves

__all__ = ["Gradients", "Handler"]

# Pyro's own code reads some values that it does not act upon. Pyro cannot ask `is_recording()`, as our code does, so
# these reads are known by the module they stand in.
# prefixes of modules that read the `item` of a loss, to add it up and return it
REPORTS_LOSSES = ("pyro.infer.", "pyro.distributions.util", "pyro_vae.objectives.")
WARNS_OF_NAN = ("pyro.util", "pyro.infer.util", "pyro.distributions.util")  # `bool` of a test for NaN, only to warn
SUMS_FACTORS = "pyro.infer.util"  # `masked_select` of factors whose sum is all that counts

READS_VALUES = (Tensor.numpy, Tensor.tolist, Tensor.__array__)
READS_ONE = (Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__)
SELECTS = (Tensor.__getitem__, Tensor.__setitem__)
COUNTS = (torch.nonzero, Tensor.nonzero, torch.masked_select, Tensor.masked_select, torch.unique, Tensor.unique)


class Gradients(TorchFunctionMode):
    """Collects gradients instead of adding them to `.grad`.

    Attributes:
        gradients: {leaf: gradient}, summed over all calls of `Tensor.backward`.
        weight: what each `Tensor.backward` multiplies its tensor by.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gradients: dict[Tensor, Tensor] = {}
        self.weight: Tensor | None = None
        self._made: dict[int, Tensor] = {}  # leaves that the function makes for itself: their gradients are not wanted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            kwargs = {name: value for name, value in (kwargs or {}).items() if name != "inputs"}
            return self._backward(*args, **kwargs)
        if func is Tensor.requires_grad_:
            self._made[id(args[0])] = args[0]
        return func(*args, **(kwargs or {}))

    def _backward(
        self, loss: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: Any = False
    ) -> None:
        leaves = [leaf for leaf in graph_leaves(loss) if id(leaf) not in self._made]
        if not leaves:
            return
        if self.weight is not None and gradient is None:
            gradient = self.weight.to(loss)
        found = torch.autograd.grad(loss, leaves, gradient, retain_graph, create_graph, allow_unused=True)
        for leaf, grad in zip(leaves, found, strict=True):
            if grad is not None:
                self.gradients[leaf] = self.gradients[leaf] + grad if leaf in self.gradients else grad


class Handler(Gradients):
    """Collects gradients, answers Pyro's harmless reads, and refuses all other reads.

    Attributes:
        reads: (function, tensor, value): values of tensors from outside that the run has read, and kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[Callable, Tensor, Any]] = []
        self._constants = Constants()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            if in_pair():
                raise Untraceable("it takes gradients of its own")
            return super().__torch_function__(func, types, args, kwargs)
        if func is Tensor.item and caller().startswith(REPORTS_LOSSES):
            return args[0].detach().double()  # Pyro adds these up as Python's floats
        if func is Tensor.__bool__ and caller() in WARNS_OF_NAN:
            return False
        if func is Tensor.register_hook and getattr(args[1], "__module__", "") in WARNS_OF_NAN:
            return None
        if func is Tensor.masked_select and caller() == SUMS_FACTORS:
            return torch.where(args[1], args[0], 0).reshape(-1)  # a zero in place of a gap leaves the sum as it is
        if func is Tensor.requires_grad_:
            self._made[id(args[0])] = args[0]
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        constant = all(map(self._constants.has, tensors))
        if func in READS_ONE and (constant or only_raises(func)):
            with disable_proxy_modes_tracing():
                return func(*args)
        if not constant:
            self._refuse_values(func, args)
        if func in READS_ONE:  # raises if the recorded run has computed the tensor
            self.reads.append((func, args[0], func(*args)))
            return self.reads[-1][2]
        result = func(*args, **(kwargs or {}))
        self._constants.note(func, tensors, result, (kwargs or {}).get("out"))
        return result

    def _refuse_values(self, func: Any, args: Any) -> None:
        """Raises Untraceable for what depends on the values of tensors."""
        if func in READS_VALUES:
            raise Untraceable(f"{func.__name__} reads a value")
        masks = [
            t
            for t in (pytree.tree_leaves(args[1]) if func in SELECTS else ())
            if isinstance(t, Tensor) and t.dtype == torch.bool and not self._constants.has(t)
        ]
        if masks or func in COUNTS:
            raise Untraceable("how many elements are selected may be another number in each call")
