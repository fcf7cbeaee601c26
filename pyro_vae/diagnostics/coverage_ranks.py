"""Ranks of z* among draws, by the density of the guide and by the distance from a random point."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from pyro_vae.diagnostics.simulated_draws import in_parts, ranks_among, with_truth
from pyro_vae.diagnostics.simulations import Batch, Draws
from pyro_vae.evidence.density import LatentDensity
from pyro_vae.pairs.handlers import unobserved
from pyro_vae.pairs.sites import sample_sites
from pyro_vae.pairs.validity import check_density
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["HighestDensity", "Tarp"]


class HighestDensity:
    """Ranks by log q(z|x): how many draws have a higher density than z*.

    Args:
        sampler: of the pair.

    Raises:
        ValueError: a guide whose density at a given point is not known.
    """

    def __init__(self, sampler: ParticleSampler) -> None:
        self.sampler = sampler
        check_density(sampler.pair)
        drawn = {n for n, s in sample_sites(sampler.pair.look.guide).items() if not s["is_observed"]}
        self._auxiliary = drawn - sampler.pair.latents

    def __call__(self, batch: Batch, draws: Draws) -> Tensor:
        """(n,), of draws {site: (L, n, *inner plates, *event)}."""
        try:
            if self._auxiliary:
                log_q = self._log_q_unconstrained(batch, draws)
            else:
                log_q = in_parts(self.sampler, batch, draws, lambda values, count: self._log_q(batch, values, count))
        except (NotImplementedError, KeyError) as error:  # as flows without an inverse say it
            raise ValueError(
                "the guide has a transform without an inverse, so that its density at a point is not known. Try "
                "kinds=('tarp',), which needs none."
            ) from error
        return ranks_among(-log_q[1:], -log_q[0])

    def _log_q_unconstrained(self, batch: Batch, draws: Draws) -> Tensor:
        density = LatentDensity(self.sampler, batch.rows)
        if not density.knows_guide:
            raise ValueError(
                f"the guide draws {sorted(self._auxiliary)}, which are no latents of the model and not their "
                "unconstrained values, so that its density at a point is not known. Try kinds=('tarp',), which needs "
                "none."
            )
        return density.log_all(density.unconstrain(with_truth(batch, draws)))[2]

    def _log_q(self, batch: Batch, values: Draws, count: int) -> Tensor:
        sampler = self.sampler
        trace = sampler.run(sampler.guide, count, batch.rows, values=values)
        log_q, outside = sampler.log_posterior(trace, count, batch.rows), sampler.outside(trace, batch.rows)
        log_q = log_q if outside is None else log_q.masked_fill(outside, -inf)
        return log_q.expand(count, -1)


class Tarp:
    """Ranks by the distance from a draw of the prior: how many draws are nearer to it than z*.

    Args:
        sampler: of the pair.
    """

    def __init__(self, sampler: ParticleSampler) -> None:
        self.sampler, self._scale = sampler, torch.ones(())

    def __call__(self, batch: Batch, draws: Draws) -> Tensor:
        """(n,), of draws {site: (L, n, *inner plates, *event)}."""
        reference = self._prior(batch, draws, 1)
        if not self._scale.dim():  # all batches are to be measured alike
            many = self._prior(batch, draws, len(next(iter(draws.values()))) + 1).flatten(0, 1)
            spread = many.std(0)
            self._scale = torch.where(spread > 0, spread, 1.0)
        distance = ((_vectors(batch, with_truth(batch, draws)) - reference) / self._scale).norm(dim=-1)
        return ranks_among(distance[1:], distance[0])

    def _prior(self, batch: Batch, draws: Draws, count: int) -> Tensor:
        sites = sample_sites(self.sampler.run(unobserved(self.sampler.model), count, batch.rows))
        return _vectors(batch, {name: self.sampler.layout.align(sites[name], batch.rows) for name in draws})


def _vectors(batch: Batch, latents: Draws) -> Tensor:
    """All elements of all latents, (L, n, D), double; zero where a latent is masked."""
    count, rows = (max(value.shape[i] for value in latents.values()) for i in range(2))
    columns = []
    for name, value in latents.items():
        value = value.double() if name not in batch.masks else value.double().where(batch.masks[name], 0.0)
        columns.append(
            value.expand(count, rows, *value.shape[2:]).flatten(2) if value.dim() > 2 else value.unsqueeze(2)
        )
    return torch.cat([c.expand(count, rows, -1) for c in columns], -1)
