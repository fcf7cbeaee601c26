"""What the first steps of a fit set up, for one that goes on: made beforehand, by steps that are undone.

An uninterrupted fit runs plain Pyro in its first steps, then recordings, then generated code, and each of them rounds
in its own way. One that goes on must not begin with plain Pyro again: it would end at other last digits. Nor may an
objective draw random numbers of the next step to find out about plates, as some of Pyro's do when first called.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.training.data import Batch, Batches
from pyro_vae.training.steps import Steps

__all__ = ["warm_up"]

EPOCHS, BATCHES = 5, 4  # after which every recording is made that comes of batches of one size and a smaller last one


def warm_up(steps: Steps, num_epochs: int) -> None:
    """Evaluates the objective, and takes the kinds of steps that the first epochs have taken, in their order. Whoever
    calls this undoes them.

    Args:
        steps: whose weights and optimizer are those to go on from.
        num_epochs: that were done.
    """
    pair = steps.pair
    with torch.no_grad(), evaluation_mode(pair.model, pair.guide), pyro.validation_enabled(False):
        steps.elbo.loss(pair.model, pair.guide, *pair.args, **pair.kwargs)
    epoch = _sizes(steps.batches)
    if steps.compiled is None or epoch is None:
        return
    whole = steps.batches.first() if steps.batches.columns else Batch(pair.args, pair.kwargs, None)
    if whole.size != epoch[0]:
        return
    batches = {size: whole if size == whole.size else _first_rows(whole, size) for size in epoch}
    steps.count = 1  # the very first step is none of the recordings' business
    steps.begin_epoch()
    with suppress(ValueError):  # of a loss that is not finite, which may come later or never
        for size in (epoch * min(num_epochs, EPOCHS))[1:]:
            steps(batches[size])


def _sizes(batches: Batches) -> list[int] | None:
    """The sizes of this rank's share of an epoch's batches, of which many that are the same stand as a few.

    None if they are not known.
    """
    loader, rows, size = batches.loader, batches.num_rows, batches.full_size
    if batches.ranks.several:  # all have to take as many steps
        size = None if loader is not None else min(batches.batch_size, rows)
    if not rows or not size:
        return None
    last = rows % size if loader is None or not loader.drop_last else 0
    sizes = [size] * min(rows // size, BATCHES) + ([last] if last else [])
    return [len(batches.ranks.share(torch.empty(n))) for n in sizes]


def _first_rows(batch: Batch, size: int) -> Batch:
    rows = batch.size

    def cut(x: Any) -> Any:
        return x[:size].contiguous() if isinstance(x, Tensor) and x.dim() and len(x) == rows else x

    kwargs = {name: cut(x) for name, x in batch.kwargs.items()}
    return Batch(tuple(map(cut, batch.args)), kwargs, None if batch.rows is None else batch.rows[:size])
