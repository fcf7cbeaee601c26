"""Where the rows of an evidence estimate come from: the arguments themselves, or the batches of a DataLoader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from pyro_vae.pairs.arrays import device_of
from pyro_vae.pairs.batches import check_loader, loaded, num_rows_of
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["Portions"]

SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Portions:
    """The rows of an estimate, one portion in memory at a time.

    Args:
        model: looked at for the device that batches of a DataLoader belong on.
        guide: the same.
        args: what both are called with, or a DataLoader whose batches they are called with.
        kwargs: as `args`; with a DataLoader, what all batches share.
        plate: of data points.
        others: values that belong to single rows, in the order of these.
        checkpoint: where results are kept, of rows in any order.

    Attributes:
        args, kwargs: to look at the pair with: those of the first batch, where there are several.
        num_rows: of all portions, where that is known beforehand.
        num_portions: the same.

    Raises:
        ValueError: a DataLoader that shuffles, that yields nothing, or all of whose rows are wanted at once.
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        args: tuple,
        kwargs: Mapping[str, Any],
        plate: str | None,
        others: Any = None,
        checkpoint: Any = None,
    ) -> None:
        if others is not None and checkpoint is not None:
            raise ValueError("checkpoint: expected no exact_draw, which belongs to rows in one order. Try without.")
        self.args, self.kwargs = args, dict(kwargs)
        self.loader = args[0] if args and isinstance(args[0], DataLoader) else None
        self.num_rows: int | None = None
        self.num_portions = 1
        if self.loader is None:
            return
        if len(args) > 1:
            raise TypeError(
                f"expected a DataLoader alone, got {len(args) - 1} more positional arguments. Try batches that hold "
                "them, or functools.partial(model, …), and the same of guide, for what all rows share."
            )
        if plate is None or others is not None:
            what = "plate=None, which needs all rows at once" if plate is None else "exact_draw of rows"
            raise ValueError(f"expected tensors or arrays, got a DataLoader with {what}. Try its rows as one tensor.")
        if isinstance(self.loader.sampler, SHUFFLING):
            raise ValueError(
                "expected a DataLoader in the order of its rows, got one that shuffles them: nobody could say which "
                "row a result is of. Try shuffle=False."
            )
        check_loader(self.loader, "DataLoader")
        self.device, self._shared = device_of(model, guide, (), kwargs), dict(kwargs)
        self.num_rows = num_rows_of(self.loader)
        first = next(loaded(self.loader, self.device, "DataLoader"))
        self.args, self.kwargs = first.args, self._shared | first.kwargs
        self.num_portions = -(-self.num_rows // first.size) if self.num_rows else 1

    def through(self, sampler: ParticleSampler) -> Iterator[int]:
        """Goes through the portions, each of which becomes the rows of the sampler; yields how many came before."""
        if self.loader is None:
            yield 0
            return
        start = 0
        for batch in loaded(self.loader, self.device, "DataLoader"):
            sampler.rows.go_on(batch.args, self._shared | batch.kwargs)
            if not sampler.rows.separable and batch.size != sampler.num_points:
                raise ValueError(
                    f"expected batches of {sampler.num_points} rows, as the first one, since model and guide do not "
                    f"take some rows of a batch alone; got one of {batch.size}. Try drop_last=True, or a batch_size "
                    "that divides the rows."
                )
            yield start
            start += batch.size

    @contextmanager
    def counted_from(self, start: int) -> Iterator[None]:
        """Adds a note to errors, which count the rows of a batch."""
        try:
            yield
        except Exception as error:
            if self.loader is not None:
                error.add_note(f"Rows are counted from row {start} of the DataLoader.")
            raise
