"""Whether the weights p(x, z) / q(z|x) of a pair's draws mean anything: what would make them look fine and be wrong."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.pairs.look import Look
from pyro_vae.pairs.sites import base_distribution, sample_sites, site_mask
from pyro_vae.pairs.supports import support_of

__all__ = ["check_density", "check_masks"]


def check_density(look: Look) -> None:
    """Raises ValueError where draws of the guide have no density: their weights would be meaningless.

    A point (Delta) is right only as the image of auxiliary draws u, z = f(u) with its log-determinant, as Pyro's
    autoguides write it: a bijection, so that there are as many numbers in the auxiliary sites as in the points. A guide
    with fewer puts mass on points (`AutoDelta`, `AutoLaplaceApproximation` before its Laplace step, a list with one of
    these); one with more draws variables that nothing in the model accounts for, and the mean of its weights is no
    p(x).
    """
    for name, site in sample_sites(look.guide).items():
        if isinstance(base_distribution(site["fn"]), dist.Unit):
            raise ValueError(
                f"site {name!r} of the guide is a pyro.factor: whether it belongs to the density of draws cannot be "
                "told. Try log_density of a Delta for a log-determinant, and a factor of the model for anything else."
            )
    sites = {n: s for n, s in sample_sites(look.guide).items() if not s["is_observed"]}
    latents = {n for n, s in sample_sites(look.model).items() if not s["is_observed"]}
    points = {n for n, s in sites.items() if isinstance(base_distribution(s["fn"]), dist.Delta)}
    # a point of the model too, such as a prior that is one, has the weight one
    points -= {n for n in points & latents if isinstance(base_distribution(look.model.nodes[n]["fn"]), dist.Delta)}
    drawn = sum(_numel(s) for n, s in sites.items() if n not in latents and n not in points)
    through = sum(_unconstrained_numel(look.model.nodes[n]) for n in points if n in latents)
    if drawn < through:
        names = ", ".join(map(repr, sorted(points)))
        raise ValueError(
            f"site {names} of the guide is a point (Delta), which has no density to weigh its draws by: {through} "
            f"numbers in points that are latents, and {drawn} in auxiliary sites that they could be images of. Try a "
            "guide that is a distribution, such as pyro.infer.autoguide.AutoNormal."
        )
    if drawn > through:
        extra = ", ".join(repr(n) for n in sites if n not in latents and n not in points)
        raise ValueError(
            f"the guide draws {drawn} numbers in auxiliary sites ({extra}), and {through} in latents that are images "
            "of them (Delta). What is drawn beyond that is integrated over nothing in the model, so that the weights "
            "do not have the mean p(x). Try to integrate it out of the guide, or a density for it in the model."
        )


def check_masks(guide_trace: poutine.Trace, model_trace: poutine.Trace) -> None:
    """Raises ValueError where a latent counts in the model and not in the guide, or the other way round."""
    latents = {n: s for n, s in sample_sites(model_trace).items() if not s["is_observed"]}
    for name, site in latents.items():
        if name not in guide_trace.nodes:
            continue
        masks = [site_mask(s) for s in (site, guide_trace.nodes[name])]
        if all(mask is None for mask in masks):
            continue
        device = site["value"].device
        ours, theirs = torch.broadcast_tensors(
            *(torch.ones((), dtype=torch.bool, device=device) if m is None else m.to(device) for m in masks)
        )
        if not torch.equal(ours, theirs):
            raise ValueError(
                f"site {name!r} is masked differently in model and guide ({_share(ours)} of it counts in the model, "
                f"{_share(theirs)} in the guide), so that weights compare densities of different variables, and bound "
                "nothing. Try the same poutine.mask around the site in both; for obs_mask, a guide that masks "
                f"{name!r} by ~obs_mask."
            )


def _share(mask: Tensor) -> str:
    return f"{mask.float().mean():.0%}"


def _numel(site: dict) -> int:
    return int(site["value"].numel())


def _unconstrained_numel(site: dict) -> int:
    """How many numbers a bijection makes a site's value from: one less than a simplex has."""
    support: Any = support_of(site["fn"])
    try:
        return int(torch.distributions.biject_to(support).inv(site["value"]).numel())
    except NotImplementedError:
        return _numel(site)
