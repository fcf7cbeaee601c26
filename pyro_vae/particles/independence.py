"""Whether data points are independent in a pair, as its plate declares.

A plate promises that its elements are independent given what is outside. Nothing in Pyro checks it: `z.cumsum(-1)` or a
layer norm over the rows of a plate run as well, and the terms of the rows are then no log-probabilities of data points.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.pairs.modes import evaluation_mode, fork_random_state
from pyro_vae.pairs.rows import WINDOW
from pyro_vae.pairs.sites import base_distribution, is_inside, sample_sites
from pyro_vae.pairs.untouched import Untouched

if TYPE_CHECKING:
    from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["check_rows_apart"]

TOLERANCE = 1e-3  # of log-probabilities, absolute and relative


def check_rows_apart(sampler: ParticleSampler) -> None:
    """Raises ValueError where a row's log-probabilities depend on the latents of another row.

    Two particles are drawn, and a third has every second row of one of them and the others of the other: each of its
    rows has to have the log-probabilities that it had there.
    """
    rows = slice(0, WINDOW) if sampler.rows.separable else None
    layout = sampler.layout
    if layout.dim is None or sampler.num_points < 2:
        return
    with (
        fork_random_state(),
        torch.no_grad(),
        evaluation_mode(sampler.model, sampler.guide),
        Untouched(sampler.model, sampler.guide),
    ):
        guide_trace, _ = sampler.traces(2, rows, check=False)
        drawn = {n: s for n, s in sample_sites(guide_trace).items() if not s["is_observed"]}
        inside = {n: s["value"] for n, s in drawn.items() if is_inside(s, layout.plate)}
        if any(len(value) != 2 for value in inside.values()) or not inside:
            return  # the same for both: there is nothing to exchange
        outside = {n: s["value"][:1].expand_as(s["value"]) for n, s in drawn.items() if n not in inside}
        axes = {n: v.dim() + layout.dim - len(drawn[n]["fn"].event_shape) for n, v in inside.items()}
        mixed = {n: _mixed(v, axes[n]) for n, v in inside.items()}
        try:
            apart = _terms(sampler, {**inside, **outside}, rows)
            again = _terms(sampler, {**inside, **outside}, rows)
            together = _terms(sampler, {**mixed, **outside}, rows)
        except (NotImplementedError, KeyError):  # a flow without an inverse scores nothing but its own draws
            return
    for role, one, same, other in zip(("guide", "model", "model"), apart, again, together, strict=True):
        if not torch.allclose(one, same, equal_nan=True):  # chance that is no sample site tells nothing of rows
            continue
        expected = _mixed(one.expand(2, one.shape[1]), 1)
        if not torch.allclose(other.expand_as(expected), expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
            raise ValueError(
                f"plate {layout.plate!r}: in the {role}, the log-probability of a row depends on the latents of other "
                "rows, so that rows are not independent, and have no log p(x) each. Try plate=None for the joint "
                "evidence of all data, or look for what goes over rows: cumsum(…, dim), mean(), a norm over the batch."
            )


def _mixed(value: Tensor, axis: int) -> Tensor:
    """Of two particles, with every second row exchanged between them."""
    if value.shape[axis] < 2:
        return value
    odd = (torch.arange(value.shape[axis], device=value.device) % 2 == 1).reshape(-1, *(1,) * (value.dim() - axis - 1))
    return torch.where(odd, value.flip(0), value)


def _terms(sampler: ParticleSampler, values: dict[str, Tensor], rows: slice | None) -> tuple[Any, ...]:
    """log q, log p(z) and log p(x|z) at these values, each (2, N)."""
    pair = sampler.pair
    # a point of the guide follows from the sites that it is an image of, here to rounding
    points = {n for n, s in sample_sites(pair.look.guide).items() if isinstance(base_distribution(s["fn"]), dist.Delta)}
    guide_trace = sampler.run(sampler.guide, 2, rows, values={n: v for n, v in values.items() if n not in points})
    model_trace = sampler.run(sampler.model, 2, rows, values=values, enumerate_sites=pair.summed)
    prior, likelihood = sampler.log_prior_likelihood(model_trace, 2, rows, summed=pair.summed)
    return sampler.log_posterior(guide_trace, 2, rows), prior, likelihood
