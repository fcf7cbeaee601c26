r"""Gaussians: the one with full covariance that is sound in float32, and the KL divergence of any two.

    KL(N₁‖N₂) = ½ [log(|Σ₂|/|Σ₁|) − d + tr(Σ₂⁻¹Σ₁) + (μ₂−μ₁)ᵀ Σ₂⁻¹ (μ₂−μ₁)],

not symmetric, never negative, registered for `torch.distributions.kl_divergence` between diagonal and full Gaussians
over events of any shape. Pyro and torch leave some of these pairs out (full against independent, which is q(z|x)
against N(0, I)), where `pyro.infer.TraceMeanField_ELBO` then silently falls back to sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, pi, prod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import Independent, constraints, register_kl
from torch.distributions import MultivariateNormal as TorchMultivariateNormal
from torch.distributions.utils import lazy_property

__all__ = ["MultivariateNormal"]


class MultivariateNormal(dist.MultivariateNormal):
    """N(μ, L Lᵀ) over an event of any shape, which scores its own draws from the noise that made them.

    In float32 a triangular solve can lose many nats of log q(z) on a draw z = μ + L ε of an ill-conditioned L, because
    z was rounded. The noise was not: log q(z) = −½ |ε|² − Σ log L_ii − d/2 log 2π. A draw from `rsample` or `sample`
    is remembered and scored that way (with the gradients of the solve); any other value is solved for.

    Args:
        loc: (*batch, d).
        scale_tril: (*batch, d, d), lower triangular with a positive diagonal.
        event_shape: shape of one value, d elements in all; default (d,).

    Example:
        >>> q = MultivariateNormal(torch.zeros(4), torch.eye(4), (2, 2))
        >>> q.log_prob(q.rsample()).shape, q.event_shape
        (torch.Size([]), torch.Size([2, 2]))
    """

    _draw: tuple[Tensor, Tensor, int] | None = None  # the last draw, its noise and its version

    def __init__(
        self, loc: Tensor, scale_tril: Tensor, event_shape: Sequence[int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(loc, scale_tril=scale_tril, **kwargs)
        if event_shape is not None:
            if prod(event_shape) != loc.shape[-1]:
                raise ValueError(f"MultivariateNormal: event shape {event_shape} has not {loc.shape[-1]} elements.")
            self._event_shape = Size(event_shape)

    def expand(self, batch_shape: Size, _instance: Any = None) -> MultivariateNormal:
        new = type(self).__new__(type(self)) if _instance is None else _instance
        shape = Size(batch_shape)
        new.loc = self.loc.expand(*shape, self.loc.shape[-1])
        new._unbroadcasted_scale_tril = self._unbroadcasted_scale_tril
        new.scale_tril = self.scale_tril.expand(*shape, *self.scale_tril.shape[-2:])
        torch.distributions.Distribution.__init__(new, shape, self._event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, len(self._event_shape))

    @property
    def mean(self) -> Tensor:
        return self.loc.reshape(self._extended_shape())

    mode = mean

    @property
    def variance(self) -> Tensor:
        variance = self._unbroadcasted_scale_tril.square().sum(-1)
        return variance.expand(self.loc.shape).reshape(self._extended_shape())

    @lazy_property
    def covariance_matrix(self) -> Tensor:
        """Σ = L Lᵀ of the flattened event, (*batch, d, d)."""
        tril = self._unbroadcasted_scale_tril
        return (tril @ tril.mT).expand(self.scale_tril.shape)

    @lazy_property
    def precision_matrix(self) -> Tensor:
        """Σ⁻¹ of the flattened event, (*batch, d, d)."""
        return torch.cholesky_inverse(self._unbroadcasted_scale_tril).expand(self.scale_tril.shape)

    def entropy(self) -> Tensor:
        log_det = self._unbroadcasted_scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (log_det + 0.5 * self.loc.shape[-1] * (1 + log(2 * pi))).expand(self._batch_shape)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:
        eps = torch.randn(*sample_shape, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)
        value = self.loc + torch.einsum("...ij,...j->...i", self._unbroadcasted_scale_tril, eps)
        value = value.reshape(self._extended_shape(Size(sample_shape)))
        self._draw = (value, eps, value._version)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        tril = self._unbroadcasted_scale_tril
        flat = value.reshape(*value.shape[: value.dim() - len(self._event_shape)], -1)
        if self._draw is not None and self._draw[0] is value and self._draw[2] == value._version:
            eps = _Noise.apply(flat, self.loc, tril, self._draw[1])
        else:
            eps = _whiten(tril, flat - self.loc)
        log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (eps.square().sum(-1) + eps.shape[-1] * log(2 * pi)) - log_det


class _Noise(torch.autograd.Function):
    """ε = L⁻¹ (z − μ) where ε is known: nothing is computed forward, the gradients are those of the solve."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loc: Tensor, tril: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(tril, eps)
        ctx.shapes = value.shape, loc.shape, tril.shape
        return eps.view_as(eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tril, eps = ctx.saved_tensors
        value, loc, shape = ctx.shapes
        back = _whiten(tril.mT, grad, upper=True)  # L⁻ᵀ g
        outer = (back.unsqueeze(-1) * eps.unsqueeze(-2)).sum_to_size(shape).tril()
        return back.sum_to_size(value), -back.sum_to_size(loc), -outer, None


def _whiten(tril: Tensor, x: Tensor, upper: bool = False) -> Tensor:
    """L⁻¹ x for L (*batch, d, d) and x (*sample, *batch, d), without repeating L over the sample dimensions."""
    lead, batch = x.shape[:-1], tril.shape[:-2]
    if lead[len(lead) - len(batch) :] != batch:
        batch = torch.broadcast_shapes(lead, batch)
        return torch.linalg.solve_triangular(tril, x.expand(*batch, -1).unsqueeze(-1), upper=upper).squeeze(-1)
    columns = x.reshape(-1, *batch, x.shape[-1]).movedim(0, -1)  # (*batch, d, samples)
    return torch.linalg.solve_triangular(tril, columns, upper=upper).movedim(-1, 0).reshape(x.shape)


def _gaussian(p: Any) -> tuple[Tensor, Tensor, bool]:
    """Location (*batch, d), scale (*batch, d) or triangle (*batch, d, d), and whether it is the triangle."""
    if isinstance(p, TorchMultivariateNormal):
        return p.loc, p._unbroadcasted_scale_tril, True
    if isinstance(p, Independent) and isinstance(p.base_dist, torch.distributions.Normal):
        batch = len(p.batch_shape)
        return p.base_dist.loc.flatten(batch), p.base_dist.scale.flatten(batch), False
    raise NotImplementedError


@register_kl(TorchMultivariateNormal, Independent)
@register_kl(MultivariateNormal, Independent)
@register_kl(Independent, MultivariateNormal)
@register_kl(MultivariateNormal, MultivariateNormal)
@register_kl(MultivariateNormal, TorchMultivariateNormal)
@register_kl(TorchMultivariateNormal, MultivariateNormal)
def _kl_gaussians(p: Any, q: Any) -> Tensor:
    """KL(p‖q), the formula at the top of this file; differences of log-determinants, never determinants."""
    if p.event_shape != q.event_shape:
        raise ValueError(f"KL: event shapes {tuple(p.event_shape)} and {tuple(q.event_shape)} differ.")
    (p_loc, p_scale, p_full), (q_loc, q_scale, q_full) = _gaussian(p), _gaussian(q)
    log_det = [
        (scale.diagonal(dim1=-2, dim2=-1) if full else scale).log().sum(-1)
        for scale, full in ((p_scale, p_full), (q_scale, q_full))
    ]
    if q_full:
        batch = torch.broadcast_shapes(p_scale.shape[: p_scale.dim() - 1 - p_full], q_scale.shape[:-2])
        tril = (p_scale if p_full else torch.diag_embed(p_scale)).expand(*batch, *q_scale.shape[-2:])
        trace = torch.linalg.solve_triangular(q_scale, tril, upper=False).square().sum((-2, -1))
        distance = _whiten(q_scale, p_loc - q_loc).square().sum(-1)
    else:
        variance = p_scale.square().sum(-1) if p_full else p_scale.square()
        trace = (variance / q_scale.square()).sum(-1)
        distance = ((p_loc - q_loc) / q_scale).square().sum(-1)
    return log_det[1] - log_det[0] + 0.5 * (trace + distance - p_loc.shape[-1])
