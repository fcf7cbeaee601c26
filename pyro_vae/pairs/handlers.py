"""Effect handlers: setting values and subsamples, stopping early, leaving observations out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["ExactDraws", "OwnStop", "SetSubsample", "SetValues", "StopAfter", "unobserved"]


def unobserved(model: Callable) -> Callable:
    """A model without its observed sites: the prior, in the role of a guide."""
    return poutine.block(model, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])


class SetValues(Messenger):
    """Sets latent sites to given values.

    Unlike `poutine.replay` it leaves the message open for an `EnumMessenger` outside, which so learns that a site's
    parameters depend on enumerated ones.
    """

    def __init__(self, latents: dict[str, Tensor]) -> None:
        super().__init__()
        self.latents = latents

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.latents:
            msg["value"] = self.latents[msg["name"]]


class ExactDraws(Messenger):
    """Draws from `LKJCholesky` in three and more dimensions, where those of torch have another density than its own.

    Row i has the squared length y ~ Beta(i/2, η + (d − 1 − i)/2) left of the diagonal, and a uniform direction
    (Lewandowski, Kurowicka & Joe 2009, section 3.2, the onion method); torch 2.13 draws y ~ Beta(i − 1/2, …).
    """

    def _pyro_sample(self, msg: dict) -> None:
        fn = msg["fn"]
        while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
            fn = fn.base_dist
        if msg["value"] is None and isinstance(fn, torch.distributions.LKJCholesky) and fn.dim > 2:
            msg["value"] = _draw_cholesky(fn, msg["fn"].batch_shape + msg["fn"].event_shape)


def _draw_cholesky(fn: Any, shape: torch.Size) -> Tensor:
    index = torch.arange(1, fn.dim, dtype=fn.concentration.dtype, device=fn.concentration.device)
    eta = fn.concentration.detach().expand(shape[:-2]).unsqueeze(-1)
    squared = torch.distributions.Beta(index / 2, eta + (fn.dim - 1 - index) / 2).sample()  # (*batch, d − 1)
    noise = torch.randn(*shape[:-2], fn.dim - 1, fn.dim, dtype=eta.dtype, device=eta.device).tril(0)
    rows = squared.sqrt().unsqueeze(-1) * noise / noise.norm(dim=-1, keepdim=True)
    value = torch.zeros(shape, dtype=eta.dtype, device=eta.device)
    value[..., 0, 0] = 1.0
    value[..., 1:, :] = rows
    below = torch.arange(1, fn.dim, device=eta.device)
    value[..., below, below] = (1 - squared).sqrt()
    return value


class StopAfter(Messenger):
    """Stops a function by `StopAfter.Done` as soon as these sites have been sampled: no decoder runs for a prior."""

    class Done(Exception):
        pass

    def __init__(self, sites: Iterable[str]) -> None:
        super().__init__()
        self.sites = set(sites)
        self._left: set[str] = set()

    def __enter__(self) -> Any:
        self._left = set(self.sites)
        return super().__enter__()

    def _pyro_post_sample(self, msg: dict) -> None:
        self._left.discard(msg["name"])
        if not self._left:
            raise self.Done


class OwnStop(StopAfter):
    """Whose end is its own: one around the whole function, that ends at the same site, is not taken for it."""

    class Done(Exception):
        pass


class SetSubsample(Messenger):
    """Sets the indices that plates draw, {plate: indices}; those that a plate was given stay."""

    def __init__(self, indices: dict[str, Tensor]) -> None:
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.indices and site_is_subsample(msg) and msg["value"] is None:
            msg["value"] = self.indices[msg["name"]].to(msg["fn"].device)
