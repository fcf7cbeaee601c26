"""Constants: tensors that each run makes alike, such as indices and masks of them. Their values may be read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Constants"]

MAKES_CONSTANTS = (torch.arange, torch.eye, torch.full, torch.ones, torch.zeros, torch.tril_indices, torch.triu_indices)
DRAWS = frozenset(  # parts of names
    {
        *("bernoulli", "cauchy", "dropout", "exponential", "geometric"),
        *("multinomial", "normal", "poisson", "rand", "uniform"),
    }
)
WRITES = {"__set__", "__setitem__", *(f"__i{n}__" for n in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod"))}
WRITES |= {f"__i{n}__" for n in ("pow", "and", "or", "xor", "lshift", "rshift")}


class Constants:
    """Keeps track of the tensors that are made of constants only, while a run is handled function by function."""

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}  # kept alive, so that no other tensor gets their id

    def has(self, tensor: Tensor) -> bool:
        """Whether this tensor is one."""
        return id(tensor) in self._tensors

    def note(self, func: Any, tensors: list[Tensor], result: Any, out: Any) -> None:
        """Notes a function that was called.

        Args:
            func: the function.
            tensors: among its arguments, the one that it may write to first.
            result: what it returned.
            out: tensors that it was told to write to.
        """
        name = getattr(func, "__name__", "")
        constant = all(map(self.has, tensors)) and not any(part in name for part in DRAWS)
        if not tensors:
            constant = func in MAKES_CONSTANTS
        if constant and out is None:
            self._tensors.update({id(t): t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)})
        elif out is not None or name in WRITES or (name.endswith("_") and not name.endswith("__")):
            written = {_memory(t) for t in (*tensors[:1], *pytree.tree_leaves(out)) if isinstance(t, Tensor)}
            self._tensors = {i: t for i, t in self._tensors.items() if _memory(t) not in written}  # views too


def _memory(tensor: Tensor) -> int:
    """Where the elements of a tensor and of its views are."""
    return tensor.untyped_storage().data_ptr()
