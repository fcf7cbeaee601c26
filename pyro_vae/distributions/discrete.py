r"""Conditional distributions with independent discrete elements: binary values, categories and counts.

    p(y|x) = Π_d p(y_d; θ_d(x))  with p Bernoulli, categorical, Poisson or negative binomial.

Binary values and categories have logits for parameters. Rates and other positive parameters are softplus(·) + 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vae.arguments import checked
from pyro_vae.distributions.conditional import Conditional, positive
from pyro_vae.distributions.structure import event_shape_of
from pyro_vae.distributions.univariate import NegativeBinomial, Poisson

__all__ = [
    "ConditionalBernoulli",
    "ConditionalCategorical",
    "ConditionalNegativeBinomial",
    "ConditionalOneHotCategorical",
    "ConditionalPoisson",
]


class ConditionalBernoulli(Conditional):
    """Independent Bernoulli elements with logits(x), over events of any shape; values are 0 or 1.

    Args:
        network: maps inputs to features.
        event_shape: shape of one y.
        features: see `Conditional`.

    Example:
        >>> import torch
        >>> from pyro_vae.networks import MLP
        >>> p = ConditionalBernoulli(MLP(50, [400]), (28, 28))
        >>> p(torch.zeros(5, 50)).sample().shape
        torch.Size([5, 28, 28])
    """

    def distribution(self, logits: Tensor) -> Any:
        return dist.Bernoulli(logits=logits).to_event(len(self.event_shape))


class ConditionalCategorical(Conditional):
    """Independent categories with logits(x), over events of any shape; values are 0, 1, …, num_categories − 1.

    Categories have no mean. A reconstruction that asks for one gets the most probable category.

    Args:
        network: maps inputs to features.
        event_shape: shape of one y; () for a single category.
        num_categories: number of categories, C.
        features: see `Conditional`.

    Example:
        >>> import torch
        >>> from pyro_vae.networks import MLP
        >>> p = ConditionalCategorical(MLP(2, [16]), 5, num_categories=3)
        >>> p(torch.zeros(4, 2)).sample().shape
        torch.Size([4, 5])
    """

    @checked
    def __init__(
        self,
        network: nn.Module | None,
        event_shape: int | Sequence[int],
        *,
        num_categories: int,
        features: int | Sequence[int] | None = None,
    ) -> None:
        shape = event_shape_of(event_shape)
        super().__init__(network, shape, features=features, parameter_shapes=[(*shape, num_categories)])

    def distribution(self, logits: Tensor) -> Any:
        return dist.Categorical(logits=logits).to_event(len(self.event_shape))


class ConditionalOneHotCategorical(Conditional):
    """One category with logits(x), as a one-hot vector: a discrete code z that a network can take as input.

    As a prior (`network=None`) it learns the probabilities of the categories. To sum the categories out, mark the model
    and the guide with `pyro.infer.config_enumerate`.

    Args:
        network: maps inputs to features.
        num_categories: number of categories, C.
        features: see `Conditional`.

    Example:
        >>> p = ConditionalOneHotCategorical(None, 3)
        >>> p().probs.detach()
        tensor([0.3333, 0.3333, 0.3333])
    """

    @checked
    def __init__(
        self, network: nn.Module | None, num_categories: int, *, features: int | Sequence[int] | None = None
    ) -> None:
        super().__init__(network, num_categories, features=features, parameter_shapes=[(num_categories,)])

    def distribution(self, logits: Tensor) -> Any:
        return dist.OneHotCategorical(logits=logits)


class ConditionalPoisson(Conditional):
    """Independent Poisson counts with rate(x), over events of any shape.

    Args:
        network: maps inputs to features.
        event_shape: shape of one y.
        features: see `Conditional`.

    Example:
        >>> import torch
        >>> from pyro_vae.networks import MLP
        >>> p = ConditionalPoisson(MLP(2, [16]), 5)
        >>> p(torch.zeros(4, 2)).mean.shape
        torch.Size([4, 5])
    """

    def distribution(self, raw_rate: Tensor) -> Any:
        return Poisson(positive(raw_rate)).to_event(len(self.event_shape))


class ConditionalNegativeBinomial(Conditional):
    """Independent counts with mean μ(x) and variance μ + μ²/r: Poisson counts with a Gamma-distributed rate.

    Args:
        network: maps inputs to features.
        event_shape: shape of one y.
        total_count: r > 0. With None, it comes from the network. A number or tensor is fixed. A module, such as
            `LearnedScale(event_shape)`, is learned. A smaller r means more dispersion; r → ∞ gives the Poisson.
        features: see `Conditional`.

    Example:
        >>> import torch
        >>> from pyro_vae.networks import MLP
        >>> p = ConditionalNegativeBinomial(MLP(2, [16]), 5, total_count=2.0)(torch.zeros(4, 2))
        >>> bool(torch.isclose(p.variance, p.mean + p.mean**2 / 2.0).all())
        True
    """

    @checked
    def __init__(
        self,
        network: nn.Module | None,
        event_shape: int | Sequence[int],
        *,
        total_count: float | Tensor | nn.Module | None = None,
        features: int | Sequence[int] | None = None,
    ) -> None:
        shape = event_shape_of(event_shape)
        super().__init__(network, shape, features=features, parameter_shapes=[shape] * (1 + (total_count is None)))
        self.keep("total_count", total_count)

    def distribution(self, raw_mean: Tensor, raw_count: Tensor | None = None) -> Any:
        count = self.kept("total_count", raw_count)
        return NegativeBinomial(count, positive(raw_mean)).to_event(len(self.event_shape))
