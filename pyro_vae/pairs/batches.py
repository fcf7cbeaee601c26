"""Batches: what a model and guide are called with for some rows, as a DataLoader yields them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pyro_vae.pairs.arrays import has_rows, on_device

__all__ = ["Batch", "check_loader", "loaded", "num_rows_of"]


class Batch(NamedTuple):
    """What model and guide are called with for some rows, and the indices of these where they are known."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: Tensor | None

    @property
    def size(self) -> int:
        return next((len(x) for x in (*self.args, *self.kwargs.values()) if has_rows(x)), 0)


def check_loader(loader: DataLoader, name: str) -> None:
    """Raises ValueError for a stream that can be read only once: the look at a first batch would take it away."""
    data = loader.dataset
    if isinstance(data, IterableDataset) and (first := iter(data)) is iter(data):
        raise ValueError(
            f"{name}: expected data that can be read again, got an IterableDataset whose __iter__ returns the same "
            f"{type(first).__name__} each time. Try an __iter__ that starts anew."
        )


def num_rows_of(loader: DataLoader) -> int | None:
    """Rows of an epoch, where that is known."""
    if loader.batch_sampler is None and loader.batch_size is None:  # the data set has batches, not rows
        return None
    try:
        return len(loader.dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def loaded(loader: DataLoader, device: torch.device | None, name: str) -> Iterator[Batch]:
    """The batches of a DataLoader.

    Raises:
        ValueError: there are none.
        TypeError: a batch without rows.
    """
    empty = True
    for found in loader:
        empty = False
        if found is None:  # a share of no rows, in one of several ranks
            yield Batch((), {}, None)
            continue
        found = on_device(found, device)
        if isinstance(found, dict):
            batch = Batch((), found, None)
        else:
            batch = Batch(tuple(found) if isinstance(found, (tuple, list)) else (found,), {}, None)
        if not any(map(has_rows, (*batch.args, *batch.kwargs.values()))):
            got = ", ".join(type(x).__name__ for x in (*batch.args, *batch.kwargs.values())) or "nothing"
            raise TypeError(
                f"{name}: expected batches with at least one tensor of rows in a tuple or dict, got {got}. "
                "Try a collate_fn that makes tensors."
            )
        yield batch
    if empty:
        raise ValueError(
            f"{name}: expected a DataLoader that yields batches each time it is read, got one that yields none. Try "
            "drop_last=False, a smaller batch_size, or a data set that starts anew."
        )
