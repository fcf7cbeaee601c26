"""Draws and quantiles of a guide, in the axes (draws, N data points, *inner plates, *event)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.distributions.gaussians import MultivariateNormal
from pyro_vae.guides.latents import Latent
from pyro_vae.guides.sites import acts_on_elements
from pyro_vae.pairs.layout import Layout
from pyro_vae.pairs.modes import evaluation_mode, fork_random_state
from pyro_vae.pairs.seeds import seeded, store_as_it_was
from pyro_vae.pairs.sites import sample_sites
from pyro_vae.pairs.supports import bijection
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["quantiles", "sample_posterior"]

DRAWS = 10_000  # for quantiles that have no closed form


@seeded
def sample_posterior(
    guide: Any, num_samples: int, args: tuple, kwargs: dict[str, Any], *, seed: int | None = None
) -> dict[str, Tensor]:
    """As `RowGuide.sample_posterior`."""
    sampler = _sampler(guide, args, kwargs)
    with torch.no_grad(), evaluation_mode(guide):
        return _aligned(sampler, guide, sampler.run(guide, num_samples))


def quantiles(guide: Any, levels: Sequence[float], args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """As `RowGuide.quantiles`."""
    try:
        level = torch.as_tensor(levels, dtype=torch.float64)
    except (TypeError, ValueError):
        level = torch.full((), torch.nan)
    if level.dim() != 1 or not ((level > 0) & (level < 1)).all():
        raise ValueError(
            f"quantiles: expected a sequence of levels between 0 and 1, got {levels}. Try [0.05, 0.5, 0.95]."
        )
    with store_as_it_was():
        sampler, found = _sampler(guide, args, kwargs), {}
    with torch.no_grad(), evaluation_mode(guide), torch.random.fork_rng():
        torch.manual_seed(0)  # the same guide has the same quantiles
        sites = sample_sites(sampler.run(guide, 8))
        q = None if guide.given else guide.get_posterior(*args, **kwargs)
        if isinstance(q, (dist.Independent, MultivariateNormal)):
            u = q.mean + q.variance.sqrt() * torch.special.ndtri(level).to(q.mean)[:, None, None]  # (Q, N, D)
            for latent in guide.latents.inside:
                if _is_fixed(latent, sites[latent.name]):
                    value = _value(latent, sites[latent.name]["fn"], u[..., latent.start : latent.stop])
                    value = value.sort(0).values[level.argsort().argsort()]  # a bijection may fall
                    found[latent.name] = sampler.layout.align({**sites[latent.name], "value": value})
        if guide.outside is not None and hasattr(guide.outside, "quantiles"):
            of_outside = guide.outside.quantiles([float(x) for x in levels], *args, **kwargs)
            found |= {name: _outside(sampler, sites[name], torch.as_tensor(v)) for name, v in of_outside.items()}
        missing = sites.keys() - found.keys()
        if missing:
            draws = _aligned(sampler, guide, sampler.run(guide, DRAWS))
            found |= {name: _empirical(draws[name], level) for name in draws.keys() - found.keys()}
    return {name: found[name] for name in _names(guide)}


def _sampler(guide: Any, args: tuple, kwargs: dict[str, Any]) -> ParticleSampler:
    guide.get_posterior(*args, **kwargs)  # says which rows are not finite, where Pyro validates
    model, elsewhere = guide.model, list(guide.latents.outside)
    if guide.outside is None and elsewhere:  # they have another guide, which is not asked: any value will do
        with poutine.block(), torch.no_grad(), fork_random_state(), evaluation_mode(model):
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        values = {name: trace.nodes[name]["value"] for name in elsewhere}
        model = poutine.block(poutine.condition(model, values), hide=elsewhere)
    return ParticleSampler(model, guide, args, kwargs, plate=guide.plate, outside=True)


def _names(guide: Any) -> list[str]:
    outside = [] if guide.outside is None else guide.latents.outside
    return [*outside, *(latent.name for latent in guide.latents.inside)]


def _aligned(sampler: ParticleSampler, guide: Any, trace: Any) -> dict[str, Tensor]:
    around = Layout(sampler.pair.look, None, sampler.rows)
    inside = {latent.name for latent in guide.latents.inside}
    return {
        name: sampler.layout.align(trace.nodes[name]) if name in inside else around.align(trace.nodes[name])[:, 0]
        for name in _names(guide)
    }


def _outside(sampler: ParticleSampler, site: dict, value: Tensor) -> Tensor:
    """Values (Q, *shape of a site outside of the plate) without the dimensions of plates that it is not in."""
    around = Layout(sampler.pair.look, None, sampler.rows)
    missing = around.width + len(site["fn"].event_shape) - value.dim()
    return around.align({**site, "value": value.reshape(len(value), *(1,) * missing, *value.shape[1:])})[:, 0]


def _is_fixed(latent: Latent, site: dict) -> bool:
    """Whether a site's bijection acts on single elements, and is the same in each of many draws."""
    fn = site["fn"]
    transform = bijection(latent.name, fn)
    if not acts_on_elements(transform):
        return False
    values = transform(torch.zeros(fn.batch_shape + latent.shape, device=site["value"].device))
    return bool((values == values[:1]).all())


def _value(latent: Latent, fn: Any, rows: Tensor) -> Tensor:
    """Values of coordinates (Q, N, size), in the dimensions of a site of many draws, of which one is enough."""
    transform, shape = bijection(latent.name, fn), fn.batch_shape + latent.shape
    return torch.stack([transform(u.expand(shape))[0] for u in latent.from_rows(rows)])


def _empirical(draws: Tensor, level: Tensor) -> Tensor:
    index = (level.to(draws.device) * len(draws)).long().clamp(max=len(draws) - 1)
    return draws.sort(0).values[index]
