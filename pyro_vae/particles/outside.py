r"""What is outside of the plate of data points: globals θ, with log p(θ) and log q(θ), and what is observed there.

    p(x, z, θ) = p(θ, x_outside) Π_n p(x_n, z_n|θ):

data points are independent given θ, and the first factor belongs to none of them. Without latents outside, it is a
constant, that does not enter weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.pairs.handlers import StopAfter
from pyro_vae.pairs.layout import Layout
from pyro_vae.pairs.modes import evaluation_mode, fork_random_state
from pyro_vae.pairs.sites import outside_support, site_log_prob
from pyro_vae.pairs.supports import inside_support

if TYPE_CHECKING:
    from pyro_vae.particles.sampler import ParticleSampler

__all__ = [
    "Outside",
    "check_constants",
    "checked_draws",
    "draw_outside",
    "given_outside",
    "log_prob_outside",
]


class Outside(NamedTuple):
    """Draws θ of what is outside of the data plate.

    Attributes:
        values: of the guide's sites outside, auxiliary ones too, {site: (S, …) as in traces}, for
            `ParticleSampler.given`.
        latents: of the model's latents outside, {site: (S, *plates, *event)}.
        log_p: log p(θ, x_outside), (S,), nats.
        log_q: log q(θ), (S,), nats; zero where the draws are given.
    """

    values: dict[str, Tensor]
    latents: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor


def draw_outside(sampler: ParticleSampler, num_samples: int) -> Outside:
    """S draws from the guide. Neither guide nor model run on after what is outside."""
    look = sampler.pair.look
    guide, model = (StopAfter(sampler.pair.outside(trace)) for trace in look[:2])
    guide_trace = sampler.run(guide(sampler.guide), num_samples)
    model_trace = sampler.run(model(sampler.model), num_samples, replay=guide_trace)
    values = {name: s["value"] for name, s in sampler.pair.outside(guide_trace).items() if not s["is_observed"]}
    log_q = log_prob_outside(sampler, guide_trace, observed=False)
    log_p = log_prob_outside(sampler, model_trace)
    around = Layout(look, None, sampler.rows)
    latents = {name: around.align(site)[:, 0] for name, site in _latents(sampler, model_trace).items()}
    return Outside(values, latents, log_p.expand(num_samples), log_q.expand(num_samples))


def given_outside(sampler: ParticleSampler, draws: Mapping[str, Tensor]) -> Outside:
    """Draws {site: (S, *plates, *event)} of all latents outside, from elsewhere."""
    sites = _latents(sampler, sampler.pair.look.model)
    around = Layout(sampler.pair.look, None, sampler.rows)
    shapes = {name: tuple(around.align(site).shape[2:]) for name, site in sites.items()}
    latents = checked_draws(draws, {name: (site, shapes[name]) for name, site in sites.items()})
    values = {name: around.place(site, latents[name].unsqueeze(1)) for name, site in sites.items()}
    zero = torch.zeros(len(next(iter(latents.values()))) if latents else 1, device=sampler.layout.device)
    return Outside(values, latents, zero, zero)


def checked_draws(draws: Mapping[str, Any], sites: Mapping[str, tuple[dict, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Draws of these sites, in the dtype of their values.

    Args:
        draws: {site: (S, *shape)}.
        sites: {site: (site of a trace, shape of one draw)}.

    Raises:
        ValueError: a site without draws, draws of another shape, or as many of some as of others; draws that are NaN or
            outside of the support of their prior.
    """
    if missing := sorted(sites.keys() - draws.keys()):
        raise ValueError(
            f"draws: expected draws of the sites {sorted(sites)}, missing {missing}, got {sorted(draws)}. Try draws of "
            "all of them, as mcmc.get_samples() or draw_posterior(…) give."
        )
    found = {}
    for name, (site, shape) in sites.items():
        value = torch.as_tensor(draws[name]).to(site["value"])
        if value.dim() != 1 + len(shape) or tuple(value.shape[1:]) != shape or not len(value):
            raise ValueError(
                f"draws[{name!r}]: expected S draws of shape {shape}, {('S', *shape)}, got {tuple(value.shape)}. Try "
                ".flatten(0, 1) if chains come first."
            )
        try:
            inside = inside_support(site["fn"], value)
        except (RuntimeError, ValueError):  # a support that depends on other draws
            inside = None
        if (value.is_floating_point() and not torch.isfinite(value).all()) or (inside is not None and not inside.all()):
            raise ValueError(
                f"draws[{name!r}]: expected values inside of the support of its prior, got some outside. Try others."
            )
        found[name] = value
    if len({len(value) for value in found.values()}) > 1:
        raise ValueError(
            f"draws: expected as many of each site, got { {n: len(v) for n, v in found.items()} }. Try v[:100]."
        )
    return found


def _latents(sampler: ParticleSampler, model_trace: Any) -> dict[str, dict]:
    return {name: s for name, s in sampler.pair.outside(model_trace).items() if not s["is_observed"]}


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
    """Raises ValueError where a site outside of the plate depends on latents inside."""
    if not sampler.pair.outside(sampler.pair.look.model):
        return
    with fork_random_state(), torch.no_grad(), evaluation_mode(sampler.model, sampler.guide):
        one = draw_outside(sampler, 1)
        values = {name: one.values[name].expand(4, *one.values[name].shape[1:]) for name in one.latents}
        sites = sampler.pair.outside(sampler.run(sampler.model, 4, values=values))
    for name, site in sites.items():
        value = _by_particle(sampler, site_log_prob(site))
        if not torch.allclose(value, value[:1].expand_as(value), rtol=1e-4, atol=1e-4, equal_nan=True):
            raise ValueError(
                f"site {name!r} is outside plate {sampler.layout.plate!r}, and depends on latents inside of it: data "
                "points are not independent, and have no log p(x) each. Try to move it in, or plate=None for the joint "
                "evidence of all data."
            )


def _by_particle(sampler: ParticleSampler, value: Tensor) -> Tensor:
    value = value.reshape((1,) * (sampler.layout.width - value.dim()) + value.shape)
    return value.reshape(len(value), -1)
