r"""Likelihoods of data with missing values, also of tables with columns of several kinds.

    p(x|z) = Π_d p(x_d|z),        p(x_observed|z) = Π_{d observed} p(x_d|z).

Given z, the elements are independent, so that leaving out the factor of a missing element integrates it out (Mattei &
Frellsen 2019, *MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets*; Nazábal et al. 2020, *Handling
Incomplete Heterogeneous Data using VAEs*). If values are missing at random, the ELBO and the evidence are then those of
the observed part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import Independent, biject_to, constraints

from pyro_vae.distributions.products import Product
from pyro_vae.distributions.state import Copied
from pyro_vae.distributions.structure import Broadcasting, check_conditional, condition, expected_value

__all__ = ["ObservedPart"]


class ObservedPart(Broadcasting):
    """The likelihood of the observed elements of x, where NaN marks a missing element.

    Missing elements are left out of log p(x|z) and have no gradient. Draws are complete. In the encoder, wrap the
    network in `pyro_vae.networks.MaskedInput`.

    Args:
        likelihood: a conditional distribution with independent elements, or a `ConditionalProduct` of these.

    Raises:
        TypeError: when called, if the elements of the likelihood are not independent, as with a full covariance.
            Leaving elements out would then not integrate them out.

    Example:
        >>> from pyro_vae.distributions import ConditionalNormal
        >>> from pyro_vae.networks import MLP
        >>> p = ObservedPart(ConditionalNormal(MLP(2, []), 3, scale=1.0))(torch.zeros(1, 2))
        >>> complete, missing = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, torch.nan, torch.nan]])
        >>> bool(p.log_prob(missing) > p.log_prob(complete))
        True
    """

    def __init__(self, likelihood: Any) -> None:
        super().__init__()
        self.likelihood = check_conditional("ObservedPart", likelihood)

    def forward(self, *inputs: Tensor, event_dims: Sequence[int] | None = None) -> Any:
        return Observed(condition(self.likelihood, *inputs, event_dims=event_dims, role="likelihood"))


class Observed(Copied, dist.TorchDistribution):
    """A distribution with independent elements that treats NaN as missing; see `ObservedPart`.

    Args:
        complete: the distribution of complete data.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, complete: Any) -> None:
        self.complete = complete
        self._parts = complete.parts if isinstance(complete, Product) else [complete]
        self._sizes = complete.sizes if isinstance(complete, Product) else list(complete.event_shape[-1:])
        for part in self._parts:
            if len(part.event_shape) and _elements(part) is None:
                raise TypeError(
                    f"likelihood of data with missing values: the elements of {type(part).__name__} are not "
                    "independent. Try a family such as ConditionalNormal, or a ConditionalProduct of such families."
                )
        super().__init__(complete.batch_shape, complete.event_shape, validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Observed:
        return Observed(self.complete.expand(Size(batch_shape)))

    @property
    def has_rsample(self) -> bool:
        return self.complete.has_rsample

    @property
    def support(self) -> Any:
        elements = [_elements(part) if self.event_shape else part for part in self._parts]
        return _OrMissing([e.support for e in elements], self._sizes, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        return expected_value(self.complete)

    @property
    def variance(self) -> Tensor:
        return self.complete.variance

    def sample(self, sample_shape: Size = Size()) -> Tensor:
        return self.complete.sample(sample_shape)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:
        return self.complete.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if not self.event_shape:
            return _log_prob(self.complete, value)
        parts = zip(self._parts, value.split(self._sizes, -1), strict=True)
        dims = tuple(range(-len(self.event_shape), 0))
        first, *others = (_log_prob(_elements(part), x).sum(dims) for part, x in parts)
        return sum(others, first)


class _OrMissing(constraints.Constraint):
    """A constraint for each run of elements, with runs of these sizes; NaN satisfies all of them."""

    def __init__(self, supports: list[Any], sizes: list[int], event_dim: int) -> None:
        self.supports, self.sizes, self.event_dim = supports, sizes, event_dim
        self.is_discrete = all(s.is_discrete for s in supports)

    def check(self, value: Tensor) -> Tensor:
        if not self.event_dim:
            return self.supports[0].check(_filled(value, self.supports[0]))
        runs = zip(self.supports, value.split(self.sizes, -1), strict=True)
        inside = torch.cat([support.check(_filled(x, support)) for support, x in runs], -1)
        return inside.flatten(-self.event_dim).all(-1)


def _elements(part: Any) -> Any:
    """The distribution of the single elements of `part` if they are independent, otherwise None."""
    if isinstance(part, Independent) and part.reinterpreted_batch_ndims == len(part.event_shape):
        return part.base_dist
    return None


def _filled(value: Tensor, support: Any) -> Tensor:
    """The value with its missing elements replaced by a number in the support, in its interior if it is continuous."""
    fill = value.new_zeros(()) if support.is_discrete else biject_to(support)(value.new_zeros(()))
    return torch.where(value.isnan(), fill, value)


def _log_prob(elements: Any, value: Tensor) -> Tensor:
    """log p of each element, zero if it is missing. Missing elements are filled first, to keep gradients finite."""
    return elements.log_prob(_filled(value, elements.support)).masked_fill(value.isnan(), 0.0)
