"""Batches: what a user calls data, as tuples of tensors on a device, in batches of rows."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_vae.checkpoint.plain import bytes_of
from pyro_vae.pairs.arrays import as_tensor, is_array, slices, unless_on_disk
from pyro_vae.pairs.batches import Batch, check_loader, loaded, num_rows_of
from pyro_vae.pairs.checks import check_rows, check_support
from pyro_vae.ranks import Ranks
from pyro_vae.training.shared_loader import dataset_fingerprint, shared_loader

__all__ = ["Batch", "Batches"]

KNOWN_BY = 2**20  # bytes of each column that tell other data apart


class Batches:
    """Data as batches of rows.

    Args:
        data: a tensor, a numpy array or memory map, a tuple, list or dict of these with equal first dimensions, or a
            torch `DataLoader`. Floating arrays are converted to torch's default dtype, memory maps batch by batch;
            integers reach model and guide as they are, nothing is scaled.
        batch_size: rows of a batch; the last one may be smaller.
        device: where the tensors go. Tensors move once; memory maps and DataLoaders batch by batch.
        name: the argument's name, for messages.
        ranks: of whom each has a share of the rows of each batch.

    Attributes:
        in_order: whether the rows stay in their order. Set where there are parameters for each of them.

    Example:
        >>> batches = Batches((torch.arange(5.0), torch.zeros(5, 2)), 2)
        >>> [batch.size for batch in batches]
        [2, 2, 1]
        >>> [batch.kwargs for batch in Batches({"x": torch.arange(3.0)}, 2)]
        [{'x': tensor([0., 1.])}, {'x': tensor([2.])}]
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        device: torch.device | None = None,
        name: str = "data",
        ranks: Ranks | None = None,
    ) -> None:
        self.batch_size, self.device, self.name = batch_size, device, name
        self.ranks = ranks or Ranks()
        self.in_order = False
        self.loader = data if isinstance(data, DataLoader) else None
        self.columns: list[Tensor | np.ndarray] = []
        self.keys: list[int | str] = []  # of the columns: positions, or names of keyword arguments
        self._largest = 0
        if self.loader is not None:
            check_loader(data, name)
            self.num_rows = num_rows_of(data)
            self.given, self.loader = data, shared_loader(data, self.ranks, name)
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
        if min(batch_size, self.num_rows) < self.ranks.size:
            raise ValueError(
                f"{name}: expected at least one row of a batch for each of {self.ranks.size} ranks, got batches of "
                f"{min(batch_size, self.num_rows)} rows. Try fewer ranks, or a larger batch_size."
            )
        self.to(device)

    def _column(self, key: int | str, column: Any, several: bool) -> Tensor | np.ndarray:
        where = f"{self.name}[{key!r}]"
        if not isinstance(column, (Tensor, np.ndarray)):
            raise TypeError(
                f"{where}: expected a tensor, a numpy array, a tuple or dict of these or a DataLoader, got "
                f"{type(column).__name__}. Try {_advice(column, self.name, several)}."
            )
        if isinstance(column, np.ndarray):
            if not is_array(column):
                raise TypeError(
                    f'{where}: expected an array of numbers, got one of dtype {column.dtype}. Try x.astype("float32").'
                )
            column = unless_on_disk(column)
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
            with suppress(TypeError, NotImplementedError):
                return len(self.loader)
            return None
        return -(-self.num_rows // self.batch_size)

    @property
    def full_size(self) -> int:
        """Rows of most batches; only a last one has fewer. A DataLoader's are as large as they were seen to be."""
        if self.loader is not None:
            return self._largest
        return len(self.ranks.share(torch.empty(min(self.batch_size, self.num_rows))))

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
                rows = torch.arange(start, min(start + self.batch_size, self.num_rows))
                yield self.at(self.ranks.share(rows))

    def shuffled(self) -> Iterator[Batch]:
        """Batches in random order, unless they keep their order (a DataLoader shuffles as it was told to)."""
        if self.loader is not None:
            yield from self._loaded()
        elif self.in_order:
            yield from self
        else:
            device = next((c.device for c in self.columns if isinstance(c, Tensor)), None)
            order = self.ranks.from_first(torch.randperm(self.num_rows, device=device))
            for rows in order.split(self.batch_size):
                yield self.at(self.ranks.share(rows))

    def first(self) -> Batch:
        """The first batch.

        Raises:
            ValueError: a DataLoader yields none.
        """
        return next(iter(self))

    def explain(self, error: Exception) -> None:
        """Adds a note to an error of the model or guide on what these data may have to do with it."""
        for key, column in zip(self.keys, self.columns, strict=True):
            dtype = str(column.dtype).removeprefix("torch.")
            if "dtype" in str(error) and not as_tensor(column[:1]).is_floating_point():
                error.add_note(
                    f"{self.name}[{key!r}] is of dtype {dtype}, which reaches model and guide as it is. Try to convert "
                    "each batch, as in lambda x: model(x.float() / 255), and the same of guide; or all rows beforehand."
                )
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

    def fingerprint(self) -> list[tuple]:
        """Shape and dtype of each column, and a digest of some of its rows: what tells other data apart."""
        last = (self.num_rows or 1) - 1
        if self.loader is not None:
            return dataset_fingerprint(self.given, torch.linspace(0, last, 5).long().tolist())
        found: list[tuple] = []
        for key, column in zip(self.keys, self.columns, strict=True):
            digest, some = sha256(), next(slices([column], KNOWN_BY)).stop
            for row in torch.linspace(0, last, min(last + 1, some)).round().long().tolist():
                digest.update(bytes_of(as_tensor(column[row : row + 1])))
            found.append((key, tuple(column.shape), str(column.dtype), digest.hexdigest()[:16]))
        return found

    def check(self, incomplete: Container[int] = (), observed: Iterable[tuple[int, str, dict]] = ()) -> None:
        """Raises ValueError for rows that are not finite, or outside of a support.

        The rows of a DataLoader cannot be checked in advance.

        Args:
            incomplete: columns in which NaN stands for a missing value.
            observed: columns, with the names and sites of a trace that observe them.
        """
        for some in slices(self.columns):
            rows = [as_tensor(c[some]) for c in self.columns]
            check_rows(rows, start=some.start, incomplete=[x for i, x in enumerate(rows) if i in incomplete])
            for column, name, site in observed:
                with suppress(RuntimeError):  # a support that each row has of its own, as of Uniform(0, high(z))
                    check_support(name, site | {"value": rows[column]}, start=some.start)

    def at(self, rows: Tensor) -> Batch:
        """The batch of these rows."""
        values = []
        for column in self.columns:
            if isinstance(column, Tensor):
                x = column.index_select(0, rows.to(column.device))
            else:
                x = as_tensor(column[rows.cpu().numpy()])
            values.append(x if self.device is None else x.to(self.device))
        if any(isinstance(key, str) for key in self.keys):
            return Batch((), {str(key): x for key, x in zip(self.keys, values, strict=True)}, rows)
        return Batch(tuple(values), {}, rows)

    def _loaded(self) -> Iterator[Batch]:
        for batch in loaded(self.loader, self.device, self.name):
            self._largest = max(self._largest, batch.size)
            yield batch


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
