r"""Log-densities of globals and locals: what joint evidence and evidence given globals need of a (model, guide) pair.

The continuous latents outside of the data plate become one vector g in R^G, those of each data point a vector u_n in
R^D, by the bijections of their supports:

    log p(g, u, x) = log p(g) + log p(x_outside|g) + Σ_n [log p(u_n|g) + log p(x_n|u_n, g)],

log-determinants included; latents that are discrete are summed out of each point.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_vae.evidence.density import continuous_latents
from pyro_vae.pairs.handlers import StopAfter, unobserved
from pyro_vae.pairs.layout import Layout
from pyro_vae.pairs.sites import is_inside, sample_sites, site_mask
from pyro_vae.particles.latents import Coordinates
from pyro_vae.particles.outside import log_prob_outside
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["JointDensity"]


class JointDensity:
    """p(g), p(u|g) and p(x|u, g) of a pair with latents outside of its data plate, all rows together.

    Args:
        sampler: of the pair, made with `outside=True`.

    Attributes:
        global_dim: G.
        dim: D, of one point.
        num_points: N.
        outside: names of the model's continuous latents outside of the plate.
        inside: names of those inside.

    Raises:
        ValueError: a latent that is masked; a discrete latent that is not marked for enumeration; a plate that
            subsamples; a support without a bijection.
    """

    def __init__(self, sampler: ParticleSampler) -> None:
        if sampler.rows.fixed is not None and sampler.rows.fixed != sampler.num_points:
            raise ValueError(
                f"plate {sampler.layout.plate!r} has {sampler.rows.fixed} of {sampler.num_points} data points; globals "
                "depend on all of them. Try to call model and guide without subsample_size."
            )
        self.sampler, self.num_points = sampler, sampler.num_points
        self.discrete = sampler.pair.summed | sampler.pair.enumerated
        with torch.no_grad():
            latents = continuous_latents(sampler.traces(1, check=False)[1], self.discrete)
        masks = {name: site_mask(site) for name, site in latents.items()}
        if masked := [name for name, mask in masks.items() if mask is not None and not mask.all()]:
            raise ValueError(
                f"latent sites {masked} are masked. Where a latent is masked, it has no density, and no posterior to "
                "fit a Gaussian to. Try importance_sampling, or annealed_importance_sampling from the guide."
            )
        plate = sampler.layout.plate
        self.inside = [name for name, site in latents.items() if is_inside(site, plate)]
        self.outside = [name for name in latents if name not in self.inside]
        around = Layout(sampler.pair.look, None, sampler.rows)
        self._globals = Coordinates({n: latents[n] for n in self.outside}, around, None)
        self._locals = Coordinates({n: latents[n] for n in self.inside}, sampler.layout, None)
        self._dtype = next((site["value"].dtype for site in latents.values()), None)
        self.global_dim, self.dim = self._globals.dim, self._locals.dim

    # -- draws --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(self, num_particles: int) -> tuple[Tensor, Tensor]:
        """g, u ~ q, (K, G) and (K, N, D); NaN for draws outside of the prior's support."""
        trace = self.sampler.traces(num_particles, check=False)[1]
        return self._join(self._globals, trace, num_particles)[:, 0], self._join(self._locals, trace, num_particles)

    @torch.no_grad()
    def draw_prior(self, num_particles: int) -> Tensor:
        """g ~ p(g), (K, G)."""
        trace = self.sampler.run(StopAfter(self.outside)(unobserved(self.sampler.model)), num_particles)
        return self._join(self._globals, trace, num_particles)[:, 0]

    @torch.no_grad()
    def draw_locals_from_prior(self, g: Tensor) -> Tensor:
        """u ~ p(u|g), (K, N, D), for g of shape (K, G)."""
        prior = StopAfter(self.inside)(unobserved(self.sampler.model))
        trace = self.sampler.run(prior, len(g), unconstrained=self._globals.split(g.unsqueeze(1)))
        return self._join(self._locals, trace, len(g))

    def _join(self, coordinates: Coordinates, trace: object, num_particles: int) -> Tensor:
        points = 1 if coordinates is self._globals else self.num_points
        if not coordinates.dim:
            return torch.zeros(num_particles, points, 0, device=self.sampler.layout.device, dtype=self._dtype)
        return coordinates.join(trace).expand(num_particles, points, -1)

    @torch.no_grad()
    def latents(self, g: Tensor, u: Tensor) -> dict[str, Tensor]:
        """The latents themselves, {site: (K, *plates, *event)} outside and {site: (K, N, *inner plates, *event)}."""
        sampler = self.sampler
        stop = StopAfter([*self.outside, *self.inside])(unobserved(sampler.model))
        sites = sample_sites(sampler.run(stop, len(g), unconstrained=self._split(g, u)))
        found = {name: self._globals.layout.align(sites[name])[:, 0] for name in self.outside}
        return found | {name: sampler.layout.align(sites[name]) for name in self.inside}

    @torch.no_grad()
    def globals_of(self, values: Mapping[str, Tensor], num_samples: int) -> Tensor:
        """g of the sites outside, {site: (S, …) as in traces}, (S, G)."""
        stop = StopAfter(self.outside)(unobserved(self.sampler.model))
        own = {name: values[name] for name in self.outside}
        return self._join(self._globals, self.sampler.run(stop, num_samples, values=own), num_samples)[:, 0]

    def _split(self, g: Tensor, u: Tensor) -> dict[str, Tensor]:
        return self._globals.split(g.unsqueeze(1)) | self._locals.split(u)

    # -- densities ----------------------------------------------------------------------------------------------------

    def terms(self, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log p(g) and log p(x_outside|g), each (K,); log p(u_n|g) and log p(x_n|u_n, g), each (K, N); nats."""
        sampler, count = self.sampler, len(g)
        trace = sampler.run(sampler.model, count, enumerate_sites=self.discrete, unconstrained=self._split(g, u))
        prior, likelihood = sampler.log_prior_likelihood(trace, count, None, summed=self.discrete)
        log_det = sum((sampler.layout.sum_to_points(n, trace.nodes[n]["log_det"], None) for n in self.inside), 0.0)
        log_p = log_prob_outside(sampler, trace, observed=False)
        log_det_g = sum((trace.nodes[n]["log_det"].reshape(count, -1).sum(1) for n in self.outside), 0.0)
        likelihood_outside = log_prob_outside(sampler, trace) - log_p
        shape = count, self.num_points
        return (
            (log_p + log_det_g).expand(count),
            likelihood_outside.expand(count),
            (prior + log_det).expand(shape),
            likelihood.expand(shape),
        )

    def log_joint(self, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(g) + log p(x_outside|g), (K,); log p(u_n, x_n|g), (K, N); nats."""
        prior_g, outside, prior, likelihood = self.terms(g, u)
        return prior_g + outside, prior + likelihood

    def gradient(self, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of log p(g, u, x), (K, G) and (K, N, D)."""
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (g, u)]
            total = torch.stack([t.sum() for t in self.log_joint(*leaves)]).sum()
            found = torch.autograd.grad(total, leaves, allow_unused=True)
        return tuple(torch.zeros_like(t) if d is None else d for d, t in zip(found, leaves, strict=True))  # type: ignore[return-value]
