r"""Conditional distributions with independent continuous elements, and the point mass.

    p(y|x) = Π_d p(y_d; θ_d(x))  with p Normal, Student's t, Beta or continuous Bernoulli;    or y = f(x).

A positive parameter such as a scale is softplus(a + c) + 1e-5, where a is the raw parameter from the network. The
constant c makes it one at a = 0, where it starts. It cannot reach zero, and grows at most linearly in a.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import expm1, log
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.arguments import checked
from pyro_vae.distributions.conditional import SMALLEST_SCALE, Conditional, positive
from pyro_vae.distributions.structure import event_shape_of
from pyro_vae.distributions.univariate import Beta, ContinuousBernoulli, StudentT

__all__ = [
    "ConditionalBeta",
    "ConditionalContinuousBernoulli",
    "ConditionalDelta",
    "ConditionalNormal",
    "ConditionalStudentT",
    "LearnedScale",
]


class LearnedScale(nn.Module):
    """A positive scale that is learned and does not depend on inputs: softplus(ρ) + `smallest`.

    Args:
        shape: () for one scale shared by all elements, or the event shape for one scale per element.
        init: initial value.
        smallest: lower bound of the scale. A likelihood with a learned scale is unbounded: where a network fits data
            exactly, the scale shrinks to its lower bound, and the density grows. Set the bound to the precision of the
            data; `fit` warns where a scale has collapsed.

    Example:
        >>> round(LearnedScale(init=0.1)().item(), 6)
        0.1
    """

    @checked
    def __init__(self, shape: int | Sequence[int] = (), *, init: float = 1.0, smallest: float = SMALLEST_SCALE) -> None:
        super().__init__()
        if not init > smallest > 0:
            raise ValueError(
                f"LearnedScale: expected init > smallest > 0, got init={init}, smallest={smallest}. Try init=1.0."
            )
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
        scale: with None, σ(x) comes from the network. A number or tensor is fixed. A module, which is called without
            arguments, is learned: `LearnedScale()` (one shared scale) or `LearnedScale(event_shape)` (one per element).
        smallest: lower bound of a σ(x) that comes from the network; see `LearnedScale`.
        features: see `Conditional`.

    Raises:
        ValueError: a fixed scale is not positive, or does not broadcast to the event shape.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> q = ConditionalNormal(MLP(784, [400]), 50)
        >>> q(torch.zeros(5, 784)).event_shape
        torch.Size([50])
    """

    @checked
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


class ConditionalStudentT(Conditional):
    """Student's t with independent elements, y = μ(x) + σ(x) t_ν: unlike the Normal, it is robust to outliers.

    Args:
        network: maps inputs to features.
        event_shape: shape of one y.
        df: ν. With None, it comes from the network, is above one and starts at five. A number or tensor is fixed. A
            module, such as `LearnedScale(init=5.0)`, is learned.
        scale: σ, as in `ConditionalNormal`.
        features: see `Conditional`.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> p = ConditionalStudentT(MLP(2, [16]), 5, df=4.0, scale=LearnedScale())
        >>> p(torch.zeros(3, 2)).log_prob(torch.zeros(3, 5)).shape
        torch.Size([3])
    """

    @checked
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
    """Independent Beta elements, y ~ Beta(α(x), β(x)), for values strictly between 0 and 1.

    At 0 and 1 the density is zero, infinite or defined only as a limit, so that data that contain 0 or 1 are refused.
    Move such values inside by half the precision of the data, or use `ConditionalContinuousBernoulli`.

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

    Its density is that of the Bernoulli divided by its integral over [0, 1]. Training on grey images with binary
    cross-entropy is common, but it omits this integral, and what it uses is not a density.

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
    """A point mass at y = f(x): as a posterior it turns a VAE into an autoencoder, as a likelihood it is deterministic.

    The log-probability of the point is taken as zero, so that −ELBO is the reconstruction loss −log p(x|f(x)) minus
    log p(f(x)). The flat prior `pyro.distributions.ImproperUniform` makes the latter zero. A point mass has no density
    that could weight draws, so that log p(x) cannot be estimated with it.

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
