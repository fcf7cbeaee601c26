"""`Walk`: a run of the model up to its last latent, in which a guide's distributions take the place of the priors.

The model says where each latent is: in which plates, with which mask and scale, and on which support, which may depend
on other latents. Nothing of it is left in the guide's trace but the latents of the data points and the rows that a
plate drew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.guides.chain import Chain, FlowChain
from pyro_vae.guides.inputs import PlateRows
from pyro_vae.guides.latents import Latents, coordinates_outside
from pyro_vae.guides.sites import coordinates, site_distribution
from pyro_vae.pairs.handlers import OwnStop

__all__ = ["Capture", "Walk"]


class Capture(Messenger):
    """Keeps the values of some sites, and the indices that plates drew, {site: value}."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = set(names)
        self.values: dict[str, Tensor] = {}
        self._name = ""

    def _pyro_sample(self, msg: dict) -> None:
        self._name = msg["name"]  # a handler outside, such as poutine.scope, may give it another

    def _pyro_post_sample(self, msg: dict) -> None:
        if self._name in self.names or site_is_subsample(msg):
            self.values[self._name] = msg["value"]


class Walk(Messenger):
    """One run of the model in a guide.

    Args:
        latents: of the model.
        plate: name of the plate of data points.
        outside: values of latents outside of the plate, and of plates that their guide recorded.
        given: those of them that the chain is conditioned on.
        make_chain: (rows of the plate, coordinates of `given` or None) -> the factors of q.
        guide: name of the guide, for messages.

    Attributes:
        values: of the latents of the data points.
    """

    def __init__(
        self,
        latents: Latents,
        plate: str,
        outside: Mapping[str, Tensor],
        given: tuple[str, ...],
        make_chain: Callable[[PlateRows, Tensor | None], Chain],
        guide: str,
    ) -> None:
        super().__init__()
        self.latents, self.plate, self.outside, self.given = latents, plate, outside, given
        self.make_chain, self.guide = make_chain, guide
        self.values: dict[str, Tensor] = {}
        self._inside = {latent.name: latent for latent in latents.inside}
        self._replaced: set[str] = set()
        self._coordinates: dict[str, Tensor] = {}
        self._plate_rows: PlateRows | None = None
        self._is_given = self._in_network = False
        self._chain: Chain | None = None
        self._name = ""

    def run(self, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Runs the model and returns the values of the latents of the data points.

        Raises:
            ValueError: other latents than at the first call.
        """
        with poutine.block(hide_fn=self._hides), self, suppress(OwnStop.Done):
            OwnStop(self._inside)(model)(*args, **kwargs)
        missing = self._inside.keys() - self.values.keys()
        if missing:
            raise ValueError(
                f"{self.guide}: the model did not sample {sorted(missing)} in this run; expected the latents of the "
                f"first call, {sorted(self._inside)}. Try poutine.mask in place of a branch, or a new guide for other "
                "arguments."
            )
        return self.values

    def _hides(self, site: dict) -> bool:
        name = site["name"]
        if site["type"] == "param":
            return not self._in_network
        if site_is_subsample(site):  # recorded once, and only where rows were drawn
            return name in self.outside or site["fn"].subsample_size in (None, site["fn"].size)
        return name not in self._inside

    def _pyro_sample(self, msg: dict) -> None:
        name, fn = msg["name"], msg["fn"]
        self._name = name  # a handler outside, such as poutine.scope, may give it another
        if self._in_network:
            raise ValueError(
                f"{self.guide}: network: it samples {name!r}; expected features that are a function of the rows. Try a "
                "network of fixed or trained weights, or a guide of your own."
            )
        if site_is_subsample(msg):
            self._is_given = msg["value"] is not None
            if name in self.outside:
                msg["value"] = self.outside[name]
        elif msg["is_observed"]:
            return
        elif name in self._inside:
            self._replaced.add(name)
            msg["fn"] = self._factor(name, fn)
            self._check_whole(name, msg)
        elif name in self.outside:
            msg["value"] = self.outside[name]
            if name in self.given:
                self._coordinates[name] = coordinates_outside(name, fn, msg["value"], self.latents.nesting)
        elif name in self.latents.outside:
            pass  # it has a guide elsewhere, and no support depends on it: a draw of its prior will do
        elif name in self.latents.left_out:
            first = fn.enumerate_support(expand=False)[0]
            msg["value"] = first.expand(fn.batch_shape + fn.event_shape)
        else:
            raise ValueError(
                f"{self.guide}: the model samples {name!r}, which it did not at the first call (latents then: "
                f"{sorted([*self._inside, *self.latents.outside, *self.latents.left_out])}). Try poutine.mask in "
                "place of a branch, or a new guide for other arguments."
            )

    def _pyro_post_sample(self, msg: dict) -> None:
        if site_is_subsample(msg) and self._name == self.plate:
            self._plate_rows = _plate_rows(torch.as_tensor(msg["value"]), msg["fn"].size, self._is_given)
        latent = self._inside.get(self._name)
        if latent is None or latent.name not in self._replaced:
            return
        self.values[latent.name] = msg["value"]
        assert self._chain is not None
        if latent.stop < self.latents.dim:
            self._chain.observe(coordinates(latent, msg["fn"], msg["value"]))

    def _check_whole(self, name: str, msg: dict) -> None:
        """Raises ValueError where elements of a row count differently, and q has one density for all of them."""
        if not isinstance(self._chain, FlowChain):
            return
        counts = [c for c in (msg["mask"], getattr(msg["fn"], "_mask", None), msg["scale"]) if isinstance(c, Tensor)]
        if any(c.dim() >= -d and c.shape[d] > 1 for c in counts for d in self._inside[name].inner):
            raise ValueError(
                f"{self.guide}: site {name!r} has a mask or scale for each element, and is in plates inside of plate "
                f"{self.plate!r}; a flow has one density for all elements of a row. Try AmortizedMultivariateNormal, "
                "which has one for each."
            )

    def _factor(self, name: str, prior: Any) -> Any:
        latent = self._inside[name]
        if self._chain is None:
            missing = [n for n in self.given if n not in self._coordinates]
            if missing:
                raise ValueError(
                    f"{self.guide}: given={missing} are sampled after {name!r}, which is to be conditioned on them. "
                    "Try a model that samples what is outside of the plate first."
                )
            parts = [self._coordinates[n] for n in self.given]
            given = None
            if parts:
                batch = torch.broadcast_shapes(*(p.shape[:-1] for p in parts))
                given = torch.cat([p.expand(*batch, -1) for p in parts], -1)
            size = prior.batch_shape[latent.dim]
            self._in_network = True
            self._chain = self.make_chain(self._plate_rows or PlateRows(size, size, None, False), given)
            self._in_network = False
        sizes = tuple(prior.batch_shape[d] if -d <= len(prior.batch_shape) else 1 for d in latent.inner)
        if sizes != latent.sizes:
            raise ValueError(
                f"{self.guide}: site {name!r} has inner plates of sizes {sizes}, at the first call {latent.sizes}. "
                "Expected the same for all data. Try to pad rows of different length, and poutine.mask."
            )
        return site_distribution(latent, prior, self._chain.next(latent.start, latent.stop))


def _plate_rows(indices: Tensor, full_size: int, is_given: bool) -> PlateRows:
    if len(indices) < full_size:
        return PlateRows(len(indices), full_size, indices, False)
    permuted = is_given and not torch.equal(indices, torch.arange(full_size, device=indices.device))
    return PlateRows(full_size, full_size, None, permuted)
