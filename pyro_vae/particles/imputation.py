r"""Imputation: draws of missing values given the observed ones,

    x_mis ~ p(x_mis|x_obs) = ∫ p(x_mis|z) p(z|x_obs) dz,

by sampling-importance-resampling: z_k ~ q(z|x_obs), k = 1…K; z is drawn among them with probabilities ∝ w_k =
p(x_obs, z_k) / q(z_k|x_obs), then x_mis ~ p(x_mis|z) (Rubin 1987, *The calculation of posterior distributions by data
augmentation: comment*; Mattei & Frellsen 2019, *MIWAE*). Exact as K → ∞, whatever the guide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import checked
from pyro_vae.distributions.protocol import ignores_missing
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.sites import sample_sites
from pyro_vae.pairs.threads import one_thread
from pyro_vae.pairs.validity import check_density
from pyro_vae.particles.outside import checked_draws
from pyro_vae.particles.particles import chosen
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["impute"]


@one_thread
@checked
@seeded
def impute(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_draws: int = 1,
    num_particles: int = 100,
    draws: Mapping[str, Tensor] | None = None,
    plate: str = "data",
    parallel: bool | str = "auto",
    seed: int | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Completes data with missing values (NaN), as draws from the model's predictive distribution given the observed.

    Args:
        model: a Pyro model with the data points in a plate, whose likelihood takes NaN as missing (`ObservedPart`).
        guide: its guide.
        *args: what both are called with.
        num_draws: S ≥ 1, draws of each missing value, for multiple imputation; their mean estimates E[x_mis|x_obs].
        num_particles: K, draws of the guide for each data point, of which S are taken with replacement, by weight; 1
            trusts the guide as it is. The bias is of order 1/K.
        draws: {site: (S, N, *inner plates, *event)}, draws of the latents from their posterior given what is observed,
            such as those of `draw_posterior`, in place of draws of the guide; S takes the place of `num_draws`.
        plate: name of the plate of data points.
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        **kwargs: what both are called with.

    Returns:
        {site: (S, N, *inner plates, *event)} for each observed site that takes NaN as missing; observed values as they
        are.

    Raises:
        ValueError: no observed site takes NaN as missing; discrete latents that the model sums out; a pair that
            `draw_particles` refuses.

    Example:
        >>> from pyro_vae import VAE
        >>> from pyro_vae.distributions import ConditionalNormal, ObservedPart, StandardNormal
        >>> from pyro_vae.networks import MLP, MaskedInput
        >>> likelihood = ObservedPart(ConditionalNormal(MLP(1, []), 3, scale=1.0))
        >>> vae = VAE(StandardNormal(1), likelihood, ConditionalNormal(MaskedInput(MLP(6, [])), 1))
        >>> x = torch.tensor([[0.5, torch.nan, 1.0], [torch.nan, torch.nan, 0.0]])
        >>> complete = impute(vae.model, vae.guide, x, num_draws=4)["x"]
        >>> complete.shape, complete.isnan().any().item(), complete[:, 0, 0]
        (torch.Size([4, 2, 3]), False, tensor([0.5000, 0.5000, 0.5000, 0.5000]))
    """
    sampler = ParticleSampler(model, guide, args, kwargs, plate=plate, parallel=parallel)
    if num_particles > 1:  # one draw of a point needs no weight
        check_density(sampler.pair)
    sampler.layout.check_vectorized("impute")
    if sampler.pair.summed:
        raise ValueError(
            f"impute: latent sites {sorted(sampler.pair.summed)} are summed out in the model, so that there is no "
            "draw of them to go with x. Try a guide that draws them."
        )
    pieces: dict[str, list[Tensor]] = {}
    with torch.no_grad(), evaluation_mode(model, guide):
        sites = {n: s for n, s in sample_sites(sampler.pair.look.model).items() if not s["is_observed"]}
        if draws is not None:
            shapes = {n: (sampler.num_points, *sampler.layout.align(s).shape[2:]) for n, s in sites.items()}
            draws = checked_draws(draws, {n: (s, shapes[n]) for n, s in sites.items()})
            num_draws = num_particles = len(next(iter(draws.values())))
            sampler.check()
        for rows in sampler.chunks(num_particles, together=num_particles)[0]:
            if draws is None:
                guide_trace, model_trace = sampler.traces(num_particles, rows)
                weight = sampler.weigh(guide_trace, model_trace, num_particles, rows).log_weight.softmax(0)  # (K, N)
                index = torch.multinomial(weight.T, num_draws, replacement=True).T  # (S, N)
            else:
                values = {n: sampler.layout.place(s, draws[n][:, rows]) for n, s in sites.items()}
                model_trace = sampler.run(sampler.model, num_draws, rows, values=values)
                index = torch.arange(num_draws).unsqueeze(1).expand(-1, rows.stop - rows.start)
            for name, site in sample_sites(model_trace).items():
                if site["is_observed"] and ignores_missing(site["fn"]):
                    complete = _completed(sampler, site, rows, index, num_particles)
                    pieces.setdefault(name, []).append(complete)
    if not pieces:
        raise ValueError("impute: no observed site takes NaN as missing. Try ObservedPart(likelihood).")
    return {name: torch.cat(values, 1) for name, values in pieces.items()}


def _completed(sampler: ParticleSampler, site: dict, rows: slice, index: Tensor, num_particles: int) -> Tensor:
    """Values of a site with draws in place of what is missing, given the particles with the indices (S, N) of K."""
    drawn = sampler.layout.align(site | {"value": site["fn"].sample()}, rows)  # (K, N, …)
    observed = sampler.layout.align(site, rows)  # (1 or K, N, …)
    drawn = chosen(drawn.expand(num_particles, *drawn.shape[1:]), index.to(drawn.device))
    return torch.where(observed[:1].isnan(), drawn.to(observed.dtype), observed[:1])
