r"""A factor q(u_i|u_<i, x) over the coordinates of each row as the distribution of a site in its plates.

Coordinates are mapped to the support of the site's prior,

    log q(z_i|·) = log q(u_i|·) − log |dz_i/du_i|.

Where one of Pyro's distributions says the same (a Normal, a LogNormal, a multivariate Normal), the site has that one,
so that closed forms of the KL divergence apply. Elements of inner plates depend on each other in q; the log-density of
each one is that given those before it.
"""

from __future__ import annotations

from math import log, pi
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import ComposeTransform, ExpTransform, Independent, IndependentTransform, Transform

from pyro_vae.distributions.gaussians import MultivariateNormal
from pyro_vae.guides.chain import solve
from pyro_vae.guides.latents import Latent
from pyro_vae.pairs.supports import bijection, support_of

__all__ = ["OfRows", "acts_on_elements", "coordinates", "site_distribution"]


def site_distribution(latent: Latent, prior: Any, factor: Any) -> Any:
    """q(z_i|·) of a site, with the support, the event shape and the mask of its prior.

    Args:
        latent: the site.
        prior: its distribution in the model, in its plates.
        factor: q(u_i|·), of batch shape (*particles, N) and event shape (size,).
    """
    mask = None
    if isinstance(prior, dist.MaskedDistribution):
        prior, mask = prior.base_dist, prior._mask
    transform = bijection(latent.name, prior).with_cache()  # a draw's own coordinates are not computed back
    batch = _batch_shape(latent, prior, factor)
    result = _known(latent, factor, transform, prior)
    if result is None:
        result = OfRows(latent, factor, transform, batch, prior.event_shape, support_of(prior))
    if result.batch_shape != batch:
        result = result.expand(batch)
    return result if mask is None else result.mask(mask)


def coordinates(latent: Latent, fn: Any, value: Tensor) -> Tensor:
    """u of a value of the distribution that `site_distribution` made, as rows; of its own draw what was drawn."""
    while isinstance(fn, (Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    if isinstance(fn, OfRows):
        return fn.coordinates(value)
    own = isinstance(fn, dist.TransformedDistribution) and not isinstance(fn, dist.LogNormal)
    transform = fn.transforms[-1] if own else bijection(latent.name, fn)
    return latent.to_rows(transform.inv(value))


def _batch_shape(latent: Latent, prior: Any, factor: Any) -> Size:
    """That of the prior; particles that only the sites before this one have are to the left of its plates."""
    own, particles = prior.batch_shape, factor.batch_shape[:-1]
    if not particles:
        return own
    return torch.broadcast_shapes(own, (*particles, *(1,) * latent.nesting))


def _known(latent: Latent, factor: Any, transform: Transform, prior: Any) -> Any:
    """The distribution by a name of Pyro's, where it has one."""
    event_shape, dims = prior.event_shape, len(prior.event_shape)
    plain, elementwise = _base(transform)
    if isinstance(factor, Independent) or (latent.size == 1 and isinstance(factor, MultivariateNormal)):
        scale = factor.base_dist.scale if isinstance(factor, Independent) else factor.scale_tril[..., 0]
        loc, scale = latent.from_rows(factor.mean), latent.from_rows(scale)
        if elementwise:
            base = dist.LogNormal if isinstance(plain, ExpTransform) else dist.Normal
            result = base(loc, scale).to_event(dims)
            done = plain is None or isinstance(plain, ExpTransform)
            return result if done else _Mapped(result, [transform], support_of(prior))
        return _Mapped(dist.Normal(loc, scale).to_event(len(latent.shape)), [transform], support_of(prior))
    if isinstance(factor, MultivariateNormal) and plain is None and elementwise and not latent.inner:
        loc = latent.from_rows(factor.loc, (latent.size,))
        return MultivariateNormal(
            loc, latent.from_rows(factor.scale_tril, (latent.size,) * 2), event_shape, validate_args=False
        )
    return None


def acts_on_elements(transform: Transform) -> bool:
    """Whether a transformation maps each number by itself."""
    return _base(transform)[1]


def _base(transform: Transform) -> tuple[Transform | None, bool]:
    """What a transformation does to single elements (None: nothing), and whether that is all."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    if isinstance(transform, ComposeTransform) and not transform.parts:
        return None, True
    return transform, transform.domain.event_dim == 0


class _Mapped(dist.TransformedDistribution):
    """A transformed distribution that has a support of its own: that of an affine map of (0, 1) is the real line to
    torch."""

    def __init__(self, base: Any, transforms: list[Transform], support: Any) -> None:
        self._support = support
        super().__init__(base, transforms, validate_args=False)

    @property
    def support(self) -> Any:
        return self._support

    def expand(self, batch_shape: Size, _instance: Any = None) -> _Mapped:
        return _Mapped(self.base_dist.expand(Size(batch_shape)), self.transforms, self._support)


class OfRows(dist.TorchDistribution):
    """A site whose elements in inner plates depend on each other, or that is a flow, or no plain vector of numbers.

    Args:
        latent: the site.
        factor: q(u|·), of batch shape (*particles, N) and event shape (size,).
        transform: maps coordinates to values.
        batch_shape: of the site.
        event_shape: of the site.
        support: of the site.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self, latent: Latent, factor: Any, transform: Transform, batch_shape: Size, event_shape: Size, support: Any
    ) -> None:
        self.latent, self.factor, self.transform, self._support = latent, factor, transform, support
        # the last draw, its version, its coordinates and rows, and the factor that drew them
        self._draw: tuple[Tensor, int, Tensor, Any] | None = None
        super().__init__(Size(batch_shape), Size(event_shape), validate_args=False)

    @property
    def support(self) -> Any:
        return self._support

    def expand(self, batch_shape: Size, _instance: Any = None) -> OfRows:
        return OfRows(self.latent, self.factor, self.transform, batch_shape, self.event_shape, self._support)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        particles = shape[: -self.latent.nesting] if len(shape) > self.latent.nesting else Size()
        factor = self.factor.expand((*particles, self.factor.batch_shape[-1]))
        rows = factor.rsample()
        value = self.transform(self.latent.from_rows(rows).reshape(*shape, *self.latent.shape))
        self._draw = value, value._version, rows, factor
        return value

    def coordinates(self, value: Tensor) -> Tensor:
        """u of a value as rows, (*particles, N, size); of the last draw those that were drawn."""
        if self._draw is not None and self._draw[0] is value and self._draw[1] == value._version:
            return self._draw[2]
        return self.latent.to_rows(self.transform.inv(value))

    def sample(self, sample_shape: Size = Size()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        batch = value.shape[: value.dim() - len(self.event_shape)]
        rows = self.coordinates(value)
        own = self._draw is not None and rows is self._draw[2]
        factor = self._draw[3] if own else self.factor
        if self.latent.inner:
            elements = self.latent.from_rows(_log_prob_of_elements(factor, rows))
            log_prob = elements.reshape(*elements.shape[: elements.dim() - len(self.latent.shape)], -1).sum(-1)
        else:
            log_prob = self.latent.from_rows(factor.log_prob(rows), ())
        u = self.latent.from_rows(rows).reshape(*batch, *self.latent.shape)
        log_det = self.transform.log_abs_det_jacobian(u, value).reshape(*batch, -1).sum(-1)
        shape = log_prob.shape[max(0, log_prob.dim() - len(batch)) :]
        return log_prob.reshape(shape) - log_det


def _log_prob_of_elements(factor: Any, u: Tensor) -> Tensor:
    """log q(u_d|u_<d) for a Gaussian; equal shares of the log-density for a flow, (*particles, N, size)."""
    if isinstance(factor, MultivariateNormal):
        noise = solve(factor.scale_tril, u - factor.loc)
        scale = factor.scale_tril.diagonal(dim1=-2, dim2=-1)
        return -0.5 * noise.square() - scale.log() - 0.5 * log(2 * pi)
    share = factor.log_prob(u).unsqueeze(-1) / u.shape[-1]
    return share.expand(u.shape)
