"""What draws are asked before they are weighed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pyro_vae.distributions.protocol import ignores_missing
from pyro_vae.pairs.checks import check_latents, check_rows, check_support
from pyro_vae.pairs.modes import fork_random_state
from pyro_vae.pairs.sites import is_inside, sample_sites, site_mask
from pyro_vae.pairs.validity import check_masks
from pyro_vae.particles.serial import parts_of

if TYPE_CHECKING:
    from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["check_draws", "check_same_latents"]


def check_draws(
    sampler: ParticleSampler, guide_trace: Any, model_trace: Any, num_particles: int, rows: slice | None
) -> None:
    """Raises ValueError for masks that differ, data that are not finite or outside of their support, and NaN draws."""
    start = rows.start if rows else 0
    check_masks(guide_trace, model_trace)
    _check_masked(sampler, guide_trace, model_trace, num_particles, rows)
    one = parts_of(model_trace)[0]
    observed = {name: site for name, site in sample_sites(one).items() if site["is_observed"]}
    incomplete = [site["value"] for site in observed.values() if ignores_missing(site["fn"])]
    check_rows(one.nodes["_INPUT"]["args"], start=start, incomplete=incomplete)
    check_rows(one.nodes["_INPUT"]["kwargs"], start=start, incomplete=incomplete)
    for name, site in observed.items():
        check_support(name, site, start=start)
    for name in sampler.pair.latents & guide_trace.nodes.keys():
        site = guide_trace.nodes[name]
        if not is_inside(site, sampler.layout.plate) or not all(name in p.nodes for p in parts_of(guide_trace)):
            continue
        bad = sampler.layout.align(site, rows).isnan().transpose(0, 1).flatten(1).any(1)  # of (K, N, …)
        if bad.any():
            raise ValueError(
                f"site {name!r} of the guide: draws that are NaN, the first at row {start + int(bad.nonzero()[0])}. "
                "Try to look at its parameters there; for missing values, MaskedInput(network) in the encoder."
            )


def check_same_latents(sampler: ParticleSampler, guide_trace: Any, model_trace: Any) -> None:
    """Raises ValueError where one of the runs has latents in the model and not in the guide, or vice versa."""
    for guide, model in zip(parts_of(guide_trace), parts_of(model_trace), strict=True):
        drawn, own = (
            {name: s for name, s in sample_sites(trace).items() if not s["is_observed"]} for trace in (guide, model)
        )
        check_latents(drawn, own.keys() - sampler.pair.summed)


def _check_masked(
    sampler: ParticleSampler, guide_trace: Any, model_trace: Any, num_particles: int, rows: slice | None
) -> None:
    """Raises ValueError where the likelihood depends on a latent that is masked, and so has no prior there."""
    pair = sampler.pair
    drawn = pair.latents - pair.summed - pair.enumerated
    sites = {name: site for name, site in sample_sites(model_trace).items() if name in drawn}
    masks = {name: site_mask(site) for name, site in sites.items()}
    masks = {name: mask for name, mask in masks.items() if mask is not None and not mask.all()}
    if not masks:
        return
    with fork_random_state(), torch.no_grad():
        others = sample_sites(sampler.run(sampler.guide, num_particles, rows))
        values = {name: site["value"] for name, site in sites.items() if name in others}
        for name, mask in masks.items():
            event = (1,) * len(sites[name]["fn"].event_shape)
            values[name] = torch.where(mask.reshape(mask.shape + event), values[name], others[name]["value"])
        moved = sampler.run(sampler.model, num_particles, rows, values=values, enumerate_sites=pair.summed)
        before, after = (
            sampler.log_prior_likelihood(trace, num_particles, rows, summed=pair.summed)
            for trace in (model_trace, moved)
        )
    same = [torch.isclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True) for a, b in zip(before, after, strict=True)]
    if not all(found.all() for found in same):
        raise ValueError(
            f"latent sites {sorted(masks)} are masked at some places, and other sites depend on their values there: "
            "without a prior there is no p(x) to estimate. Try to mask the observed sites there too, or to leave the "
            "latent unmasked."
        )
