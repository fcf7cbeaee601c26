r"""Families of conditional distributions, in the roles of prior p(z), likelihood p(x|z) and posterior q(z|x).

This file has the continuous ones, and gives access to all: `pyro_vae.discrete` has those of counts and categories,
`pyro_vae.priors` priors, `pyro_vae.flows` chains of transformations, `pyro_vae.tables` products for mixed and
incomplete data. What they share is in `pyro_vae.conditional`.

Scales and other positive parameters are softplus(·) + 1e-5, and start at one: they neither reach zero nor explode. A
full covariance is

    z = μ + L ε,   L = diag(τ) (I + mask ∘ L' / √d),   Σ = L Lᵀ,

the L = mask ∘ L' + diag(τ) of Kingma & Welling (2019), *An Introduction to Variational Autoencoders*, section
2.5, with L' started at zero and its row i measured in units of τ_i √d: entries of order one then give a triangle whose
inverse is of order one too, in any dimension, where entries of order τ_i alone give one that grows exponentially.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import expm1, log, prod, sqrt
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.conditional import SMALLEST_SCALE, Broadcasting, Conditional, condition, event_shape_of, positive
from pyro_vae.discrete import (
    ConditionalBernoulli,
    ConditionalCategorical,
    ConditionalNegativeBinomial,
    ConditionalOneHotCategorical,
    ConditionalPoisson,
)
from pyro_vae.elements import Beta, ContinuousBernoulli, StudentT
from pyro_vae.flows import ConditionalFlow
from pyro_vae.gaussians import LowRankMultivariateNormal, MultivariateNormal
from pyro_vae.priors import GaussianMixture, StandardNormal, VampPrior
from pyro_vae.tables import ConditionalProduct, ObservedPart

__all__ = [
    "Broadcasting",
    "Conditional",
    "ConditionalBernoulli",
    "ConditionalBeta",
    "ConditionalCategorical",
    "ConditionalContinuousBernoulli",
    "ConditionalDelta",
    "ConditionalFlow",
    "ConditionalLowRankMultivariateNormal",
    "ConditionalMultivariateNormal",
    "ConditionalNegativeBinomial",
    "ConditionalNormal",
    "ConditionalOneHotCategorical",
    "ConditionalPoisson",
    "ConditionalProduct",
    "ConditionalStudentT",
    "GaussianMixture",
    "LearnedScale",
    "MultivariateNormal",
    "ObservedPart",
    "StandardNormal",
    "VampPrior",
    "condition",
]


class LearnedScale(nn.Module):
    """A positive scale that is learned but depends on nothing: softplus(ρ) + 1e-5, or another smallest value.

    Args:
        shape: () for one scale shared by all dimensions, the event shape for one each.
        init: where it starts.
        smallest: what it stays above. A likelihood with a learned scale has no largest value: where a network hits
            data exactly, the scale shrinks as far as it may, and the density grows. Set it to the precision of the
            data; `fit` warns where a scale has collapsed.

    Example:
        >>> round(LearnedScale(init=0.1)().item(), 6)
        0.1
    """

    def __init__(self, shape: int | Sequence[int] = (), *, init: float = 1.0, smallest: float = SMALLEST_SCALE) -> None:
        super().__init__()
        if not init > smallest > 0:
            raise ValueError(f"LearnedScale: expected init > smallest > 0, got init={init}, smallest={smallest}.")
        self.smallest = smallest
        y = init - smallest
        self.raw = nn.Parameter(torch.full(event_shape_of(shape), y + log(-expm1(-y))))  # log(e^y − 1)

    def forward(self) -> Tensor:
        return nn.functional.softplus(self.raw) + self.smallest


class ConditionalNormal(Conditional):
    """The Normal with independent elements, y ~ N(μ(x), diag σ²), over events of any shape.

    Args:
        network: maps inputs to features.
        event_shape: shape of one y.
        scale: None: σ(x) comes from the network; a number or tensor: fixed; a module that is called without
            arguments, as `LearnedScale()` (shared) or `LearnedScale(event_shape)` (one per element): learned.
        smallest: what a σ(x) from the network stays above; see `LearnedScale`.
        features: see `Conditional`.

    Raises:
        ValueError: a fixed scale that is not positive, or does not broadcast to the event shape.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> q = ConditionalNormal(MLP(784, [400]), 50)
        >>> q(torch.zeros(5, 784)).event_shape
        torch.Size([50])
    """

    def __init__(
        self,
        network: nn.Module | None,
        event_shape: int | Sequence[int],
        *,
        scale: float | Tensor | nn.Module | None = None,
        smallest: float = SMALLEST_SCALE,
        features: int | Sequence[int] | None = None,
    ) -> None:
        shape = event_shape_of(event_shape)
        super().__init__(
            network, shape, features=features, parameter_shapes=[shape] if scale is not None else [shape, shape]
        )
        if not 0 < smallest < 1:
            raise ValueError(f"ConditionalNormal: expected 0 < smallest < 1, got {smallest}.")
        self.smallest = smallest
        self.keep("scale", scale)

    def distribution(self, loc: Tensor, raw_scale: Tensor | None = None) -> Any:
        return dist.Normal(loc, self.kept("scale", raw_scale, self.smallest)).to_event(len(self.event_shape))


class ConditionalMultivariateNormal(Conditional):
    """The Normal with full covariance, y = μ + L ε with L = diag(τ) (I + mask ∘ L'/√d), over events of any shape.

    Args:
        network: maps inputs to features.
        event_shape: shape of one y, d elements in all; the head has d + d + d(d−1)/2 outputs.
        features: see `Conditional`.

    Returns (when called):
        A `MultivariateNormal`, which scores its own draws from the noise that made them.

    References:
        Kingma & Welling (2019), An Introduction to Variational Autoencoders, section 2.5.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> q = ConditionalMultivariateNormal(MLP(784, [400]), 50)
        >>> q(torch.zeros(5, 784)).scale_tril.shape
        torch.Size([5, 50, 50])
    """

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
        self.register_buffer("_strictly_lower", row * d + column, persistent=False)

    def distribution(self, loc: Tensor, raw_scale: Tensor, lower: Tensor) -> Any:
        d, batch = loc.shape[-1], loc.shape[:-1]
        flat = lower.new_zeros(*batch, d * d).index_copy(-1, self._strictly_lower, lower / sqrt(d))
        scale, lower = positive(raw_scale), flat.unflatten(-1, (d, d))
        return MultivariateNormal(loc, event_shape=self.event_shape, scale=scale, lower=lower)


class ConditionalLowRankMultivariateNormal(Conditional):
    """The Normal with covariance Σ = F Fᵀ + diag(σ²), F (d × rank), over vectors: between diagonal and full.

    Args:
        network: maps inputs to features.
        event_shape: d, the length of one y.
        rank: columns of F, fewer than d.
        features: see `Conditional`.

    References:
        Ong, Nott & Smith (2018), Gaussian Variational Approximation With a Factor Covariance Structure.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> q = ConditionalLowRankMultivariateNormal(MLP(784, [400]), 50, rank=3)
        >>> q(torch.zeros(5, 784)).covariance_matrix.shape
        torch.Size([5, 50, 50])
    """

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
            raise ValueError(f"low-rank Normal: expected a vector and 1 <= rank <= d, got {shape}, rank={rank}.")
        super().__init__(network, shape, features=features, parameter_shapes=[shape, shape, (*shape, rank)])
        bias = self.free if network is None else self.head.bias
        with torch.no_grad():  # at F = 0 the gradient of F Fᵀ vanishes
            bias[2 * shape[0] :].normal_(std=0.1 / sqrt(rank))

    def distribution(self, loc: Tensor, raw_scale: Tensor, factor: Tensor) -> Any:
        return LowRankMultivariateNormal(loc, factor, positive(raw_scale).square())


class ConditionalStudentT(Conditional):
    """Student's t with independent elements, y = μ(x) + σ(x) t_ν: a Normal that takes outliers as they come.

    Args:
        network: maps inputs to features.
        event_shape: shape of one y.
        df: ν; None: from the network, above one, starting at five; a number or tensor: fixed; a module as
            `LearnedScale(init=5.0)`: learned.
        scale: σ, as that of `ConditionalNormal`.
        features: see `Conditional`.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> p = ConditionalStudentT(MLP(2, [16]), 5, df=4.0, scale=LearnedScale())
        >>> p(torch.zeros(3, 2)).log_prob(torch.zeros(3, 5)).shape
        torch.Size([3])
    """

    def __init__(
        self,
        network: nn.Module | None,
        event_shape: int | Sequence[int],
        *,
        df: float | Tensor | nn.Module | None = None,
        scale: float | Tensor | nn.Module | None = None,
        features: int | Sequence[int] | None = None,
    ) -> None:
        shape = event_shape_of(event_shape)
        super().__init__(
            network, shape, features=features, parameter_shapes=[shape] * (1 + (scale is None) + (df is None))
        )
        self.keep("df", df)
        self.keep("scale", scale)

    def distribution(self, loc: Tensor, *raw: Tensor) -> Any:
        scale = self.kept("scale", raw[0] if self.scale is None else None)
        df = self.kept("df", raw[-1] if self.df is None else None)
        df = 1 + 4 * df if self.df is None else df
        return StudentT(df, loc, scale).to_event(len(self.event_shape))


class ConditionalBeta(Conditional):
    """Independent Beta elements, y ~ Beta(α(x), β(x)), for values between 0 and 1, neither of them included.

    At either its density is zero or infinite, or a limit at best, so that data with 0 or 1 are refused: move them
    inside by half the precision of the data, or take `ConditionalContinuousBernoulli`.

    Args:
        network: maps inputs to features.
        event_shape: shape of one y.
        features: see `Conditional`.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> p = ConditionalBeta(MLP(2, [16]), 5)
        >>> p(torch.zeros(3, 2)).log_prob(torch.full((3, 5), 0.5)).shape
        torch.Size([3])
    """

    num_parameters = 2

    def distribution(self, alpha: Tensor, beta: Tensor) -> Any:
        return Beta(positive(alpha), positive(beta)).to_event(len(self.event_shape))


class ConditionalContinuousBernoulli(Conditional):
    """Independent continuous Bernoulli elements with logits(x), for values from 0 to 1, such as grey pixels.

    Its density is that of the Bernoulli divided by its integral over [0, 1]. Leaving that out, as many do who train
    grey images with binary cross-entropy, gives no density.

    Args:
        network: maps inputs to features.
        event_shape: shape of one y.
        features: see `Conditional`.

    References:
        Loaiza-Ganem & Cunningham (2019), The continuous Bernoulli: fixing a pervasive error in variational
        autoencoders.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> p = ConditionalContinuousBernoulli(MLP(2, [16]), (8, 8))
        >>> p(torch.zeros(3, 2)).sample().shape
        torch.Size([3, 8, 8])
    """

    def distribution(self, logits: Tensor) -> Any:
        return ContinuousBernoulli(logits=logits).to_event(len(self.event_shape))


class ConditionalDelta(Conditional):
    """A point, y = f(x): as posterior it makes an autoencoder of a VAE, as likelihood a deterministic decoder.

    Its log-probability of itself is taken as zero, so that −ELBO is the reconstruction loss −log p(x|f(x)) minus
    log p(f(x)), which a flat prior, `pyro.distributions.ImproperUniform`, makes zero. It has no density with which
    draws could be weighed: log p(x) cannot be estimated with it.

    Args:
        network: maps inputs to features.
        event_shape: shape of one y.
        features: see `Conditional`.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> q = ConditionalDelta(MLP(784, [400]), 50)
        >>> q(torch.zeros(5, 784)).variance.max().item()
        0.0
    """

    def distribution(self, value: Tensor) -> Any:
        return dist.Delta(value, event_dim=len(self.event_shape))
