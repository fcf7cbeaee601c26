"""Effect handlers: setting values and subsamples, stopping early, leaving observations out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["SetSubsample", "SetValues", "StopAfter", "unobserved"]


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


class SetSubsample(Messenger):
    """Sets the indices that plates draw, {plate: indices}; those that a plate was given stay."""

    def __init__(self, indices: dict[str, Tensor]) -> None:
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.indices and site_is_subsample(msg) and msg["value"] is None:
            msg["value"] = self.indices[msg["name"]].to(msg["fn"].device)
