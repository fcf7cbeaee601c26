r"""What is outside of the plate of data points: globals θ, with log p(θ) and log q(θ), and what is observed there.

    p(x, z, θ) = p(θ, x_outside) Π_n p(x_n, z_n|θ):

data points are independent given θ, and the first factor belongs to none of them. Without latents outside, it is a
constant, that does not enter weights.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae.pairs.modes import evaluation_mode, fork_random_state
from pyro_vae.pairs.sites import outside_support, site_log_prob

if TYPE_CHECKING:
    from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["check_constants", "draw_outside", "log_prob_outside"]


def draw_outside(sampler: ParticleSampler, num_particles: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Draws θ from the guide, for `ParticleSampler.given`: {site of the guide: (K, …) as in traces}, auxiliary sites
    included; log p(θ, x_outside) and log q(θ), each (K,), nats."""
    guide_trace = sampler.run(sampler.guide, num_particles)
    model_trace = sampler.run(sampler.model, num_particles, enumerate_sites=sampler.pair.summed, replay=guide_trace)
    values = {name: s["value"] for name, s in sampler.pair.outside(guide_trace).items() if not s["is_observed"]}
    log_q = log_prob_outside(sampler, guide_trace, observed=False)
    log_p = log_prob_outside(sampler, model_trace)
    return values, log_p.expand(num_particles), log_q.expand(num_particles)


def log_prob_outside(sampler: ParticleSampler, trace: Any, *, observed: bool = True) -> Tensor:
    """Log-probability of sites outside of the plate, with those that are observed or without, (K,) or (1,), nats."""
    total = torch.zeros(1, device=sampler.layout.device)
    for site in sampler.pair.outside(trace).values():
        if site["is_observed"] and not observed:
            continue
        value = site_log_prob(site)
        outside = None if site["is_observed"] else outside_support(site)
        value = value if outside is None else value.masked_fill(outside, -inf)
        total = total + _by_particle(sampler, value).sum(1)
    return total


def check_constants(sampler: ParticleSampler) -> None:
    """Raises ValueError where a site that is observed outside of the plate depends on latents inside."""
    if not sampler.pair.outside(sampler.pair.look.model):
        return
    with fork_random_state(), torch.no_grad(), evaluation_mode(sampler.model, sampler.guide):
        sites = sampler.pair.outside(sampler.traces(4, check=False)[1])
    for name, site in sites.items():
        value = _by_particle(sampler, site_log_prob(site))
        if not torch.allclose(value, value[:1].expand_as(value), rtol=1e-4, atol=1e-4, equal_nan=True):
            raise ValueError(
                f"site {name!r} is observed outside plate {sampler.layout.plate!r}, and depends on latents inside of "
                "it: data points are not independent, and have no log p(x) each. Try to move it in, or plate=None for "
                "the joint evidence of all data."
            )


def _by_particle(sampler: ParticleSampler, value: Tensor) -> Tensor:
    return value.reshape((1,) * (sampler.layout.width - value.dim()) + value.shape).flatten(1)
