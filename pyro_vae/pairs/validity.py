"""Whether the weights p(x, z) / q(z|x) of a pair's draws mean anything: what would make them look fine and be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.pairs.handlers import SetSubsample, SetValues
from pyro_vae.pairs.look import Look
from pyro_vae.pairs.modes import evaluation_mode, fork_random_state
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.rows import WINDOW
from pyro_vae.pairs.sites import base_distribution, is_inside, sample_sites, site_log_prob, site_mask
from pyro_vae.pairs.supports import bijection
from pyro_vae.pairs.untouched import Untouched

__all__ = ["check_density", "check_masks", "is_factored"]

MOST_COMPARED = 200  # numbers whose Jacobian is compared


def check_density(pair: Pair) -> None:
    """Raises ValueError where draws of the guide have no density: their weights would be meaningless.

    A point (Delta) is right only as the image of auxiliary draws u, z = f(u) with its log-determinant, as Pyro's
    autoguides write it: a bijection, so that there are as many numbers in the auxiliary sites as in the points. A guide
    with fewer puts mass on points (`AutoDelta`, `AutoLaplaceApproximation` before its Laplace step, a list with one of
    these); one with more draws variables that nothing in the model accounts for, and the mean of its weights is no
    p(x). The log-determinant is compared with that of the Jacobian, where there are few enough numbers.
    """
    look = pair.look
    for name, site in sample_sites(look.guide).items():
        if isinstance(base_distribution(site["fn"]), dist.Unit):
            raise ValueError(
                f"site {name!r} of the guide is a pyro.factor: whether it belongs to the density of draws cannot be "
                "told. Try log_density of a Delta for a log-determinant, and a factor of the model for anything else."
            )
    sites, points, auxiliary, images = _through_points(look)
    drawn = sum(int(sites[n]["value"].numel()) for n in auxiliary)
    through = sum(_unconstrained(look.model.nodes[n])[0].numel() for n in images)
    if drawn < through:
        names = ", ".join(map(repr, sorted(points)))
        raise ValueError(
            f"site {names} of the guide is a point (Delta), which has no density to weigh its draws by: {through} "
            f"numbers in points that are latents, and {drawn} in auxiliary sites that they could be images of. Try a "
            "guide that is a distribution, such as pyro.infer.autoguide.AutoNormal."
        )
    if drawn > through:
        raise ValueError(
            f"the guide draws {drawn} numbers in auxiliary sites ({', '.join(map(repr, auxiliary))}), and {through} in "
            "latents that are images of them (Delta). What is drawn beyond that is integrated over nothing in the "
            "model, so that the weights do not have the mean p(x). Try to integrate it out of the guide, or a density "
            "for it in the model."
        )
    if 0 < drawn <= MOST_COMPARED:
        _check_jacobian(pair, auxiliary, images)


def is_factored(pair: Pair) -> bool:
    """Whether a guide is q(θ) q(z|θ), with densities of its own for the latents θ outside of the data plate and z
    inside, and not one joint density of which both are images, as that of `AutoMultivariateNormal`."""
    look = pair.look
    sites, _, auxiliary, images = _through_points(look)
    for inside in (True, False):
        drawn = [sites[n] for n in auxiliary if is_inside(sites[n], pair.plate) == inside]
        through = [look.model.nodes[n] for n in images if is_inside(sites[n], pair.plate) == inside]
        if sum(int(s["value"].numel()) for s in drawn) != sum(_unconstrained(s)[0].numel() for s in through):
            return False
    return True


def _through_points(look: Look) -> tuple[dict[str, dict], set[str], list[str], list[str]]:
    """What a guide draws: all its sites; points among them; auxiliary sites; latents that are images of these."""
    sites = {n: s for n, s in sample_sites(look.guide).items() if not s["is_observed"]}
    latents = {n for n, s in sample_sites(look.model).items() if not s["is_observed"]}
    points = {n for n, s in sites.items() if _is_point(s["fn"])}
    # a point of the model too, such as a prior that is one, has the weight one
    points -= {n for n in points & latents if _is_point(look.model.nodes[n]["fn"])}
    auxiliary = [n for n in sites if n not in latents and n not in points]
    return sites, points, auxiliary, [n for n in sites if n in points & latents]


@torch.enable_grad()
def _check_jacobian(pair: Pair, auxiliary: list[str], images: list[str]) -> None:
    """Compares the log-densities that points claim with log |det du/dz|, over the rows of the look."""
    look = pair.look
    u = {name: look.guide.nodes[name]["value"].detach().clone().requires_grad_() for name in auxiliary}
    args, kwargs = pair.rows.cut(slice(0, WINDOW))
    handlers = SetSubsample(look.subsamples()), SetValues(u)
    with (
        fork_random_state(),
        torch.enable_grad(),
        poutine.block(),
        pyro.validation_enabled(False),
        Untouched(pair.guide),
        evaluation_mode(pair.guide),
        handlers[0],
        handlers[1],
    ):
        sites = sample_sites(poutine.trace(pair.guide).get_trace(*args, **kwargs))
        claimed = sum(site_log_prob(sites[name]).sum() for name in images)
        parts = [_unconstrained({**look.model.nodes[name], "value": sites[name]["value"]}) for name in images]
    w, log_det = torch.cat([part.reshape(-1) for part, _ in parts]), sum(det for _, det in parts)
    rows = []
    for number in w:
        found: Sequence[Tensor | None] = [None] * len(u)
        if number.requires_grad:
            found = torch.autograd.grad(number, list(u.values()), retain_graph=True, allow_unused=True)
        pairs = zip(found, u.values(), strict=True)
        rows.append(torch.cat([(torch.zeros_like(v) if g is None else g).reshape(-1) for g, v in pairs]))
    expected = -torch.linalg.slogdet(torch.stack(rows).double()).logabsdet - log_det
    claimed, expected = torch.as_tensor(claimed).detach(), expected.detach()
    if not (claimed - expected).abs() < 0.02 + 1e-3 * expected.abs():  # also where there is no inverse
        raise ValueError(
            f"sites {images} of the guide are points (Delta) that are functions of {auxiliary}, with a log_density of "
            f"{float(claimed):.4g} over {len(rows)} numbers; the Jacobian of these functions gives "
            f"{float(expected):.4g}. Try dist.Delta(z, log_density=…) with log |det du/dz|, of a function that can be "
            "inverted."
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


def _unconstrained(site: dict) -> tuple[Tensor, Tensor]:
    """A latent's value in unconstrained coordinates w, and log |det dz/dw| in total; z itself if nothing maps them."""
    try:
        transform = bijection("", site["fn"])
    except ValueError:
        return site["value"], torch.zeros(())
    w = transform.inv(site["value"])
    return w, transform.log_abs_det_jacobian(w, site["value"]).sum()


def _is_point(fn: Any) -> bool:
    """Whether a distribution puts mass on points of a continuous variable."""
    base = base_distribution(fn)
    if isinstance(base, torch.distributions.MixtureSameFamily):
        return _is_point(base.component_distribution)
    if isinstance(base, dist.MaskedMixture):
        return _is_point(base.component0) or _is_point(base.component1)
    return isinstance(base, (dist.Delta, dist.Empirical))
