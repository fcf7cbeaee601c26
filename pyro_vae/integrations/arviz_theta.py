r"""Draws of what is outside of the plate of data points, θ, of the guide and of the prior, and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.evidence.log_weights import LogWeightSummary
from pyro_vae.evidence.moments import CELLS, locals_of
from pyro_vae.integrations.arviz_groups import Groups
from pyro_vae.pairs.handlers import unobserved
from pyro_vae.pairs.validity import is_factored
from pyro_vae.particles.outside import draw_outside
from pyro_vae.particles.particles import Particles
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["Theta"]


class Theta:
    """S draws of the sites outside of the plate.

    Args:
        sampler: of the pair.
        num_samples: S.

    Attributes:
        values: of the guide's sites, {site: (S, …) as in traces}.
        log_likelihood: Σ_n log p(x_n|θ), (S,), to be added to.
    """

    def __init__(self, sampler: ParticleSampler, num_samples: int) -> None:
        at_once = max(1, CELLS // sampler.num_points)
        counts = [min(at_once, num_samples - start) for start in range(0, num_samples, at_once)]
        drawn = [draw_outside(sampler, count) for count in counts]
        self.values = {name: torch.cat([part.values[name] for part in drawn]) for name in drawn[0].values}
        self.log_p = torch.cat([part.log_p for part in drawn]).double().cpu()
        self.log_q = torch.cat([part.log_q for part in drawn]).double().cpu()
        self._prior = self._draw_prior(sampler, counts)
        self.joint = torch.zeros(2, num_samples, dtype=torch.float64)  # log p(x, z|θ), log q(z|θ)
        self.log_likelihood = torch.zeros(num_samples, dtype=torch.float64)
        # where the guide's θ has a density of its own; where all latents are one draw, only the joint one is known
        self.alone = is_factored(sampler.pair) or not locals_of(sampler)

    def _draw_prior(self, sampler: ParticleSampler, counts: list[int]) -> dict[str, Tensor]:
        traces = [sampler.run(unobserved(sampler.model), count) for count in counts]
        names = [name for name in sampler.pair.outside(traces[0]) if name in sampler.pair.latents]
        return {name: torch.cat([trace.nodes[name]["value"] for trace in traces]) for name in names}

    def at(self, draws: slice) -> dict[str, Tensor]:
        """Values of the guide at some draws."""
        return {name: value[draws] for name, value in self.values.items()}

    def prior(self, draws: slice) -> dict[str, Tensor]:
        """Values of the prior."""
        return {name: value[draws] for name, value in self._prior.items()}

    def add(self, draws: slice, particles: Particles) -> None:
        """Adds the log-probabilities of some data points at some draws."""
        log_p = particles.log_prior + particles.log_likelihood
        for row, value in zip(self.joint, (log_p, particles.log_posterior), strict=True):
            row[draws] += value.expand(log_p.shape).double().sum(1).cpu()

    def take(self, index: Tensor) -> None:
        """Takes some of the draws in place of all."""
        self.values = {name: value[index.to(value.device)] for name, value in self.values.items()}

    def put(self, groups: Groups, *, joint: bool) -> None:
        """Stores log p, log q and log-weights of the draws, and what they say of the evidence of all data.

        Of θ alone, with the latents of data points integrated out, or of all latents, if `joint` or q(θ) is not known.
        """
        alone = self.alone and not joint
        log_p = self.log_p + (self.log_likelihood if alone else self.joint[0])
        log_q = self.log_q if alone else self.log_q + self.joint[1]
        for name, value in (("log_p", log_p), ("log_q", log_q), ("log_weights", log_p - log_q)):
            groups.put("sample_stats", name, value, [], draws=True)
        summary = LogWeightSummary(len(log_p))
        summary.update((log_p - log_q)[:, None])
        for name, value in zip(
            ("log_evidence", "log_evidence_error", "ess", "pareto_khat"), summary.result(), strict=True
        ):
            groups.put("sample_stats", name, value[0], [])
