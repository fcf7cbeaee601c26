"""Reading traces: the sites that carry probability, their log-probabilities, their plates."""

from __future__ import annotations

from typing import Any

from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["plate_frames", "sample_sites", "site_log_prob"]


def sample_sites(trace: poutine.Trace) -> dict[str, dict]:
    """The sites that carry probability: not plates' subsamples, not `pyro.deterministic`."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not site["infer"].get("_deterministic")
    }


def site_log_prob(site: dict) -> Tensor:
    """log p of a trace's site with its mask, without its scale, over batch dimensions."""
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(value, mask=site["mask"])


def plate_frames(*traces: poutine.Trace) -> list[Any]:
    """The plates around the sites of traces, one entry for each site and plate."""
    return [f for trace in traces for site in sample_sites(trace).values() for f in site["cond_indep_stack"]]
