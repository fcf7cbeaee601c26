r"""Products of likelihoods, for tables with columns of several kinds.

    p(x|z) = Π_parts p(x_part|z),   x = (x_1, …, x_parts) concatenated.

Given z, the parts are independent; what they have in common goes through z. `pyro_vae.distributions.missing` leaves
missing elements out of such a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import biject_to, constraints

from pyro_vae.distributions.conditional import Conditional
from pyro_vae.distributions.state import Copied
from pyro_vae.distributions.structure import Broadcasting, check_conditional, condition, expected_value

__all__ = ["ConditionalProduct", "Product"]


class ConditionalProduct(Broadcasting):
    """The product of several conditional distributions of vectors: the row of a table with columns of several kinds.

    x is the concatenation of the parts' values in the dtype of the inputs, so that categories and counts are whole
    numbers in a tensor of floats. If all parts have the same module as their network, they share one pass through it.

    Args:
        *parts: conditional distributions over vectors, one for each group of adjacent columns of one kind.

    Raises:
        ValueError: when called, if the event of a part is not a vector.

    Example:
        >>> from pyro_vae.distributions import ConditionalCategorical, ConditionalNormal, ConditionalPoisson
        >>> from pyro_vae.networks import MLP
        >>> network = MLP(2, [16])
        >>> p = ConditionalProduct(
        ...     ConditionalNormal(network, 3),  # columns 0, 1, 2
        ...     ConditionalCategorical(network, 1, num_categories=4),  # column 3
        ...     ConditionalPoisson(network, 2),  # columns 4, 5
        ... )
        >>> p(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 6])
    """

    def __init__(self, *parts: Any) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(check_conditional("ConditionalProduct", part) for part in parts)
        networks = {id(getattr(part, "network", None)) for part in parts}
        plain = all(isinstance(p, Conditional) and type(p).forward is Conditional.forward for p in parts)
        self._shares = plain and len(networks) == 1 and parts[0].network is not None

    def forward(self, *inputs: Tensor, event_dims: Sequence[int] | None = None) -> Any:
        if self._shares and inputs:
            parts = [part for part in self.parts if isinstance(part, Conditional)]
            for part in parts:
                for x in inputs:
                    part.check(x)
            batch, rows = self.rows(inputs, event_dims)
            features = parts[0].network(*rows)
            return Product([part.from_features(features, batch) for part in parts])
        return Product([condition(part, *inputs, event_dims=event_dims, role="part") for part in self.parts])


class Product(Copied, dist.TorchDistribution):
    """The joint distribution of independent vectors, whose values are concatenated.

    Args:
        parts: distributions over vectors.

    Example:
        >>> p = Product([dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.Poisson(torch.ones(1)).to_event(1)])
        >>> p.log_prob(torch.tensor([0.0, 0.0, 1.0]))
        tensor(-2.8379)
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, parts: Sequence[Any]) -> None:
        for part in parts:
            if len(part.event_shape) != 1:
                raise ValueError(
                    f"product: expected parts over vectors, got event shape {tuple(part.event_shape)}. Try an int as "
                    "event_shape, or .to_event(1)."
                )
        batch = torch.broadcast_shapes(*(part.batch_shape for part in parts))
        self.parts = [part.expand(batch) for part in parts]
        self.sizes = [part.event_shape[0] for part in parts]
        super().__init__(batch, Size([sum(self.sizes)]), validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Product:
        return Product([part.expand(Size(batch_shape)) for part in self.parts])

    @property
    def has_rsample(self) -> bool:
        return all(part.has_rsample for part in self.parts)

    @property
    def support(self) -> Any:
        supports = [part.support for part in self.parts]
        return constraints.independent(constraints.cat([_Elements(s) for s in supports], -1, self.sizes), 1)

    @property
    def mean(self) -> Tensor:
        means = [expected_value(part) for part in self.parts]
        if any(m is None for m in means):
            raise NotImplementedError("product: the mean of one of its parts is not known")
        return torch.cat(means, -1)

    @property
    def variance(self) -> Tensor:
        return torch.cat([part.variance for part in self.parts], -1)

    def sample(self, sample_shape: Size = Size()) -> Tensor:
        values = [part.sample(sample_shape) for part in self.parts]
        dtype = next((v.dtype for v in values if v.is_floating_point()), torch.get_default_dtype())
        return torch.cat([v.to(dtype) for v in values], -1)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:
        return torch.cat([part.rsample(sample_shape) for part in self.parts], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        return sum(part.log_prob(v) for part, v in zip(self.parts, value.split(self.sizes, -1), strict=True))


class _Elements(constraints.Constraint):
    """A constraint on vectors, as a constraint on each of their elements."""

    event_dim = 0

    def __init__(self, constraint: Any) -> None:
        while isinstance(constraint, constraints.independent):
            constraint = constraint.base_constraint
        self.constraint, self.is_discrete = constraint, constraint.is_discrete

    def check(self, value: Tensor) -> Tensor:
        inside = self.constraint.check(value)
        return inside if self.constraint.event_dim == 0 else inside.unsqueeze(-1).expand(value.shape)


@biject_to.register(_Elements)
def _bijection(elements: _Elements) -> Any:
    return biject_to(elements.constraint)
