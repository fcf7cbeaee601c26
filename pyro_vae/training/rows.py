"""Parameters of single rows: which a guide has that was set up for a batch, and what becomes of them in mini-batches.

`AutoNormal` over a latent of each data point has a location for each row of the batch that it saw first, and takes the
first of them for the first row of every other batch, whichever that is. Such parameters show in the gradients: those of
the log-probability of one row are zero but for its own, and they stay with the place of the row in the batch when other
data come to that place. An embedding of the rows' indices goes with the data, and a network is shared by all rows.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.utils.data import SequentialSampler

from pyro_vae.pairs.handlers import SetSubsample
from pyro_vae.pairs.modes import evaluation_mode, fork_random_state
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.sites import sample_sites, site_log_prob
from pyro_vae.pairs.untouched import Untouched
from pyro_vae.training.data import Batch, Batches
from pyro_vae.training.plates import data_frame

__all__ = ["check_parameters_of_rows"]

TRIED = 4  # rows whose gradients are looked at
RUNS = 3  # with other random numbers, and other data in the same places


def check_parameters_of_rows(pair: Pair, batch: Batch, batches: Batches, validation: Batches | None) -> None:
    """Keeps all rows in order where there are parameters for each of them.

    Args:
        pair: looked at with the batch.
        batch: the first one.
        batches: of the training data; `in_order` is set if need be.
        validation: those of the validation data.

    Raises:
        ValueError: such parameters, and rows that come in several batches or in another order.
    """
    names = _parameters_of_rows(pair, batch)
    if not names:
        return
    found, n = ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else ""), batches.num_rows
    ordered = batches.loader is None or isinstance(batches.loader.sampler, SequentialSampler)
    if batch.size != n or not ordered:
        shuffled = "" if ordered else " that a DataLoader shuffles"
        raise ValueError(
            f"fit: expected all {n or ''} rows in one batch, in the same order each time, as there are parameters for "
            f"each row of a batch ({found}); got batches of {batch.size} rows{shuffled}, so that the parameters of a "
            f"row would meet other rows. Try batch_size={n or 'all rows'}; or the rows' indices as data, with "
            f"pyro.plate({pair.plate!r}, {n or 'N'}, subsample=index) in model and guide (of an autoguide: "
            "create_plates); or a network in the guide."
        )
    if validation is not None:
        raise ValueError(
            f"validation_data: expected none where there are parameters for each row of data ({found}), which belong "
            "to no other rows. Try without, or a network in the guide."
        )
    batches.in_order = True


def _parameters_of_rows(pair: Pair, batch: Batch) -> list[str]:
    frame = data_frame(pair, batch.size)
    if frame is None or batch.size < 2:
        return []
    parameters = pair.participants.parameters
    rows = torch.linspace(0, batch.size - 1, min(TRIED, batch.size)).long().unique().tolist()
    ends = torch.tensor([p.numel() for p in parameters.values()]).cumsum(0)
    first: list[list[Tensor]] = []
    stable = list(range(len(ends)))
    for run in range(RUNS):
        place = _rolled(batch, run)
        own = _own_elements(pair, frame.name, place, rows if run else rows[:2], list(parameters.values()), run)
        if run == 0 and len(rows) > 2 and own and all(map(len, own)):  # a cheap look first: most pairs end here
            own = _own_elements(pair, frame.name, place, rows, list(parameters.values()), run)
        if not own or not all(map(len, own)):
            return []
        # by parameter: where the covariate of a row is zero, a coefficient of all rows looks like the other rows' own
        parts = [[e[torch.searchsorted(ends, e, right=True) == i] for e in own] for i in range(len(ends))]
        first = first or parts
        stable = [i for i in stable if all(map(torch.equal, first[i], parts[i]))]
        if not all(any(len(first[i][row]) for i in stable) for row in range(len(rows))):
            return []
    return [list(parameters)[i] for i in stable if any(map(len, first[i]))]


def _own_elements(
    pair: Pair, plate: str, batch: Batch, rows: list[int], parameters: list[Tensor], run: int
) -> list[Tensor]:
    """For each of the rows, the indices of the elements of all parameters together that it alone depends on."""

    def traced(function: Callable) -> poutine.Trace:
        handled = SetSubsample(pair.look.subsamples())(function)  # the same draws of a plate in all runs
        return poutine.trace(handled).get_trace(*batch.args, **batch.kwargs)

    with (
        fork_random_state(),
        torch.enable_grad(),
        Untouched(pair.model, pair.guide),
        evaluation_mode(pair.model, pair.guide),
        pyro.validation_enabled(False),
    ):
        torch.manual_seed(run)
        guide = traced(pair.guide)
        traces = guide, traced(poutine.replay(pair.model, guide))
        reached = [_reached(traces, plate, row, parameters) for row in rows]
    if any(r is None for r in reached):
        return []
    counts = torch.stack([r.int() for r in reached if r is not None]).sum(0)
    return [(r & (counts == 1)).nonzero().flatten() for r in reached if r is not None]


def _reached(traces: tuple[poutine.Trace, ...], plate: str, row: int, parameters: list[Tensor]) -> Tensor | None:
    """Which elements of the parameters the log-probability of a row in both traces depends on; None: on none."""
    masks = [torch.zeros(p.numel(), dtype=torch.bool, device=p.device) for p in parameters]
    for trace in traces:  # one by one: the gradients of the two may cancel
        parts = [_of_row(site, plate, row) for site in sample_sites(trace).values()]
        total = sum(part for part in parts if part is not None)
        if not (isinstance(total, Tensor) and total.requires_grad):
            continue
        for mask, g in zip(masks, torch.autograd.grad(total, parameters, None, True, allow_unused=True), strict=True):
            if g is not None:
                mask |= (g.to_dense() if g.is_sparse else g).flatten() != 0
    found = torch.cat([mask.cpu() for mask in masks])
    return found if found.any() else None


def _of_row(site: dict, plate: str, row: int) -> Tensor | None:
    """The log-probability of a row, of a site that is in the plate of rows."""
    frame = next((f for f in site["cond_indep_stack"] if f.name == plate), None)
    if frame is None:
        return None
    try:
        value = site_log_prob(site)
    except NotImplementedError:  # a flow without an inverse
        return None
    if frame.dim is None:  # a sequential plate
        return value.sum() if frame.counter - 1 == row else None
    axis = value.dim() + frame.dim
    rows = value.shape[axis] if axis >= 0 else 0  # fewer than there are where the plate draws some of them
    return value.select(axis, row).sum() if row < rows == frame.size else None


def _rolled(batch: Batch, shift: int) -> Batch:
    """The batch with other rows in each place."""

    def roll(x: object) -> object:
        rows = isinstance(x, Tensor) and x.dim() > 0 and len(x) == batch.size
        return x.roll(shift, 0) if rows and isinstance(x, Tensor) else x

    return Batch(tuple(map(roll, batch.args)), {name: roll(x) for name, x in batch.kwargs.items()}, None)
