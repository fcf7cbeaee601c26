r"""Conditional distributions of positive values and of proportions.

p(y|x) = Π_d p(y_d; θ_d(x))  with p log-normal or Gamma;    or y ~ Dirichlet(α(x)).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isinf
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.arguments import checked
from pyro_vae.distributions.conditional import SMALLEST_SCALE, Conditional, positive
from pyro_vae.distributions.continuous import ConditionalNormal
from pyro_vae.distributions.gammas import Dirichlet, Gamma
from pyro_vae.distributions.structure import event_shape_of
from pyro_vae.distributions.truncated import TruncatedNormal, check_ends

__all__ = ["ConditionalDirichlet", "ConditionalGamma", "ConditionalLogNormal", "ConditionalTruncatedNormal"]


class ConditionalLogNormal(ConditionalNormal):
    """Independent log-normal elements, log y ~ N(μ(x), diag σ²), for positive values.

    The median of y is exp μ(x), and its mean exp(μ(x) + σ²/2).

    Args:
        network: maps inputs to features.
        event_shape: shape of one y.
        scale: σ, of log y: with None, it comes from the network. A number or tensor is fixed. A module, such as
            `LearnedScale()`, is learned.
        smallest: lower bound of a σ(x) that comes from the network; see `LearnedScale`.
        features: see `Conditional`.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> p = ConditionalLogNormal(MLP(2, [16]), 5, scale=0.5)
        >>> bool((p(torch.zeros(3, 2)).sample() > 0).all())
        True
    """

    def distribution(self, loc: Tensor, raw_scale: Tensor | None = None) -> Any:
        return dist.LogNormal(loc, self.kept("scale", raw_scale, self.smallest)).to_event(len(self.event_shape))


class ConditionalGamma(Conditional):
    """Independent Gamma elements with mean μ(x) and variance μ²/α, for positive values: y ~ Gamma(α, rate α/μ(x)).

    Args:
        network: maps inputs to features.
        event_shape: shape of one y.
        concentration: α > 0. With None, it comes from the network. A number or tensor is fixed. A module, such as
            `LearnedScale(event_shape)`, is learned. One makes y exponential; 1/√α is its coefficient of variation.
        features: see `Conditional`.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> p = ConditionalGamma(MLP(2, [16]), 5, concentration=4.0)(torch.zeros(3, 2))
        >>> bool(torch.isclose(p.variance, p.mean**2 / 4).all())
        True
    """

    @checked
    def __init__(
        self,
        network: nn.Module | None,
        event_shape: int | Sequence[int],
        *,
        concentration: float | Tensor | nn.Module | None = None,
        features: int | Sequence[int] | None = None,
    ) -> None:
        shape = event_shape_of(event_shape)
        super().__init__(network, shape, features=features, parameter_shapes=[shape] * (1 + (concentration is None)))
        self.keep("concentration", concentration)

    def distribution(self, raw_mean: Tensor, raw_concentration: Tensor | None = None) -> Any:
        concentration = self.kept("concentration", raw_concentration)
        mean = positive(raw_mean)
        return Gamma(concentration.expand_as(mean), concentration / mean).to_event(len(self.event_shape))


class ConditionalDirichlet(Conditional):
    """Proportions y ~ Dirichlet(α(x)): positive vectors with sum one, such as the composition of a sample.

    With events of several dimensions, each vector along the last one is drawn by itself. A proportion of zero has no
    density; move such data inside by half of their precision, and divide by the sum.

    Args:
        network: maps inputs to features.
        event_shape: shape of one y, whose last dimension has at least two elements.
        features: see `Conditional`.

    Raises:
        ValueError: fewer than two elements.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> p = ConditionalDirichlet(MLP(2, [16]), 5)(torch.zeros(3, 2))
        >>> bool(torch.isclose(p.sample().sum(-1), torch.ones(3)).all())
        True
    """

    @checked
    def __init__(
        self,
        network: nn.Module | None,
        event_shape: int | Sequence[int],
        *,
        features: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(network, event_shape, features=features)
        if not self.event_shape or self.event_shape[-1] < 2:
            raise ValueError(
                f"ConditionalDirichlet: expected at least two proportions in the last dimension, got event_shape="
                f"{tuple(self.event_shape)}. Try event_shape=2, or ConditionalBeta for a single proportion."
            )

    def distribution(self, raw: Tensor) -> Any:
        return Dirichlet(positive(raw)).to_event(len(self.event_shape) - 1)


class ConditionalTruncatedNormal(ConditionalNormal):
    """Independent Normal elements that are known to lie in an interval: y ~ N(μ(x), diag σ²) given low ≤ y ≤ high.

    Unlike a Normal that is clipped, it has a density that integrates to one over the interval, and no mass at its ends.
    μ(x) is the mean before truncation, and may lie outside.

    Args:
        network: maps inputs to features.
        event_shape: shape of one y.
        low: lower end, a number, or a tensor of finite numbers that broadcasts to the event shape; −∞ for none.
        high: upper end, likewise; ∞ for none.
        scale, smallest: σ, as in `ConditionalNormal`.
        features: see `Conditional`.

    Raises:
        ValueError: `low` is not below `high`, or one does not broadcast to the event shape.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> p = ConditionalTruncatedNormal(MLP(2, [16]), 5, low=0.0)
        >>> bool((p(torch.zeros(3, 2)).sample() >= 0).all())
        True
    """

    @checked
    def __init__(
        self,
        network: nn.Module | None,
        event_shape: int | Sequence[int],
        *,
        low: float | Tensor = -inf,
        high: float | Tensor = inf,
        scale: float | Tensor | nn.Module | None = None,
        smallest: float = SMALLEST_SCALE,
        features: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(network, event_shape, scale=scale, smallest=smallest, features=features)
        self.low: Tensor | None
        self.high: Tensor | None
        for name, end in (("low", low), ("high", high)):
            self.register_buffer(name, None if not isinstance(end, Tensor) and isinf(end) else self._end(name, end))
        check_ends("ConditionalTruncatedNormal", self.low, self.high)

    def _end(self, name: str, end: float | Tensor) -> Tensor:
        end, event = torch.as_tensor(end, dtype=next(self.parameters()).dtype), self.event_shape
        pairs = zip(reversed(end.shape), reversed(event), strict=False)
        if end.dim() > len(event) or any(n not in (1, m) for n, m in pairs):
            raise ValueError(
                f"ConditionalTruncatedNormal: expected a {name} that broadcasts to the event shape {event}, got one of "
                f"shape {tuple(end.shape)}. Try a single number."
            )
        return end

    def distribution(self, loc: Tensor, raw_scale: Tensor | None = None) -> Any:
        low, high = -inf if self.low is None else self.low, inf if self.high is None else self.high
        scale = self.kept("scale", raw_scale, self.smallest)
        return TruncatedNormal(loc, scale, low, high).to_event(len(self.event_shape))
