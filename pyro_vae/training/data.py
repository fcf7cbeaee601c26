"""Batches: what a user calls data, as tuples of tensors on a device, in batches of rows."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_vae.pairs.checks import check_rows, check_support

__all__ = ["Batch", "Batches"]


class Batch(NamedTuple):
    """What model and guide are called with for some rows, and the indices of these where they are known."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: Tensor | None

    @property
    def size(self) -> int:
        return next(len(x) for x in (*self.args, *self.kwargs.values()) if _has_rows(x))


class Batches:
    """Data as batches of rows.

    Args:
        data: a tensor, a numpy array or memory map, a tuple, list or dict of these with equal first dimensions, or a
            torch `DataLoader`. Floating numpy arrays are converted to torch's default dtype.
        batch_size: rows of a batch; the last one may be smaller.
        device: where the tensors go. Tensors move once; memory maps and DataLoaders batch by batch.
        name: the argument's name, for messages.

    Attributes:
        in_order: whether the rows stay in their order. Set where there are parameters for each of them.

    Example:
        >>> batches = Batches((torch.arange(5.0), torch.zeros(5, 2)), 2)
        >>> [batch.size for batch in batches]
        [2, 2, 1]
        >>> [batch.kwargs for batch in Batches({"x": torch.arange(3.0)}, 2)]
        [{'x': tensor([0., 1.])}, {'x': tensor([2.])}]
    """

    def __init__(self, data: Any, batch_size: int, device: torch.device | None = None, name: str = "data") -> None:
        self.batch_size, self.device, self.name = batch_size, device, name
        self.in_order = False
        self._integers: dict[int | str, np.dtype] = {}  # of numpy columns
        self.loader = data if isinstance(data, DataLoader) else None
        self.columns: list[Tensor | np.ndarray] = []
        self.keys: list[int | str] = []  # of the columns: positions, or names of keyword arguments
        self._largest = 0
        if self.loader is not None:
            self.num_rows = len(data.dataset) if hasattr(data.dataset, "__len__") else None
            return
        several = isinstance(data, (tuple, list, dict))
        items = data.items() if isinstance(data, dict) else enumerate(data if several else [data])
        for key, column in items:
            self.keys.append(key)
            self.columns.append(self._column(key, column, several))
        sizes = [len(c) for c in self.columns]
        if not sizes or min(sizes) == 0:
            raise ValueError(f"{name} is empty: expected at least one row, got {sizes} rows. Try a tensor of rows.")
        if len(set(sizes)) > 1:
            of = "the dict" if isinstance(data, dict) else "the tuple"
            raise ValueError(
                f"{name}: expected as many rows in each tensor of {of}, got {sizes}. Try functools.partial(model, …), "
                "and the same of guide, for what all rows share."
            )
        self.num_rows = sizes[0]
        self.to(device)

    def _column(self, key: int | str, column: Any, several: bool) -> Tensor | np.ndarray:
        where = f"{self.name}[{key!r}]"
        if not isinstance(column, (Tensor, np.ndarray)):
            raise TypeError(
                f"{where}: expected a tensor, a numpy array, a tuple or dict of these or a DataLoader, got "
                f"{type(column).__name__}. Try {_advice(column, self.name, several)}."
            )
        if isinstance(column, np.ndarray):
            if column.dtype.kind not in "fciub":
                raise TypeError(
                    f'{where}: expected an array of numbers, got one of dtype {column.dtype}. Try x.astype("float32").'
                )
            if column.dtype.kind in "iub":
                self._integers[key] = column.dtype
            if not isinstance(column, np.memmap):
                column = _tensor(column)
        if not column.ndim:
            raise ValueError(
                f"{where}: expected rows, got a scalar. Try to add a first dimension, or functools.partial(model, …), "
                "and the same of guide, for what all rows share."
            )
        return column

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
        """Batches in random order, unless they keep their order (a DataLoader shuffles as it was told to)."""
        if self.loader is not None:
            yield from self._loaded()
        elif self.in_order:
            yield from self
        else:
            device = next((c.device for c in self.columns if isinstance(c, Tensor)), None)
            for rows in torch.randperm(self.num_rows, device=device).split(self.batch_size):
                yield self.at(rows)

    def first(self) -> Batch:
        """The first batch.

        Raises:
            ValueError: a DataLoader yields none.
        """
        batch = next(iter(self), None)
        if batch is None:
            raise ValueError(
                f"{self.name}: expected a DataLoader that yields batches, got one that yields none. Try "
                "drop_last=False, or a smaller batch_size."
            )
        return batch

    def explain(self, error: Exception) -> None:
        """Adds a note to an error of the model or guide on what these data may have to do with it."""
        for key, dtype in self._integers.items() if "dtype" in str(error) else ():
            error.add_note(f'{self.name}[{key!r}] is a numpy array of {dtype}. Try x.astype("float32").')
        names = [repr(key) for key in self.keys if isinstance(key, str)]
        if names and "argument" in str(error):
            error.add_note(
                f"{self.name} is a dict: model and guide are called with the keyword arguments {', '.join(names)}."
            )
        if self.columns and self.columns[0].ndim == 1:
            n = self.num_rows
            error.add_note(
                f"{self.name}[{self.keys[0]!r}] has shape ({n},): {n} rows, each a number. Where the networks take "
                f"vectors, try x.reshape({n}, 1), or x.reshape(1, {n}) if it is one row."
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
            with suppress(RuntimeError):  # a support that each row has of its own, as of Uniform(0, high(z))
                check_support(name, site | {"value": value}, start=start)

    def at(self, rows: Tensor) -> Batch:
        """The batch of these rows."""
        values = []
        for column in self.columns:
            if isinstance(column, Tensor):
                x = column.index_select(0, rows.to(column.device))
            else:
                x = _tensor(column[rows.cpu().numpy()])
            values.append(x if self.device is None else x.to(self.device))
        if any(isinstance(key, str) for key in self.keys):
            return Batch((), {str(key): x for key, x in zip(self.keys, values, strict=True)}, rows)
        return Batch(tuple(values), {}, rows)

    def _loaded(self) -> Iterator[Batch]:
        for found in self.loader:
            found = _moved(found, self.device)
            if isinstance(found, dict):
                batch = Batch((), found, None)
            else:
                batch = Batch(tuple(found) if isinstance(found, (tuple, list)) else (found,), {}, None)
            if not any(map(_has_rows, (*batch.args, *batch.kwargs.values()))):
                got = ", ".join(type(x).__name__ for x in (*batch.args, *batch.kwargs.values())) or "nothing"
                raise TypeError(
                    f"{self.name}: expected batches with at least one tensor of rows in a tuple or dict, got {got}. "
                    "Try a collate_fn that makes tensors."
                )
            self._largest = max(self._largest, batch.size)  # a batch sampler has no size of its own
            yield batch


def _has_rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0


def _moved(x: Any, device: torch.device | None) -> Any:
    """What a DataLoader yields, with its tensors and numpy arrays as tensors on this device."""
    if isinstance(x, dict):
        return {key: _moved(value, device) for key, value in x.items()}
    if type(x) in (tuple, list):
        return type(x)(_moved(value, device) for value in x)
    if isinstance(x, np.ndarray) and x.dtype.kind in "fciub":
        x = _tensor(x)
    return x.to(device) if isinstance(x, Tensor) and device is not None else x


def _advice(data: Any, name: str, several: bool) -> str:
    """What to try instead of data of a type that is not accepted."""
    if isinstance(data, Dataset):
        return f"a DataLoader of it: DataLoader({name}, batch_size=128, shuffle=True)"
    if type(data).__name__ in ("DataFrame", "Series"):
        return f'{name}.to_numpy(dtype="float32")'
    if several and (data is None or callable(data) or isinstance(data, (str, bytes, int, float))):
        return (
            "functools.partial(model, …), and the same of guide, for what all rows share; what is another for each "
            "batch comes from a DataLoader"
        )
    if isinstance(data, (str, bytes)) or data is None:
        return "a tensor of rows, as torch.load or numpy.load read from a file"
    return "torch.as_tensor(…)"


def _tensor(x: Tensor | np.ndarray) -> Tensor:
    if isinstance(x, Tensor):
        return x
    x = x.astype(x.dtype.newbyteorder("="), copy=False)
    x = torch.from_numpy(np.ascontiguousarray(x) if x.flags.writeable else np.array(x))
    return x.to(torch.get_default_dtype()) if x.is_floating_point() else x
