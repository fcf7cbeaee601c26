"""Reading traces: the sites that carry probability, their roles, log-probabilities, masks and plates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.pairs.supports import inside_support

__all__ = [
    "Site",
    "base_distribution",
    "enumerates",
    "find_sites",
    "is_inside",
    "outside_support",
    "plate_frames",
    "sample_sites",
    "site_log_prob",
    "site_mask",
]


@dataclass(frozen=True)
class Site:
    """A site of a pair.

    Attributes:
        name: in both traces.
        role: "latent" (drawn by the guide), "enumerated" (discrete, and summed out by the tools), "observed",
            "auxiliary" (of the guide alone) or "deterministic".
        plates: names of the plates around it, from left to right.
        event_dim: dimensions of one value.
    """

    name: str
    role: str
    plates: tuple[str, ...]
    event_dim: int


def find_sites(guide_trace: poutine.Trace, model_trace: poutine.Trace) -> dict[str, Site]:
    """The sites of a pair by name, the guide's auxiliary ones first."""
    sites = {}
    own = {n: s for n, s in sample_sites(guide_trace).items() if n not in model_trace.nodes}
    for name, node in own.items():
        sites[name] = _site(name, node, "observed" if node["is_observed"] else "auxiliary")
    for name, node in model_trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        if node["infer"].get("_deterministic"):
            role = "deterministic"
        elif node["is_observed"]:
            role = "observed"
        elif enumerates(guide_trace.nodes.get(name, node)):
            role = "enumerated"
        else:
            role = "latent"
        sites[name] = _site(name, node, role)
    return sites


def _site(name: str, node: dict, role: str) -> Site:
    frames = sorted((f for f in node["cond_indep_stack"] if f.dim is not None), key=lambda f: f.dim)
    return Site(name, role, tuple(f.name for f in frames), len(node["fn"].event_shape))


def sample_sites(trace: poutine.Trace) -> dict[str, dict]:
    """The sites that carry probability: not plates' subsamples, not `pyro.deterministic`."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not site["infer"].get("_deterministic")
    }


def is_inside(site: dict, plate: str | None) -> bool:
    """Whether a site is in the plate of this name; everything is in None, which stands for all data."""
    return plate is None or any(frame.name == plate for frame in site["cond_indep_stack"])


def enumerates(site: dict) -> bool:
    """Whether a latent site is discrete and marked for enumeration, as by `pyro.infer.config_enumerate`."""
    return bool(site["infer"].get("enumerate")) and getattr(site["fn"], "has_enumerate_support", False)


def site_log_prob(site: dict) -> Tensor:
    """log p of a trace's site with its mask, without its scale, over batch dimensions."""
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(value, mask=site["mask"])


def outside_support(site: dict) -> Tensor | None:
    """Where a latent's value has p(z) = 0, over batch dimensions: outside of the support, and not masked."""
    inside = inside_support(site["fn"], site["value"])
    if inside is None:
        return None
    mask = site_mask(site)
    return ~inside if mask is None else ~inside & mask


def site_mask(site: dict) -> Tensor | None:
    """Where a site counts, by `poutine.mask` and by its distribution's `.mask(…)` together; None: everywhere."""
    masks = [] if site["mask"] is None else [site["mask"]]
    fn, dims = site["fn"], 0
    while hasattr(fn, "base_dist"):
        if isinstance(fn, torch.distributions.Independent):
            dims += fn.reinterpreted_batch_ndims
        if isinstance(fn, dist.MaskedDistribution):
            mask = torch.as_tensor(fn._mask)
            masks.append(mask.flatten(mask.dim() - dims).all(-1) if dims and mask.dim() >= dims else mask)
        fn = fn.base_dist
    result: Any = None
    for mask in map(torch.as_tensor, masks):
        result = mask if result is None else result & mask
    return result


def base_distribution(fn: Any) -> Any:
    """What stands under masks, reinterpreted dimensions and transformations."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def plate_frames(*traces: poutine.Trace) -> list[Any]:
    """The plates around the sites of traces, one entry for each site and plate."""
    return [f for trace in traces for site in sample_sites(trace).values() for f in site["cond_indep_stack"]]
