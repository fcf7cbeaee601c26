"""A DataLoader of which each rank loads its share of each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from pyro_vae.pairs.modes import fork_random_state
from pyro_vae.ranks import Ranks

__all__ = ["begin_epoch", "dataset_fingerprint", "shared_loader"]


def shared_loader(loader: DataLoader, ranks: Ranks, name: str) -> DataLoader:
    """The loader of this rank's share: the first rank draws which rows make a batch, and each loads its part of them.

    One with a `DistributedSampler` shares out its rows itself, and stays as it is.

    Raises:
        ValueError: a loader whose rows nobody can share out.
    """
    if not ranks.several or isinstance(loader.sampler, DistributedSampler):
        return loader
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        raise ValueError(
            f"{name}: expected a DataLoader of a dataset with indices, in batches, whose rows {ranks.size} ranks can "
            f"share, got a {type(loader).__name__} of a {type(loader.dataset).__name__}. Try a dataset with "
            "__getitem__ and __len__, or a torch.utils.data.DistributedSampler."
        )
    return DataLoader(
        loader.dataset,
        batch_sampler=_Shares(loader.batch_sampler, ranks),
        collate_fn=_UnlessEmpty(loader.collate_fn),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def begin_epoch(loader: DataLoader | None, epoch: int) -> None:
    """Tells a `DistributedSampler` the epoch, without which it takes the same order in each."""
    if loader is not None and isinstance(loader.sampler, DistributedSampler):
        loader.sampler.set_epoch(epoch)


def dataset_fingerprint(loader: DataLoader, rows: list[int]) -> list[tuple]:
    """Digests of some items of a dataset, which tell other data apart; none of items that are drawn anew each time."""
    unknown = isinstance(loader.sampler, DistributedSampler) or loader.batch_sampler is None
    if unknown or isinstance(loader.dataset, IterableDataset):
        return []
    try:
        with fork_random_state():
            digests = [_digest(loader.dataset[i]) for i in rows for _ in range(2)]
    except (LookupError, TypeError, ValueError):  # items that have no numbers, or hold something else
        return []
    return [(a,) for a, b in zip(digests[::2], digests[1::2], strict=True) if a == b]


def _digest(item: Any) -> str:
    """Of the tensors and arrays in an item."""
    found = sha256()
    for leaf in pytree.tree_leaves(item):
        found.update(np.ascontiguousarray(leaf).tobytes() if not isinstance(leaf, str) else leaf.encode())
    return found.hexdigest()[:16]


class _Shares:
    """A batch sampler: this rank's part of each batch of the first rank's sampler."""

    def __init__(self, sampler: Iterable[list[int]], ranks: Ranks) -> None:
        self.sampler, self.ranks = sampler, ranks

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.ranks.from_first(list(self.sampler) if self.ranks.is_first else None):
            places = self.ranks.share(torch.arange(len(batch)))
            yield [batch[i] for i in places.tolist()]

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


class _UnlessEmpty:
    """A collate function that makes None of no rows: a share of a last batch may have none."""

    def __init__(self, collate: Callable) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        return self.collate(rows) if rows else None
