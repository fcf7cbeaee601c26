r"""Weights of latents inside of the data plate, given draws of those outside: log p(x_n, z_nk|θ_s) / q(z_nk|θ_s, x).

The proposal q is the guide, or the mixture of a fitted Gaussian and the prior, both given θ_s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.evidence.arrow import Arrow
from pyro_vae.evidence.joint import JointDensity
from pyro_vae.evidence.proposals import spread
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["PRIOR_SHARE", "ArrowWeights", "Chunk", "GuideWeights", "Weighed", "chunks"]

PRIOR_SHARE = 0.15  # of the draws of locals come from their prior given the globals, so that weights are bounded


class Chunk(NamedTuple):
    """A part of S draws × N points × K particles: which draws, which rows, and how many particles at a time."""

    draws: slice
    rows: slice
    counts: list[int]


class Weighed(NamedTuple):
    """Draws of locals given S draws of globals: log-weights (S, K, N), u (S, K, N, D), and the log-density of the
    globals' prior and of what is observed outside of the plate, (S,)."""

    log_weight: Tensor
    u: Tensor
    log_prior: Tensor
    log_outside: Tensor


def chunks(sampler: ParticleSampler, num_samples: int, num_particles: int, *, all_rows: bool) -> list[list[Chunk]]:
    """Parts that fit into memory: for each part of the draws one for each part of the rows."""
    rows, counts = sampler.chunks(num_particles, together=num_particles)
    if all_rows or not (sampler.rows.separable or sampler.rows.fixed):
        rows = [slice(0, sampler.num_points)]
        counts = _equal_parts(num_particles, max(1, sampler.cells // sampler.num_points))
    longest = max(r.stop - r.start for r in rows)
    at_once = max(1, sampler.cells // (longest * num_particles)) if len(counts) == 1 else 1
    starts = range(0, num_samples, at_once)
    return [[Chunk(slice(s, min(s + at_once, num_samples)), r, counts) for r in rows] for s in starts]


def _equal_parts(total: int, most: int) -> list[int]:
    parts = -(-total // most)
    return [total // parts + (i < total % parts) for i in range(parts)]


class GuideWeights:
    """Draws of the guide given the globals.

    Args:
        sampler: of the pair, made with `outside=True`.
        values: of the sites outside, as `ParticleSampler.given` takes them.
    """

    all_rows, bounded = False, False

    def __init__(self, sampler: ParticleSampler, values: Mapping[str, Tensor]) -> None:
        self.sampler, self.values = sampler, dict(values)

    def prepare(self, chunk: Chunk, num_particles: int) -> Callable[[int], Tensor]:
        """A function: count -> log-weights of as many new particles, (draws, count, rows)."""
        values = {name: v[chunk.draws] for name, v in self.values.items()}
        size = chunk.draws.stop - chunk.draws.start
        rows = chunk.rows if self.sampler.rows.separable or self.sampler.rows.fixed else None

        def weigh(count: int) -> Tensor:
            with self.sampler.given(values):
                log_weight = self.sampler.log_weight(size * count, rows, check=False)
            return log_weight.reshape(size, count, -1)

        return weigh


class ArrowWeights:
    """Draws of a Gaussian that was fitted to globals and locals, and of the prior, both given the globals.

    Args:
        density: of the pair.
        arrow: fitted to it.
        g: the globals in unconstrained coordinates, (S, G).
        prior_share: of the draws.
    """

    all_rows, bounded = True, True

    def __init__(self, density: JointDensity, arrow: Arrow, g: Tensor, *, prior_share: float = PRIOR_SHARE) -> None:
        self.density, self.arrow, self.g, self.prior_share = density, arrow, g, prior_share

    def prepare(self, chunk: Chunk, num_particles: int) -> Callable[[int], Tensor]:
        """A function: count -> log-weights of as many new particles, (draws, count, N)."""
        draw = self.draws(chunk.draws, num_particles)
        return lambda count: draw(count).log_weight

    def draws(self, draws: slice, num_particles: int) -> Callable[[int], Weighed]:
        """A function: count -> as many new particles."""
        g, drawn = self.g[draws], 0
        num_prior = round(self.prior_share * num_particles)
        shares = torch.tensor([num_particles - num_prior, num_prior], dtype=torch.double, device=g.device)
        log_shares = (shares / num_particles).log()
        defined = g.isfinite().all(-1)
        g = torch.where(defined.unsqueeze(-1), g, self.arrow.loc)

        def draw(count: int) -> Weighed:
            nonlocal drawn
            each = g.repeat_interleave(count, 0)  # (draws · count, G)
            u = self.arrow.draw_locals(each)
            index = torch.arange(drawn, drawn + count, device=g.device) * spread(num_particles) % num_particles
            from_prior = (index >= num_particles - num_prior).repeat(len(g))
            drawn += count
            if from_prior.any():
                prior_u = self.density.draw_locals_from_prior(each)
                u = torch.where(from_prior[:, None, None], prior_u, u)
            outside = u.isnan().any(-1)
            u = u.masked_fill(outside.unsqueeze(-1), 0.0)
            log_prior, log_outside, prior, likelihood = self.density.terms(each, u)
            log_q = torch.stack([self.arrow.log_prob_locals(u, each), prior]).double() + log_shares[:, None, None]
            log_weight = (prior + likelihood - log_q.logsumexp(0)).masked_fill(outside, -inf)
            log_weight = log_weight.reshape(len(g), count, -1).masked_fill(~defined[:, None, None], -inf)
            first = [v.reshape(len(g), count)[:, 0] for v in (log_prior, log_outside)]
            return Weighed(log_weight, u.reshape(*log_weight.shape, u.shape[-1]), *first)

        return draw
