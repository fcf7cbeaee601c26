"""What data must be before anything is computed from them, and the errors that say so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae import arguments
from pyro_vae.distributions.protocol import complete, ignores_missing
from pyro_vae.pairs.look import Look
from pyro_vae.pairs.sites import enumerates, is_inside, plate_frames, sample_sites

__all__ = [
    "check_function",
    "check_latents",
    "check_plate",
    "check_roles",
    "check_rows",
    "check_sites",
    "check_support",
]


def check_rows(data: Any, *, start: int = 0, incomplete: Iterable[Tensor] = ()) -> None:
    """Raises ValueError if a floating tensor in `data` (nested tuples and dicts) has a row that is not finite.

    `start` is the index of the first row, for the message; `incomplete` are tensors in which NaN stands for a missing
    value.
    """
    values = data.values() if isinstance(data, dict) else data if isinstance(data, (tuple, list)) else [data]
    for i, x in enumerate(values):
        if isinstance(x, (tuple, list, dict)):
            check_rows(x, start=start, incomplete=incomplete)
        elif isinstance(x, Tensor) and x.is_floating_point() and x.dim() and not torch.isfinite(x.sum()):
            may_miss = any(x is y for y in incomplete)
            bad = (x.isinf() if may_miss else ~torch.isfinite(x)).reshape(len(x), -1).any(1)
            if bad.any():
                raise ValueError(
                    f"argument {i}: {int(bad.sum())} of {len(x)} rows are {'' if may_miss else 'NaN or '}infinite, the "
                    f"first at row {start + int(bad.nonzero()[0])}: expected finite numbers, got others. Try "
                    "x[torch.isfinite(x).flatten(1).all(1)], or to fill them in; for missing values, "
                    "ObservedPart(likelihood) and MaskedInput(network)."
                )


def check_support(name: str, site: dict, start: int = 0) -> None:
    """Raises ValueError if the observed value of a trace's site lies outside the support of its distribution."""
    fn, value = site["fn"], site["value"]
    if site["mask"] is not None or not value.numel() or isinstance(fn, dist.MaskedDistribution):
        return
    try:
        inside = fn.support.check(value)
    except (AttributeError, NotImplementedError):
        return
    if bool(inside.all()):
        return
    bad = (~inside).reshape(len(inside), -1).any(1) if inside.dim() else ~inside.reshape(1)
    row = int(bad.nonzero()[0])
    base = complete(fn)
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    family = type(base).__name__
    advice = "Try another likelihood, or transform the data."
    if base.support is constraints.boolean:
        advice = "Try (x > 0.5).to(x.dtype), or torch.bernoulli(x) for a fresh binarisation, or a Normal likelihood."
    elif isinstance(base, dist.Normal):
        advice = "Try to fill in or drop values that are not finite."
    outside = value.reshape(len(inside), -1)[row] if inside.dim() else value.reshape(-1)
    outside = outside[~outside.isnan()] if ignores_missing(fn) else outside
    raise ValueError(
        f"site {name!r}: {int(bad.sum())} of {bad.numel()} rows lie outside the support of {family} ({base.support}), "
        f"the first at row {start + row}, with values from {float(outside.min()):.4g} to {float(outside.max()):.4g}: "
        f"expected values in the support, got others. {advice}"
    )


def check_function(role: str, function: Any) -> None:
    """Raises TypeError for a model or guide that cannot be run."""
    arguments.check_function(role, function, advice="tool(model, guide, x), with vae.model and vae.guide of a VAE")


def check_roles(model: Callable, guide: Callable, look: Look, *, observes: bool = False) -> None:
    """Raises ValueError for a model and a guide in each other's place.

    Args:
        model: the model.
        guide: its guide.
        look: at both.
        observes: whether the model has to observe something.
    """
    sites = map(sample_sites, (look.model, look.guide))
    observed, given = ({name for name, site in found.items() if site["is_observed"]} for found in sites)
    if not observed and (observes or given or model == guide):
        swapped = f", while the guide observes {sorted(given)}" if given else ""
        raise ValueError(
            f"model: expected a site with obs=…, got {_named(model)}: the model observes no site{swapped}; there is no "
            "x to have a density. Try pyro.sample(…, obs=x), and look at the order of the arguments, (model, guide, x)."
        )
    if model == guide:  # a guide may run the model, as Pyro's AutoMessengers do, and observe what it observes
        raise ValueError(
            f"guide: expected draws of the latents given the data, got {_named(guide)}, which observes all that the "
            f"model observes, {sorted(observed)}: log p − log q would hold nothing of the data. Try a guide that has "
            "pyro.sample(…) of the latents only, without obs."
        )


def _named(function: Callable) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def check_plate(look: Look, plate: str | None) -> None:
    """Raises ValueError where there is no plate of this name."""
    if plate is None or look.frame(plate) is not None:
        return
    plates = {f.name: f.size for f in plate_frames(*look[:2])}
    found = ", ".join(f"{name!r} ({size})" for name, size in plates.items())
    advice = "plate=… with one of these names" if found else f"with pyro.plate({plate!r}, len(x))"
    raise ValueError(
        f"plate: expected one around each data point, got no plate {plate!r} in model and guide (their plates: "
        f"{found or 'none'}); the evidence of each "
        f"data point needs one around all that belongs to a point. Try {advice}, or plate=None for the joint "
        "evidence of all data."
    )


def check_sites(look: Look, plate: str | None, *, outside: str = "") -> None:
    """Raises ValueError for sites outside of the data plate, and for subsamples where all data are one point.

    Args:
        look: at the pair.
        plate: of data points.
        outside: which sites may be outside of it: none (""), "observed" ones, which are constants then, or "any".
    """
    for where, trace in (("guide", look.guide), ("model", look.model)):
        for name, site in sample_sites(trace).items():
            if site["infer"].get("num_samples") and site["infer"].get("enumerate"):
                raise ValueError(
                    f"site {name!r} of the {where} is enumerated by draws (num_samples), which is no sum over its "
                    "values. Try enumerate='parallel' without num_samples."
                )
            if is_inside(site, plate):
                continue
            if outside == "any" and not (enumerates(site) and not site["is_observed"]):
                continue
            if not (outside == "observed" and site["is_observed"]):
                raise ValueError(_outside(name, site, where, str(plate)))
    for f in plate_frames(*look[:2]):
        if plate is not None and f.name != plate and f.full_size is not None and 0 < f.size < f.full_size:
            raise ValueError(
                f"plate {f.name!r} inside of plate {plate!r} has {f.size} of {f.full_size} elements; log p(x) of a "
                "data point needs all of them. Try to call model and guide without subsample_size."
            )
        if plate is None and f.full_size is not None and f.size < f.full_size:
            raise ValueError(
                f"plate {f.name!r} has {f.size} of {f.full_size} data points; the joint evidence (plate=None) "
                "needs all of them. Try to call model and guide on all data, without subsample_size."
            )


def _outside(name: str, site: dict, where: str, plate: str) -> str:
    plates = ", ".join(repr(f.name) for f in site["cond_indep_stack"]) or "none"
    found = f"site {name!r} of the {where} is outside plate {plate!r} (its plates: {plates}); "
    if site["is_observed"]:
        return found + "its log-probability belongs to no data point. Try to move it in."
    if enumerates(site):
        return found + (
            "it is enumerated, and given the other latents alone data points are not independent. Try plate=None for "
            "the joint evidence of all data."
        )
    return found + (
        "data points are independent only given its value, and have no log p(x) each. Try to move it in, "
        "integrated_log_likelihood for log p(x_n|θ) at draws of it, poutine.condition on model and guide to fix its "
        "value, or plate=None for the joint evidence of all data."
    )


def check_latents(drawn: dict[str, dict], latents: Collection[str]) -> None:
    """Raises ValueError unless the guide draws each of these latents, and besides them auxiliary sites only.

    Args:
        drawn: sites that the guide draws.
        latents: names of the model's latent sites that are not summed out.
    """
    missing = set(latents) - drawn.keys()
    extra = {name for name, site in drawn.items() if name not in latents and not site["infer"].get("is_auxiliary")}
    if missing or extra:
        raise ValueError(
            f"model and guide have different latent sites: {sorted(missing) or 'none'} only in the model, "
            f"{sorted(extra) or 'none'} only in the guide. Expected each latent of the model in the guide, under "
            "the same name, or marked by pyro.infer.config_enumerate(model) to be summed out. Try "
            "pyro.render_model on both to see them."
        )
