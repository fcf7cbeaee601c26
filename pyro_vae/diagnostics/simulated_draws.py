"""Draws of a guide on simulated data, and z* among them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae.diagnostics.simulations import Batch, Draws
from pyro_vae.pairs.sites import sample_sites
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["guide_draws", "in_parts", "log_likelihood", "ranks_among", "weighted_ranks", "with_truth"]


def guide_draws(sampler: ParticleSampler, batch: Batch, num_draws: int) -> Draws:
    """z_l ~ q(z|x) of the simulated x, L of them; auxiliary sites of the guide are left out."""
    parts = []
    for count in sampler.chunks(num_draws, together=num_draws)[1]:
        sites = sample_sites(sampler.run(sampler.guide, count, batch.rows))
        parts.append({n: sampler.layout.align(s, batch.rows) for n, s in sites.items() if n in batch.latents})
    if not parts[0]:
        raise ValueError("the guide draws no latent of the model: there is nothing to calibrate.")
    draws = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for name, value in draws.items():
        if value.is_floating_point() and (value.isnan().any() or batch.latents[name].isnan().any()):
            raise ValueError(
                f"site {name!r} of the guide: draws that are NaN on simulated data, or a latent that only some of the "
                "runs have. Try to look at the guide's parameters there, or a latent that is always drawn."
            )
    return draws


def with_truth(batch: Batch, draws: Draws) -> Draws:
    """z* and then the draws, (1 + L, n, …): evaluated together, so that equal ones have equal log-probabilities."""
    return {n: torch.cat([batch.latents[n].to(value.dtype).expand_as(value[:1]), value]) for n, value in draws.items()}


def log_likelihood(sampler: ParticleSampler, batch: Batch, draws: Draws) -> Tensor:
    """log p(x|z) of z*, and then of the draws, (1 + L, n), with sites that are not among the draws summed out."""
    summed = (sampler.pair.summed | sampler.pair.enumerated) - draws.keys()

    def part(values: Draws, count: int) -> Tensor:
        trace = sampler.run(sampler.model, count, batch.rows, values=values, enumerate_sites=summed)
        return sampler.log_prior_likelihood(trace, count, batch.rows, summed=summed)[1].expand(count, -1)

    return in_parts(sampler, batch, draws, part)


def in_parts(sampler: ParticleSampler, batch: Batch, draws: Draws, function: Callable[[Draws, int], Tensor]) -> Tensor:
    """A function of z* and the draws as traces have them, (1 + L, n), for as many at once as memory has room for."""
    together, parts, start = with_truth(batch, draws), [], 0
    for count in sampler.chunks(len(next(iter(together.values()))), together=None)[1]:
        values = {n: sampler.layout.place(batch.sites[n], v[start : start + count]) for n, v in together.items()}
        parts.append(function(values, count))
        start += count
    return torch.cat(parts)


def ranks_among(draws: Tensor, truth: Tensor) -> Tensor:
    """How many of L draws (L, …) are below the truth (…), ties broken at random."""
    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)
    return below + (torch.rand(ties.shape, device=ties.device) * (ties + 1)).long().clamp(max=ties)


def weighted_ranks(draws: Tensor, truth: Tensor, weight: Tensor, num_draws: int) -> Tensor:
    """The share of the weight of K draws (K, n, …) and of the truth (n, …) below the truth, as one of 0..L.

    Args:
        draws: z_k ~ q.
        truth: z* ~ π.
        weight: ∝ π/q of z* and of the draws, (1 + K, n), with sum one. Which of the 1 + K points is that from π has
            these probabilities, given the points: with its own weight split at random, the share is exactly uniform.
        num_draws: L.
    """
    own, others = weight[0], weight[1:]
    own, others = (w.reshape(*w.shape, *(1,) * (draws.dim() - 2)) for w in (own, others))
    below, ties = ((others * found).sum(0) for found in (draws < truth, draws == truth))
    share = below + torch.rand(below.shape, dtype=below.dtype, device=below.device) * (ties + own)
    return (share * (num_draws + 1)).long().clamp(max=num_draws)
