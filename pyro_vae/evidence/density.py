r"""Log-densities of unconstrained latents: what adapted proposals and annealing need of a (model, guide) pair.

All continuous latents of a data point become one vector u in R^D, by the bijections that Pyro has for their supports.
For K vectors of each of N points,

    log p(u) = log p(z(u)) + log |dz/du|,   log p(x|u) = log p(x|z(u)),   log q(u|x) = log q(z(u)|x) + log |dz/du|,

differentiable in u; latents that are discrete are summed out of each. Supports may depend on other latents (a uniform
below another): the model maps its own sites as it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import inf
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evidence.preimages import Preimages
from pyro_vae.pairs.handlers import StopAfter, unobserved
from pyro_vae.pairs.sites import is_inside, outside_support, sample_sites, site_log_prob, site_mask
from pyro_vae.pairs.supports import support_of
from pyro_vae.particles.latents import Coordinates
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["LatentDensity", "continuous_latents"]


class LatentDensity:
    """p(u), p(x|u) and q(u|x) of some rows of a pair.

    Args:
        sampler: of the pair.
        rows: which data points; None for all.

    Attributes:
        dim: D.

    Raises:
        ValueError: a discrete latent that is not marked for enumeration.
    """

    def __init__(self, sampler: ParticleSampler, rows: slice | None = None) -> None:
        self.sampler, self.layout, self.rows = sampler, sampler.layout, rows
        self.discrete = sampler.pair.summed | sampler.pair.enumerated
        with torch.no_grad():
            self._guide_trace, model_trace = sampler.traces(1, rows)
            latents = continuous_latents(model_trace, self.discrete)
            self._sites = {n: s for n, s in latents.items() if is_inside(s, self.layout.plate)}
            self._coordinates = Coordinates(self._sites, self.layout, rows)
        self.dim = self._coordinates.dim
        if not self.dim:
            raise ValueError("the model has no continuous latent. Try importance_sampling, which needs none.")

    @cached_property
    def knows_guide(self) -> bool:
        """Whether q(u|x) can be evaluated: a guide with auxiliary variables that do not follow from its latents, or
        with a flow without an inverse, can only be drawn from."""
        if _one_way(self._guide_trace, self._drawn):
            return False
        return self._drawn <= self.sampler.pair.latents or self._preimages is not None

    @property
    def _drawn(self) -> set[str]:
        """Names of what the guide draws."""
        return {name for name, site in sample_sites(self._guide_trace).items() if not site["is_observed"]}

    @cached_property
    def _preimages(self) -> Preimages | None:
        return Preimages.find(self.sampler, self.rows, self._coordinates)

    @property
    def masked(self) -> list[str]:
        """Latent sites that are masked somewhere, and have no proper density there."""
        masks = {name: site_mask(site) for name, site in self._sites.items()}
        return [name for name, mask in masks.items() if mask is not None and not mask.all()]

    # -- draws --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(self, num_particles: int) -> Tensor:
        """u ~ q(u|x), (K, N, D); NaN for draws outside of the prior's support, where u is not defined."""
        if self._coordinates.are_real:  # the model is not needed to say what the supports are
            return self._coordinates.join(self.sampler.run(self.sampler.guide, num_particles, self.rows))
        return self._coordinates.join(self.sampler.traces(num_particles, self.rows, check=False)[1])

    @torch.no_grad()
    def draw_prior(self, num_particles: int) -> Tensor:
        """u ~ p(u), (K, N, D)."""
        prior = StopAfter(self._sites)(unobserved(self.sampler.model))
        return self._coordinates.join(self.sampler.run(prior, num_particles, self.rows))

    def exact(self, draws: Mapping[str, Tensor] | None) -> Tensor | None:
        """u of draws {site: (N_all, *inner plates, *event)} at these rows, (1, N, D)."""
        if draws is None:
            return None
        missing = self._sites.keys() - draws.keys()
        if missing:
            sites = sorted(self._sites)
            raise ValueError(
                f"exact_draw: expected draws of the sites {sites}, missing {sorted(missing)}, got "
                f"{sorted(draws)}. Try simulate(…).latents."
            )
        return self.unconstrain({name: draws[name][self.rows or slice(None)].unsqueeze(0) for name in self._sites})

    @torch.no_grad()
    def unconstrain(self, latents: dict[str, Tensor]) -> Tensor:
        """u of latents {site: (K, N, *inner plates, *event)}, (K, N, D)."""
        values = {name: self._coordinates.place(name, latents[name]) for name in self._sites}
        num_particles = len(latents[next(iter(self._sites))])
        return self._coordinates.join(self.sampler.run(self.sampler.model, num_particles, self.rows, values=values))

    @torch.no_grad()
    def latents(self, u: Tensor) -> dict[str, Tensor]:
        """The latents of u (K, N, D), {site: (K, N, *inner plates, *event)}."""
        model = StopAfter(self._sites)(unobserved(self.sampler.model))
        trace = self.sampler.run(model, len(u), self.rows, unconstrained=self._coordinates.split(u))
        return {name: self.layout.align(trace.nodes[name], self.rows) for name in self._sites}

    # -- densities ----------------------------------------------------------------------------------------------------

    def log_joint(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(u) and log p(x|u), each (K, N), nats."""
        return self._evaluate(u)[:2]

    def log_all(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p(u), log p(x|u) and log q(u|x), each (K, N), nats."""
        prior, likelihood, log_det, latents = self._evaluate(u)
        return prior, likelihood, self._log_posterior(latents, u) + log_det

    def gradient(self, u: Tensor) -> Tensor:
        """∇ log p(x, u), (K, N, D)."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            prior, likelihood = self.log_joint(u)
            return torch.autograd.grad((prior + likelihood).sum(), u)[0]

    def _evaluate(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        sampler, count = self.sampler, len(u)
        trace = sampler.run(
            sampler.model, count, self.rows, enumerate_sites=self.discrete, unconstrained=self._coordinates.split(u)
        )
        sites = {name: trace.nodes[name] for name in self._sites}
        first, *others = (self.layout.sum_to_points(n, site["log_det"], self.rows) for n, site in sites.items())
        log_det = sum(others, first)
        prior, likelihood = sampler.log_prior_likelihood(trace, count, self.rows, summed=self.discrete)
        return prior + log_det, likelihood, log_det, {name: site["value"] for name, site in sites.items()}

    def _log_posterior(self, latents: dict[str, Tensor], u: Tensor) -> Tensor:
        one_way = [] if self.knows_guide else _one_way(self._guide_trace, self._drawn)
        if one_way:
            raise ValueError(
                f"sites {one_way} of the guide are flows without an inverse, so that their density is known at "
                "their own draws only; expected a density at any point. Try adaptive_importance_sampling, annealing "
                "from there, or a flow with an inverse, such as affine_autoregressive."
            )
        if not self.knows_guide:
            raise ValueError(
                f"the guide draws {sorted(self._drawn - self.sampler.pair.latents)}, which are no latents of the "
                "model and not their unconstrained values, so that its density at a point is not known. Try "
                "adaptive_importance_sampling, or annealing from there."
            )
        if len(self._drawn) == 1 and not self.discrete:  # q depends on no other latent, and its encoder ran already
            name = next(iter(self._drawn))
            moved = {**self._guide_trace.nodes[name], "value": latents[name]}
            log_prob, outside = site_log_prob(moved), outside_support(moved)
            if outside is not None:
                log_prob = log_prob.masked_fill(outside, -inf)
            return self.layout.sum_to_points(name, log_prob, self.rows)
        enumerated, count = self.sampler.pair.enumerated, len(u)
        if self._drawn <= self.sampler.pair.latents:
            run = self.sampler.run
            trace = run(self.sampler.guide, count, self.rows, values=latents, enumerate_sites=enumerated)
        else:
            trace = self._preimages.run(latents, u)
        value = self.sampler.log_posterior(trace, count, self.rows, summed=enumerated)
        outside = self.sampler.outside(trace, self.rows)
        return value if outside is None else value.masked_fill(outside, -inf)


def continuous_latents(model_trace: Any, discrete: set[str]) -> dict[str, dict]:
    """The latent sites of a trace of the model but for those that are summed out.

    Raises:
        ValueError: one of them is discrete.
    """
    latents = {n: s for n, s in sample_sites(model_trace).items() if not s["is_observed"] and n not in discrete}
    for name, site in latents.items():
        if getattr(support_of(site["fn"]), "is_discrete", False):
            raise ValueError(
                f"site {name!r} is discrete; this needs continuous latents, and discrete ones to be marked for summing "
                "out. Try pyro.infer.config_enumerate on model and guide, or importance_sampling with its defaults."
            )
    return latents


def _one_way(guide_trace: Any, names: set[str]) -> list[str]:
    """Sites of a guide that score nothing but their own draws: flows without an inverse."""
    found = []
    for name in sorted(names):
        site = guide_trace.nodes[name]
        try:
            site_log_prob({**site, "value": site["value"].clone()})
        except (NotImplementedError, KeyError):
            found.append(name)
    return found
