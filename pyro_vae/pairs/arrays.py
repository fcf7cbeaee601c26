"""Arguments that have rows: tensors, and NumPy arrays, which models and guides get as tensors.

Arrays in memory become tensors at once. Memory maps stay on disk, and only the rows that are asked for are read and
converted, so that memory does not depend on the size of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_vae.pairs.modes import owners

__all__ = [
    "as_tensor",
    "device_of",
    "each",
    "has_rows",
    "is_array",
    "is_on_disk",
    "on_device",
    "slices",
    "unless_on_disk",
]

SLICE_BYTES = 8 * 2**20  # of rows that are looked at together


def is_array(x: Any) -> bool:
    """Whether this is a NumPy array of numbers."""
    return isinstance(x, np.ndarray) and x.dtype.kind in "fciub"


def has_rows(x: Any) -> bool:
    """Whether this is a tensor, or an array of numbers, with a first dimension."""
    return (isinstance(x, Tensor) or is_array(x)) and x.ndim > 0


def is_on_disk(x: Any) -> bool:
    """Whether this is a memory map, or a view of one."""
    while isinstance(x, np.ndarray):
        if isinstance(x, np.memmap):
            return True
        x = x.base
    return False


def as_tensor(x: Any, device: torch.device | None = None) -> Any:
    """An array of numbers as a tensor: floats in torch's default dtype, integers as they are. Others pass through."""
    if not is_array(x):
        return x
    own = x.dtype.newbyteorder("=")  # torch has no other order of bytes
    made = torch.from_numpy(np.array(x, own) if not x.flags.writeable else np.ascontiguousarray(x, own))
    return made.to(device=device, dtype=torch.get_default_dtype() if made.is_floating_point() else None)


def unless_on_disk(x: Any, device: torch.device | None = None) -> Any:
    """As `as_tensor`, but for memory maps, whose rows are converted when they are needed."""
    return x if is_on_disk(x) else as_tensor(x, device)


def each(
    convert: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], device: torch.device | None
) -> tuple[tuple, dict[str, Any]]:
    """Arguments, each converted for a device."""
    return tuple(convert(a, device) for a in args), {name: convert(a, device) for name, a in kwargs.items()}


def on_device(x: Any, device: torch.device | None) -> Any:
    """What a DataLoader yields, with its tensors and arrays, also in dicts, tuples and lists, as tensors there."""
    if isinstance(x, dict):
        return {key: on_device(value, device) for key, value in x.items()}
    if type(x) in (tuple, list):
        return type(x)(on_device(value, device) for value in x)
    x = as_tensor(x)
    return x.to(device) if isinstance(x, Tensor) and device is not None else x


def slices(columns: Sequence[Tensor | np.ndarray], most: int = SLICE_BYTES) -> Iterator[slice]:
    """All rows of some columns, in slices of bounded size, whatever a row weighs."""
    if not columns:
        return
    weight = sum(prod(c.shape[1:]) * c.itemsize for c in columns)
    size, num_rows = max(1, most // max(1, weight)), len(columns[0])
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def device_of(model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> torch.device | None:
    """Where arguments belong that are on no device yet: with the other arguments, the modules, Pyro's parameters."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    known = next((p for owner in owners(model, guide) for p in owner.parameters()), None)
    if not tensors and known is None:
        known = next((p for _, p in pyro.get_param_store().named_parameters()), None)
    return tensors[0].device if tensors else None if known is None else known.device
