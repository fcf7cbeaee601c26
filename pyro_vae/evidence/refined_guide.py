"""The guide that `refine` makes: a Gaussian of its own for each of some rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.evidence.local_fit import triangular
from pyro_vae.evidence.own_rows import OwnRows
from pyro_vae.evidence.structured import Arrow
from pyro_vae.guides.chain import Chain, FullChain
from pyro_vae.guides.guide import RowGuide
from pyro_vae.guides.inputs import PlateRows
from pyro_vae.pairs.handlers import OwnStop
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["RefinedGuide", "Refinement"]


class Refinement(NamedTuple):
    """What was fitted; see `RefinedGuide` for all but q."""

    q: Arrow
    gap: Tensor
    gap_error: Tensor
    kept: Tensor
    is_gaussian: Tensor


class RefinedGuide(RowGuide):
    """A Pyro guide for the rows that it was refined for: a Gaussian with full covariance for each; see `refine`.

    It takes any selection of its rows, in any order, found by their values in all arguments that have rows, and refuses
    others. Rows with equal values have equal posteriors, and share one Gaussian. `print` says what it gained.

    Attributes:
        gap: ELBO(refined) − ELBO(amortized) of each row, (N,), float64, nats: by how much the amortization gap closed.
        gap_error: its standard error, (N,).
        kept: rows at which the steps did not help, and which keep the amortized Gaussian, or the one with the moments
            of a guide that is none, (N,), bool.
        is_gaussian: whether the amortized q(u|x) is a Gaussian in unconstrained coordinates, (N,), bool; not known with
            latents outside of the plate, and False there.
        loc: mean of the unconstrained latents of each row, (N, D), at the mean of those outside of the plate.
        slope: of this mean in the unconstrained latents outside of the plate, (N, D, G).
        scale_tril: lower triangular square root of the covariance, (N, D, D).
    """

    center: Tensor
    loc: Tensor
    slope: Tensor
    scale_tril: Tensor

    def __init__(self, sampler: ParticleSampler, found: Refinement, names: tuple[str, ...]) -> None:
        plate, look = sampler.layout.plate, sampler.pair.look
        own = [name for name, site in sampler.pair.outside(look.guide).items() if not site["is_observed"]]
        outside = Outside(sampler.guide, own) if names else None
        super().__init__(sampler.model, plate=plate, outside=outside, given=names)
        q, self.gap, self.gap_error, self.kept, self.is_gaussian = found
        self._rows = OwnRows(sampler.rows, self.name)
        for name, value in {
            "center": q.loc,
            "loc": q.local_loc,
            "slope": q.slope,
            "scale_tril": triangular(q.local_scale_tril),
        }.items():
            self.register_buffer(name, value)
        self.set_up(sampler.rows.args, sampler.rows.kwargs)

    def make_chain(self, rows: PlateRows, given: Tensor | None, args: tuple, kwargs: dict[str, Any]) -> Chain:
        """The factors of q(u|x); raises ValueError for rows that are not its own."""
        rows.check_order(self.name)
        index = self._rows.find(args, kwargs)
        loc, slope, scale_tril = self.loc, self.slope, self.scale_tril
        if index is not None:
            loc, slope, scale_tril = loc[index], slope[index], scale_tril[index]
        if given is not None:
            loc = loc + torch.einsum("ndg,...og->...nd", slope, given - self.center)
        return FullChain(loc, scale_tril)

    def __repr__(self) -> str:
        n, known = len(self.gap), self.gap.isfinite()
        gap, error = self.gap[known], self.gap_error[known]
        worse = int(((self.gap < -3 * self.gap_error) & ~self.is_gaussian).sum())
        lines = [f"{self.name} of {n} data points, {self.loc.shape[1]} unconstrained latents each"]
        if len(gap):
            lines.append(
                f"  ELBO gained  mean {gap.mean():.3f} ± {error.square().sum().sqrt() / len(gap):.3f} nats, median "
                f"{gap.median():.3f}, largest {gap.max():.3f}"
            )
        lines.append(f"  not helped   {int(self.kept.sum())} of {n}, which keep where they started")
        if worse:
            lines.append(f"  worse        {worse} of {n}: the guide is no Gaussian, and better there")
        return "\n".join(lines)


class Outside(nn.Module):
    """A guide up to its last site outside of the plate; those inside are not seen."""

    def __init__(self, guide: Callable, names: list[str]) -> None:
        super().__init__()
        self.guide, self.names = guide, names
        for name in ("median", "quantiles"):
            if hasattr(guide, name):
                setattr(self, name, partial(self._ask, name))

    def forward(self, *args: Any, **kwargs: Any) -> None:
        with poutine.block(hide_fn=self._hides), suppress(OwnStop.Done):
            OwnStop(self.names)(self.guide)(*args, **kwargs)

    def _ask(self, method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = getattr(self.guide, method)(*args, **kwargs)
        return {name: found[name] for name in self.names if name in found}

    def _hides(self, site: dict) -> bool:
        return site["type"] == "sample" and site["name"] not in self.names
