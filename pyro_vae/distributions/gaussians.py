r"""Gaussians with full and low-rank covariance that are accurate in float32, and the KL divergence of any two:

    KL(N₁‖N₂) = ½ [log(|Σ₂|/|Σ₁|) − d + tr(Σ₂⁻¹Σ₁) + (μ₂−μ₁)ᵀ Σ₂⁻¹ (μ₂−μ₁)].

The KL divergence is not symmetric, and never negative. It is registered for `torch.distributions.kl_divergence` between
diagonal, low-rank and full Gaussians over events of any shape. Pyro and torch lack some of these pairs, such as full
against independent, which is q(z|x) against N(0, I). For a pair that is not registered,
`pyro.infer.TraceMeanField_ELBO` silently falls back to sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, pi, prod
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Independent, constraints, register_kl
from torch.distributions import LowRankMultivariateNormal as TorchLowRank
from torch.distributions import MultivariateNormal as TorchMultivariateNormal

from pyro_vae.distributions.state import Copied, computed, versions

__all__ = ["LowRankMultivariateNormal", "MultivariateNormal"]


class MultivariateNormal(Copied, dist.MultivariateNormal):
    """N(μ, L Lᵀ) over an event of any shape. It scores its own draws from the noise that generated them.

    If L is ill-conditioned, a triangular solve in float32 can lose many nats of log q(z) on a draw z = μ + L ε, because
    z was rounded. The noise ε was not rounded: log q(z) = −½ |ε|² − Σ log L_ii − d/2 log 2π. The last draw from
    `rsample` or `sample` is remembered and scored this way, with the gradients of the solve. Any other value is scored
    by the solve, as is the draw itself once it or a parameter was changed in place.

    The factor is L = diag(τ) (I + A), where A is strictly lower triangular.

    Args:
        loc: μ, (*batch, d).
        scale_tril: L, (*batch, d, d), lower triangular with a positive diagonal. Give either L, or τ and A.
        scale: τ, (*batch, d), positive.
        lower: A, (*batch, d, d).
        event_shape: shape of one value, with d elements in all; default: (d,).

    Example:
        >>> q = MultivariateNormal(torch.zeros(4), torch.eye(4), (2, 2))
        >>> q.log_prob(q.rsample()).shape, q.event_shape
        (torch.Size([]), torch.Size([2, 2]))
    """

    _draw: tuple[Tensor, Tensor, tuple[int, ...]] | None = None  # the last draw, its noise, and versions

    def __init__(
        self,
        loc: Tensor,
        scale_tril: Tensor | None = None,
        event_shape: Sequence[int] | None = None,
        *,
        scale: Tensor | None = None,
        lower: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self._parts = (scale, lower) if scale_tril is None else (scale_tril,)  # as they were given: they may change
        shape = Size(loc.shape[-1:] if event_shape is None else event_shape)
        if prod(shape) != loc.shape[-1]:
            raise ValueError(f"MultivariateNormal: expected {loc.shape[-1]} elements, got event shape {event_shape}.")
        batch = torch.broadcast_shapes(loc.shape[:-1], self._scale.shape[:-1])
        self.loc = loc.expand(*batch, loc.shape[-1])
        TorchDistribution.__init__(self, batch, shape, validate_args=validate_args)
        if self._validate_args and scale_tril is not None and not constraints.lower_cholesky.check(scale_tril).all():
            raise ValueError(
                "MultivariateNormal: expected a lower triangular scale_tril with a positive diagonal. Try "
                "torch.linalg.cholesky(covariance)."
            )

    def expand(self, batch_shape: Size, _instance: Any = None) -> MultivariateNormal:
        new = type(self).__new__(type(self)) if _instance is None else _instance
        shape = Size(batch_shape)
        new.loc, new._parts = self.loc.expand(*shape, self.loc.shape[-1]), self._parts
        TorchDistribution.__init__(new, shape, self._event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def _scale(self) -> Tensor:
        return self._parts[0] if len(self._parts) == 2 else self._parts[0].diagonal(dim1=-2, dim2=-1)

    @property
    def _lower(self) -> Tensor:
        return self._parts[1] if len(self._parts) == 2 else self._parts[0].tril(-1) / self._scale.unsqueeze(-1)

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

    @computed
    def _unbroadcasted_scale_tril(self) -> Tensor:
        if len(self._parts) == 1:
            return self._parts[0].tril()
        return torch.diag_embed(self._scale) + self._scale.unsqueeze(-1) * self._lower

    @computed
    def scale_tril(self) -> Tensor:
        """L of the flattened event, (*batch, d, d)."""
        return self._unbroadcasted_scale_tril.expand(*self.batch_shape, *self._parts[-1].shape[-2:])

    @computed
    def covariance_matrix(self) -> Tensor:
        """Σ = L Lᵀ of the flattened event, (*batch, d, d)."""
        tril = self._unbroadcasted_scale_tril
        return (tril @ tril.mT).expand(*self.batch_shape, *tril.shape[-2:])

    @computed
    def precision_matrix(self) -> Tensor:
        """Σ⁻¹ of the flattened event, (*batch, d, d)."""
        tril = self._unbroadcasted_scale_tril
        return torch.cholesky_inverse(tril).expand(*self.batch_shape, *tril.shape[-2:])

    def entropy(self) -> Tensor:
        return (self._scale.log().sum(-1) + 0.5 * self.loc.shape[-1] * (1 + log(2 * pi))).expand(self._batch_shape)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:
        eps = torch.randn(*sample_shape, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)
        value = self.loc + self._scale * (eps + torch.einsum("...ij,...j->...i", self._lower, eps))
        value = value.reshape(self._extended_shape(Size(sample_shape)))
        now = versions((value, self.loc, *self._parts))
        self._draw = None if now is None else (value, eps, now)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        flat = value.reshape(*value.shape[: value.dim() - len(self._event_shape)], -1)
        scale, drawn = self._scale, self._draw is not None and self._draw[0] is value
        if drawn and self._draw[2] == versions((value, self.loc, *self._parts)):
            eps = _Noise.apply((flat - self.loc) / scale, self._lower, self._draw[1])
        else:
            eps = _solve(self._lower, (flat - self.loc) / scale)
        return -0.5 * (eps.square().sum(-1) + eps.shape[-1] * log(2 * pi)) - scale.log().sum(-1)


class _Noise(torch.autograd.Function):
    """ε = (I + A)⁻¹ y for a known ε: the forward pass computes nothing, the gradients are those of the solve."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, lower: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(lower, eps)
        return eps.view_as(eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lower, eps = ctx.saved_tensors
        back = _solve(lower.mT, grad, upper=True)  # (I + A)⁻ᵀ g
        return back, -(back.unsqueeze(-1) * eps.unsqueeze(-2)).sum_to_size(lower.shape).tril(-1), None


def _solve(lower: Tensor, x: Tensor, upper: bool = False) -> Tensor:
    """(I + A)⁻¹ x for A (*batch, d, d) and x (*sample, *batch, d), without repeating A over the sample dimensions."""
    lead, batch = x.shape[:-1], lower.shape[:-2]
    options = {"upper": upper, "unitriangular": True}
    if lead[len(lead) - len(batch) :] != batch:
        batch = torch.broadcast_shapes(lead, batch)
        return torch.linalg.solve_triangular(lower, x.expand(*batch, -1).unsqueeze(-1), **options).squeeze(-1)
    columns = x.reshape(-1, *batch, x.shape[-1]).movedim(0, -1)  # (*batch, d, samples)
    return torch.linalg.solve_triangular(lower, columns, **options).movedim(-1, 0).reshape(x.shape)


class LowRankMultivariateNormal(Copied, dist.LowRankMultivariateNormal):
    """N(μ, Σ) with Σ = F Fᵀ + D, F (d × rank) and D diagonal, accurate in float32 however small D is beside F Fᵀ.

    The Woodbury identity gives xᵀ Σ⁻¹ x = xᵀ D⁻¹ x − |C^−½ Fᵀ D⁻¹ x|² with C = I + Fᵀ D⁻¹ F. If D is small, this is a
    small difference of large numbers, and C may have no Cholesky factor in float32. But xᵀ Σ⁻¹ x is also the smallest
    value of a least-squares problem: D^−½ x is regressed on the columns of D^−½ F with ridge penalty one. With
    [D^−½ F; I] = [Q₁; Q₂] R, where [Q₁; Q₂] has orthonormal columns and R is triangular, and with y = D^−½ x,

        xᵀ Σ⁻¹ x = |y − Q₁ Q₁ᵀ y|² + |Q₂ Q₁ᵀ y|²,   |Σ| = |D| |R|²,   C = Rᵀ R.

    Args:
        loc: μ, (*batch, d).
        cov_factor: F, (*batch, d, rank).
        cov_diag: the diagonal of D, (*batch, d), positive.

    Example:
        >>> q = LowRankMultivariateNormal(torch.zeros(3), torch.ones(3, 1), torch.full((3,), 1e-8))
        >>> q.log_prob(torch.ones(3))  # 8 log 10 − ½ (1 + log 3 + 3 log 2π)
        tensor(14.6146)
    """

    _kept: tuple[tuple[Any, bool], tuple[Tensor, Tensor]] | None = None  # [Q₁; Q₂] and Rᵀ, and what they are of

    def __init__(self, loc: Tensor, cov_factor: Tensor, cov_diag: Tensor, validate_args: bool | None = None) -> None:
        batch = torch.broadcast_shapes(loc.shape[:-1], cov_factor.shape[:-2], cov_diag.shape[:-1])
        self.loc, self.cov_diag = loc.expand(*batch, loc.shape[-1]), cov_diag.expand(*batch, loc.shape[-1])
        self.cov_factor = cov_factor.expand(*batch, *cov_factor.shape[-2:])
        self._unbroadcasted_cov_factor, self._unbroadcasted_cov_diag = cov_factor, cov_diag
        TorchDistribution.__init__(self, batch, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Size, _instance: Any = None) -> LowRankMultivariateNormal:
        new = type(self).__new__(type(self)) if _instance is None else _instance
        shape, d, factor = Size(batch_shape), self.loc.shape[-1], self.cov_factor
        new.loc, new.cov_diag = self.loc.expand(*shape, d), self.cov_diag.expand(*shape, d)
        new.cov_factor, new._kept = factor.expand(*shape, *factor.shape[-2:]), self._kept
        new._unbroadcasted_cov_factor = self._unbroadcasted_cov_factor
        new._unbroadcasted_cov_diag = self._unbroadcasted_cov_diag
        TorchDistribution.__init__(new, shape, self._event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _decomposed(self) -> tuple[Tensor, Tensor]:
        """[Q₁; Q₂] and Rᵀ of the parameters as they are now."""
        parts = self._unbroadcasted_cov_factor, self._unbroadcasted_cov_diag
        key = versions(parts), torch.is_grad_enabled()  # what was computed without gradients has none
        if self._kept is None or key[0] is None or self._kept[0] != key:
            self._kept = key, _basis(*parts)
        return self._kept[1]

    @property
    def _basis(self) -> Tensor:
        return self._decomposed()[0]

    @property
    def _capacitance_tril(self) -> Tensor:
        return self._decomposed()[1]

    @computed
    def variance(self) -> Tensor:
        return self.cov_factor.square().sum(-1) + self.cov_diag

    @computed
    def covariance_matrix(self) -> Tensor:
        """Σ, (*batch, d, d)."""
        return self.cov_factor @ self.cov_factor.mT + torch.diag_embed(self.cov_diag)

    @computed
    def precision_matrix(self) -> Tensor:
        """Σ⁻¹, (*batch, d, d)."""
        root = _whitened(self, torch.eye(self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device))
        return (root.mT @ root).expand(self.covariance_matrix.shape)

    @computed
    def scale_tril(self) -> Tensor:
        """The Cholesky factor of Σ, (*batch, d, d)."""
        scale = self.cov_diag.sqrt().unsqueeze(-1)
        scaled = self.cov_factor / scale
        identity = torch.eye(scale.shape[-2], dtype=scale.dtype, device=scale.device)
        return scale * torch.linalg.cholesky(identity + scaled @ scaled.mT)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        distance = _whitened(self, (value - self.loc).unsqueeze(-1)).square().sum((-2, -1))
        return -0.5 * (distance + value.shape[-1] * log(2 * pi)) - _half_log_det(self)


def _basis(factor: Tensor, diag: Tensor) -> tuple[Tensor, Tensor]:
    """[Q₁; Q₂], (*batch, d + rank, rank), and Rᵀ with a positive diagonal, (*batch, rank, rank)."""
    scaled = factor / diag.sqrt().unsqueeze(-1)
    identity = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
    basis, triangle = torch.linalg.qr(torch.cat([scaled, identity.expand(*scaled.shape[:-2], -1, -1)], -2))
    sign = triangle.diagonal(dim1=-2, dim2=-1).sign()
    return basis * sign.unsqueeze(-2), triangle.mT * sign.unsqueeze(-2)


def _location(p: Any) -> tuple[Tensor, Tensor | None]:
    """The location and, for independent elements, the scale (otherwise None), both (*batch, d)."""
    if isinstance(p, (TorchMultivariateNormal, TorchLowRank)):
        return p.loc, None
    if isinstance(p, Independent) and isinstance(p.base_dist, torch.distributions.Normal):
        batch = len(p.batch_shape)
        return p.base_dist.loc.flatten(batch), p.base_dist.scale.flatten(batch)
    raise NotImplementedError


def _half_log_det(p: Any) -> Tensor:
    """½ log |Σ| of a full or low-rank Σ, (*batch)."""
    if isinstance(p, TorchMultivariateNormal):
        return p._unbroadcasted_scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_det = p._capacitance_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return log_det + 0.5 * p._unbroadcasted_cov_diag.log().sum(-1)


def _root(p: Any) -> Tensor:
    """R with R Rᵀ = Σ for a full or low-rank Σ, (*batch, d, columns): the triangle L, or [F, D^½]."""
    if isinstance(p, TorchMultivariateNormal):
        return p._unbroadcasted_scale_tril
    return torch.cat([p.cov_factor, torch.diag_embed(p.cov_diag.sqrt())], -1)


def _whitened(q: Any, x: Tensor) -> Tensor:
    """y with yᵀ y = xᵀ Σ⁻¹ x for each column of x, (*batch, d, columns), where q has a full or low-rank Σ."""
    if isinstance(q, TorchMultivariateNormal):
        tril = q._unbroadcasted_scale_tril
        batch = torch.broadcast_shapes(tril.shape[:-2], x.shape[:-2])
        return torch.linalg.solve_triangular(tril, x.expand(*batch, *x.shape[-2:]), upper=False)
    diag, d = q._unbroadcasted_cov_diag, x.shape[-2]
    basis = q._basis if isinstance(q, LowRankMultivariateNormal) else _basis(q._unbroadcasted_cov_factor, diag)[0]
    y = x / diag.sqrt().unsqueeze(-1)
    fit = basis @ (basis[..., :d, :].mT @ y)
    return torch.cat([y - fit[..., :d, :], fit[..., d:, :]], -2)


@register_kl(TorchMultivariateNormal, Independent)
@register_kl(MultivariateNormal, Independent)
@register_kl(Independent, MultivariateNormal)
@register_kl(TorchLowRank, Independent)
@register_kl(Independent, TorchLowRank)
@register_kl(MultivariateNormal, MultivariateNormal)
@register_kl(MultivariateNormal, TorchMultivariateNormal)
@register_kl(TorchMultivariateNormal, MultivariateNormal)
@register_kl(LowRankMultivariateNormal, TorchMultivariateNormal)
@register_kl(TorchMultivariateNormal, LowRankMultivariateNormal)
@register_kl(LowRankMultivariateNormal, LowRankMultivariateNormal)
@register_kl(LowRankMultivariateNormal, TorchLowRank)
@register_kl(TorchLowRank, LowRankMultivariateNormal)
def _kl_gaussians(p: Any, q: Any) -> Tensor:
    """KL(p‖q) by the formula at the top of this file, with differences of log-determinants, never determinants. The
    trace is the sum of the squared lengths of the columns of Σ₂^−½ R, where R Rᵀ = Σ₁."""
    if p.event_shape != q.event_shape:
        raise ValueError(f"KL: event shapes {tuple(p.event_shape)} and {tuple(q.event_shape)} differ.")
    (p_loc, p_scale), (q_loc, q_scale) = _location(p), _location(q)
    p_log_det = _half_log_det(p) if p_scale is None else p_scale.log().sum(-1)
    q_log_det = _half_log_det(q) if q_scale is None else q_scale.log().sum(-1)
    if q_scale is None:
        root = _root(p) if p_scale is None else torch.diag_embed(p_scale)
        trace = _whitened(q, root).square().sum((-2, -1))
        distance = _whitened(q, (p_loc - q_loc).unsqueeze(-1)).square().sum((-2, -1))
    else:
        variance = _root(p).square().sum(-1) if p_scale is None else p_scale.square()
        trace = (variance / q_scale.square()).sum(-1)
        distance = ((p_loc - q_loc) / q_scale).square().sum(-1)
    return q_log_det - p_log_det + 0.5 * (trace + distance - p_loc.shape[-1])
