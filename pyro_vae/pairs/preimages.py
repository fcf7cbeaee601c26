"""Auxiliary sites of a guide, whose values follow from those of its latents.

A guide over an auxiliary u and a point z = T(u) (Delta, with log |det du/dz| as its log-density) has a density at any
z: that of u = T⁻¹(z). T⁻¹ is known where u are the unconstrained coordinates of z.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro.distributions as dist
import torch

from pyro_vae.pairs.sites import base_distribution
from pyro_vae.pairs.supports import bijection

__all__ = ["TOLERANCE", "find_preimages", "points_among"]

TOLERANCE = 1e-3  # absolute and relative, of T⁻¹(T(u)) in single precision


def points_among(drawn: Mapping[str, dict], latents: Mapping[str, dict]) -> set[str]:
    """Names of the sites of a guide that are points (Delta), and latents of the model that are none there."""
    return {
        name
        for name in drawn.keys() & latents.keys()
        if isinstance(base_distribution(drawn[name]["fn"]), dist.Delta)
        and not isinstance(base_distribution(latents[name]["fn"]), dist.Delta)
    }


def find_preimages(drawn: Mapping[str, dict], latents: Mapping[str, dict]) -> dict[str, str] | None:
    """{auxiliary site: the latent of which it has the unconstrained values}. Empty for a guide without both; None
    where a point or an auxiliary site is left over.

    Args:
        drawn: the sites that the guide draws, of a trace.
        latents: sites of the model, of a trace that has the same values.
    """
    left = [name for name in drawn if name in points_among(drawn, latents)]
    found: dict[str, str] = {}
    for name, site in drawn.items():
        if name in latents:
            continue
        point = next((point for point in left if _is_preimage(site, latents[point])), None)
        if point is None:
            return None
        found[name] = point
        left.remove(point)
    return None if left else found


def _is_preimage(auxiliary: dict, latent: dict) -> bool:
    try:
        value = bijection(latent["name"], latent["fn"]).inv(latent["value"])
    except ValueError:  # a support without a bijection
        return False
    same = value.shape == auxiliary["value"].shape
    return same and torch.allclose(value, auxiliary["value"].to(value), rtol=TOLERANCE, atol=TOLERANCE)
