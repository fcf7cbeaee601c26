r"""Latents as one vector: the continuous latent sites of a data point are mapped to u in R^D, and back.

Each site has the bijection of its support. Supports may depend on other latents (a uniform below another): the model
maps its own sites as it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import transforms

from pyro_vae.pairs.layout import Layout
from pyro_vae.pairs.sites import sample_sites
from pyro_vae.pairs.supports import bijection, inside_support

__all__ = ["Constrain", "Coordinates"]


class Coordinates:
    """The unconstrained coordinates u of some sites.

    Args:
        sites: {name: site of a trace of the model}.
        layout: of the pair.
        rows: which data points; None for all.

    Attributes:
        dim: D.
        are_real: whether all sites are real numbers already, so that u is their values.

    Raises:
        ValueError: a support without a bijection; data points in a loop.
    """

    def __init__(self, sites: Mapping[str, dict], layout: Layout, rows: slice | None) -> None:
        layout.check_vectorized("fitted Gaussians and annealing")
        self.sites, self.layout, self.rows = dict(sites), layout, rows
        self.are_real = all(_is_real(bijection(name, site["fn"])) for name, site in sites.items())
        self._shapes = {name: self._unconstrained(name, site).shape[2:] for name, site in sites.items()}
        self.dim = sum(prod(shape) for shape in self._shapes.values())

    def join(self, trace: poutine.Trace) -> Tensor:
        """u of a trace, (K, N, D); NaN where a value is outside of the support of its prior."""
        sites = sample_sites(trace)
        parts = [self._unconstrained(name, sites[name]) for name in self.sites]
        parts = [part.reshape(*part.shape[:2], -1) for part in parts]
        count, rows = max(len(p) for p in parts), max(p.shape[1] for p in parts)
        return torch.cat([p.expand(count, rows, -1) for p in parts], -1)

    def split(self, u: Tensor) -> dict[str, Tensor]:
        """The unconstrained values of the sites, from u (K, N, D), as their traces have them."""
        sizes = [prod(shape) for shape in self._shapes.values()]
        parts = zip(self._shapes.items(), u.split(sizes, -1), strict=True)
        return {name: self.place(name, part.reshape(*u.shape[:2], *shape)) for (name, shape), part in parts}

    def place(self, name: str, value: Tensor) -> Tensor:
        """A site's values (K, N, *inner plates, *event) as its traces have them."""
        fixed = self.layout.rows.fixed
        missing = 0 if fixed is None else fixed - value.shape[1]
        if missing:  # a plate of fixed size runs on more rows than are wanted, which come last
            value = torch.cat([value[:, :1].expand(-1, missing, *value.shape[2:]), value], 1)
        return self.layout.place(self.sites[name], value)

    def _unconstrained(self, name: str, site: dict) -> Tensor:
        """A site's value in R^d as (K, N, *inner plates, *event)."""
        # the support of the prior counts, also where the site is the guide's, which may have another
        fn = self.sites[name]["fn"] if self.are_real else site["fn"]
        event = site["value"].dim() - len(fn.event_shape)
        value = bijection(name, fn).inv(site["value"])
        inside = inside_support(fn, site["value"])
        if inside is not None:
            value = value.masked_fill(~inside.reshape(inside.shape + (1,) * (value.dim() - inside.dim())), torch.nan)
        like = {**site, "value": value, "fn": _EventShape(value.shape[event:])}
        return self.layout.align(like, self.rows)


class Constrain(Messenger):
    """Sets latent sites to the images of unconstrained values; their sites in a trace have the `log_det` besides."""

    def __init__(self, unconstrained: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.unconstrained = unconstrained

    def _pyro_sample(self, msg: dict) -> None:
        name = msg["name"]
        if name not in self.unconstrained:
            return
        u, transform = self.unconstrained[name], bijection(name, msg["fn"])
        msg["value"] = value = transform(u)
        log_det = transform.log_abs_det_jacobian(u, value)
        event = len(msg["fn"].event_shape) - transform.codomain.event_dim  # that the transform leaves in its batch
        msg["log_det"] = log_det.sum(list(range(-event, 0))) if event else log_det


def _is_real(transform: Any) -> bool:
    while isinstance(transform, transforms.IndependentTransform):
        transform = transform.base_transform
    return transform == transforms.identity_transform


class _EventShape:
    """Stands in for the distribution of a site whose value was mapped to another event shape."""

    def __init__(self, event_shape: torch.Size) -> None:
        self.event_shape = event_shape
