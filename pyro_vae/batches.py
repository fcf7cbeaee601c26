"""Batches: what a user calls data, as tuples of tensors on a device, in batches of rows."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_vae.checks import check_rows, check_support

__all__ = ["Batch", "Batches"]


class Batch(NamedTuple):
    """Rows of the data, and their indices where these are known."""

    inputs: tuple[Tensor, ...]
    rows: Tensor | None

    @property
    def size(self) -> int:
        return len(self.inputs[0])


class Batches:
    """Data as batches of rows.

    Args:
        data: a tensor, a numpy array or memory map, a tuple or list of these with equal first dimensions, or a torch
            `DataLoader`. Floating numpy arrays are converted to torch's default dtype.
        batch_size: rows of a batch; the last one may be smaller.
        device: where the tensors go. Tensors move once; memory maps and DataLoaders batch by batch.
        name: the argument's name, for messages.

    Example:
        >>> batches = Batches((torch.arange(5.0), torch.zeros(5, 2)), 2)
        >>> [batch.size for batch in batches]
        [2, 2, 1]
    """

    def __init__(self, data: Any, batch_size: int, device: torch.device | None = None, name: str = "data") -> None:
        self.batch_size, self.device = batch_size, device
        self.loader = data if isinstance(data, DataLoader) else None
        self.columns: list[Tensor | np.ndarray] = []
        if self.loader is not None:
            self.num_rows = len(data.dataset) if hasattr(data.dataset, "__len__") else None
            return
        for i, column in enumerate(data if isinstance(data, (tuple, list)) else [data]):
            if isinstance(column, np.ndarray) and not isinstance(column, np.memmap):
                column = _tensor(column)
            if not isinstance(column, (Tensor, np.memmap)):
                raise TypeError(
                    f"{name}[{i}]: expected a tensor, a numpy array, a tuple of these or a DataLoader, got "
                    f"{type(column).__name__}. Try torch.as_tensor(…)."
                )
            if not column.ndim:
                raise ValueError(f"{name}[{i}]: expected rows, got a scalar. Try to add a first dimension.")
            self.columns.append(column)
        sizes = [len(c) for c in self.columns]
        if not sizes or min(sizes) == 0:
            raise ValueError(f"{name} is empty: expected at least one row, got {sizes} rows.")
        if len(set(sizes)) > 1:
            raise ValueError(f"{name}: expected as many rows in each tensor of the tuple, got {sizes}.")
        self.num_rows = sizes[0]
        self.to(device)

    @property
    def num_batches(self) -> int | None:
        """Of an epoch, where that is known."""
        if self.loader is not None:
            return len(self.loader) if self.num_rows is not None else None
        return -(-self.num_rows // self.batch_size)

    def to(self, device: torch.device | None) -> Batches:
        """Moves the data, or says where each batch is to go."""
        self.device = device
        self.columns = [c.to(device) if isinstance(c, Tensor) and device is not None else c for c in self.columns]
        return self

    def __iter__(self) -> Iterator[Batch]:
        """Batches in order."""
        if self.loader is not None:
            yield from self._loaded()
        else:
            for start in range(0, self.num_rows, self.batch_size):
                yield self.at(torch.arange(start, min(start + self.batch_size, self.num_rows)))

    def shuffled(self) -> Iterator[Batch]:
        """Batches in random order (a DataLoader shuffles as it was told to)."""
        if self.loader is not None:
            yield from self._loaded()
        else:
            device = next((c.device for c in self.columns if isinstance(c, Tensor)), None)
            for rows in torch.randperm(self.num_rows, device=device).split(self.batch_size):
                yield self.at(rows)

    def check(self, incomplete: Container[int] = ()) -> None:
        """Raises ValueError for rows that are not finite; those of a DataLoader cannot be looked at beforehand.
        `incomplete` are the columns in which NaN stands for a missing value."""
        for start in range(0, self.num_rows if self.columns else 0, 8192):
            rows = [_tensor(c[start : min(start + 8192, self.num_rows)]) for c in self.columns]
            check_rows(rows, start=start, incomplete=[x for i, x in enumerate(rows) if i in incomplete])

    def check_column(self, column: int, name: str, site: dict) -> None:
        """Raises ValueError for rows of a column outside the support of the trace's site that observes it."""
        for start in range(0, self.num_rows if self.columns else 0, 8192):
            value = _tensor(self.columns[column][start : start + 8192])
            check_support(name, site | {"value": value}, start=start)

    def at(self, rows: Tensor) -> Batch:
        """The batch of these rows."""
        inputs = []
        for column in self.columns:
            if isinstance(column, Tensor):
                x = column.index_select(0, rows.to(column.device))
            else:
                x = _tensor(column[rows.cpu().numpy()])
            inputs.append(x if self.device is None else x.to(self.device))
        return Batch(tuple(inputs), rows)

    def _loaded(self) -> Iterator[Batch]:
        for batch in self.loader:
            columns = batch if isinstance(batch, (tuple, list)) else [batch]
            yield Batch(tuple(c if self.device is None else c.to(self.device) for c in columns), None)


def _tensor(x: Tensor | np.ndarray) -> Tensor:
    if isinstance(x, Tensor):
        return x
    x = torch.from_numpy(np.ascontiguousarray(x) if x.flags.writeable else np.array(x))
    return x.to(torch.get_default_dtype()) if x.is_floating_point() else x
