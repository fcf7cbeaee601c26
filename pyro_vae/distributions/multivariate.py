r"""Conditional Gaussians with full and low-rank covariance.

With full covariance, d the number of elements and a mask of ones below the diagonal,

    y = μ + L ε,   L = diag(τ) (I + mask ∘ L' / √d),   Σ = L Lᵀ.

This is the L = mask ∘ L' + diag(τ) of Kingma & Welling (2019), *An Introduction to Variational Autoencoders*, section
2.5, except that L' starts at zero and that its row i has the unit τ_i / √d. Entries of order one then give a triangle
whose inverse is also of order one, in any dimension. With the unit τ_i, the inverse would grow exponentially with d.

With low rank, Σ = F Fᵀ + diag(σ²), where F is d × rank. `pyro_vae.distributions.gaussians` has the distributions
themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.arguments import checked
from pyro_vae.distributions.conditional import Conditional, positive
from pyro_vae.distributions.gaussians import LowRankMultivariateNormal, MultivariateNormal
from pyro_vae.distributions.structure import event_shape_of

__all__ = ["ConditionalLowRankMultivariateNormal", "ConditionalMultivariateNormal"]


class ConditionalMultivariateNormal(Conditional):
    """A Normal with full covariance, y = μ + L ε with L = diag(τ) (I + mask ∘ L'/√d), over events of any shape.

    Args:
        network: maps inputs to features.
        event_shape: shape of one y, with d elements in all; the head has d + d + d(d−1)/2 outputs.
        features: see `Conditional`.

    Returns (when called):
        A `MultivariateNormal`, which scores its own draws from the noise that generated them.

    References:
        Kingma & Welling (2019), An Introduction to Variational Autoencoders, section 2.5.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> q = ConditionalMultivariateNormal(MLP(784, [400]), 50)
        >>> q(torch.zeros(5, 784)).scale_tril.shape
        torch.Size([5, 50, 50])
    """

    @checked
    def __init__(
        self,
        network: nn.Module | None,
        event_shape: int | Sequence[int],
        *,
        features: int | Sequence[int] | None = None,
    ) -> None:
        shape = event_shape_of(event_shape)
        d = prod(shape)
        super().__init__(network, shape, features=features, parameter_shapes=[(d,), (d,), (d * (d - 1) // 2,)])
        row, column = torch.tril_indices(d, d, offset=-1)
        self.register_buffer("strictly_lower", row * d + column, persistent=False)

    def distribution(self, loc: Tensor, raw_scale: Tensor, lower: Tensor) -> Any:
        d, batch = loc.shape[-1], loc.shape[:-1]
        flat = lower.new_zeros(*batch, d * d).index_copy(-1, self.strictly_lower, lower / sqrt(d))  # type: ignore[arg-type]
        scale, lower = positive(raw_scale), flat.unflatten(-1, (d, d))
        return MultivariateNormal(loc, event_shape=self.event_shape, scale=scale, lower=lower)


class ConditionalLowRankMultivariateNormal(Conditional):
    """A Normal over vectors with covariance Σ = F Fᵀ + diag(σ²), F (d × rank): between diagonal and full.

    Args:
        network: maps inputs to features.
        event_shape: d, the length of one y.
        rank: number of columns of F, from 1 to d.
        features: see `Conditional`.

    References:
        Ong, Nott & Smith (2018), Gaussian Variational Approximation With a Factor Covariance Structure.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> q = ConditionalLowRankMultivariateNormal(MLP(784, [400]), 50, rank=3)
        >>> q(torch.zeros(5, 784)).covariance_matrix.shape
        torch.Size([5, 50, 50])
    """

    @checked
    def __init__(
        self,
        network: nn.Module | None,
        event_shape: int,
        *,
        rank: int,
        features: int | Sequence[int] | None = None,
    ) -> None:
        shape = event_shape_of(event_shape)
        if len(shape) != 1 or not 1 <= rank <= shape[0]:
            raise ValueError(f"low-rank Normal: expected a vector and 1 <= rank <= d, got shape {shape}, rank {rank}.")
        super().__init__(network, shape, features=features, parameter_shapes=[shape, shape, (*shape, rank)])
        bias = self.free if network is None else self.head.bias
        with torch.no_grad():  # at F = 0 the gradient of F Fᵀ vanishes
            bias[2 * shape[0] :].normal_(std=0.1 / sqrt(rank))

    def distribution(self, loc: Tensor, raw_scale: Tensor, factor: Tensor) -> Any:
        return LowRankMultivariateNormal(loc, factor, positive(raw_scale).square())
