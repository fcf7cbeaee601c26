"""Batches: what a user calls data, as tuples of tensors on a device, in batches of rows."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_vae.pairs.checks import check_rows, check_support

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
        self.batch_size, self.device, self.name = batch_size, device, name
        self._integers: dict[int, np.dtype] = {}  # of numpy columns
        self.loader = data if isinstance(data, DataLoader) else None
        self.columns: list[Tensor | np.ndarray] = []
        self._largest = 0
        if self.loader is not None:
            self.num_rows = len(data.dataset) if hasattr(data.dataset, "__len__") else None
            return
        for i, column in enumerate(data if isinstance(data, (tuple, list)) else [data]):
            if not isinstance(column, (Tensor, np.ndarray)):
                raise TypeError(
                    f"{name}[{i}]: expected a tensor, a numpy array, a tuple of these or a DataLoader, got "
                    f"{type(column).__name__}. Try {_advice(column, name)}."
                )
            if isinstance(column, np.ndarray):
                if column.dtype.kind not in "fciub":
                    raise TypeError(
                        f"{name}[{i}]: expected an array of numbers, got one of dtype {column.dtype}. "
                        'Try x.astype("float32").'
                    )
                if column.dtype.kind in "iub":
                    self._integers[i] = column.dtype
                if not isinstance(column, np.memmap):
                    column = _tensor(column)
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

    @property
    def full_size(self) -> int:
        """Rows of most batches; only a last one has fewer."""
        if self.loader is not None:
            return self.loader.batch_size or self._largest
        return min(self.batch_size, self.num_rows)

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

    def explain(self, error: Exception) -> None:
        """Adds a note to an error of the model or guide on what these data may have to do with it."""
        for i, dtype in self._integers.items() if "dtype" in str(error) else ():
            error.add_note(f'{self.name}[{i}] is a numpy array of {dtype}. Try x.astype("float32").')
        if self.columns and self.columns[0].ndim == 1:
            n = self.num_rows
            error.add_note(
                f"{self.name}[0] has shape ({n},): {n} rows, each a number. Where the networks take vectors, try "
                f"x.reshape({n}, 1), or x.reshape(1, {n}) if it is one row."
            )

    def check(self, incomplete: Container[int] = ()) -> None:
        """Raises ValueError for rows that are not finite.

        The rows of a DataLoader cannot be checked in advance. In the columns `incomplete`, NaN stands for a missing
        value."""
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
            self._largest = max(self._largest, len(columns[0]))  # a batch sampler has no size of its own
            yield Batch(tuple(c if self.device is None else c.to(self.device) for c in columns), None)


def _advice(data: Any, name: str) -> str:
    """What to try instead of data of a type that is not accepted."""
    if isinstance(data, Dataset):
        return f"a DataLoader of it: DataLoader({name}, batch_size=128, shuffle=True)"
    if type(data).__name__ in ("DataFrame", "Series"):
        return f'{name}.to_numpy(dtype="float32")'
    if isinstance(data, dict):
        return "a tuple of its values, in the order of the arguments of model and guide"
    if isinstance(data, (str, bytes)) or data is None:
        return "a tensor of rows, as torch.load or numpy.load read from a file"
    return "torch.as_tensor(…)"


def _tensor(x: Tensor | np.ndarray) -> Tensor:
    if isinstance(x, Tensor):
        return x
    x = torch.from_numpy(np.ascontiguousarray(x) if x.flags.writeable else np.array(x))
    return x.to(torch.get_default_dtype()) if x.is_floating_point() else x
