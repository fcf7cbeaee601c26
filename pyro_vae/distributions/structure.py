r"""What all conditional distributions have in common: they return a distribution when called, y ~ p(y|inputs).

A VAE has two joint distributions of x and z, which training makes agree,

    p(z) p(x|z)   and   p_data(x) q(z|x).

Both are made of conditional distributions, so that the same classes serve as prior, likelihood and posterior.
`condition` calls anything that returns a distribution, and `Broadcasting` tells batch from event dimensions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.distribution import Distribution as PyroDistribution
from torch import Size, Tensor, nn
from torch.distributions import Independent, constraints

from pyro_vae.arguments import check_shape

__all__ = ["Broadcasting", "check_conditional", "condition", "event_shape_of", "expected_value", "picklable_state"]


def check_conditional(role: str, conditional: Any) -> Any:
    """Raises TypeError for what can be no conditional distribution."""
    kinds = (torch.distributions.Distribution, dist.ConditionalDistribution)
    if isinstance(conditional, kinds) or (callable(conditional) and not isinstance(conditional, (type, Tensor))):
        return conditional
    got = f"the class {conditional.__name__}" if isinstance(conditional, type) else repr(conditional)
    raise TypeError(
        f"{role}: expected a distribution or a callable that returns one, got {got}. Try "
        "ConditionalNormal(network, size), or dist.Normal(loc, scale).to_event(1)."
    )


def condition(conditional: Any, *inputs: Tensor, event_dims: Sequence[int] | None = None, role: str = "it") -> Any:
    """The distribution of `conditional` given `inputs`, for any kind of conditional distribution.

    Args:
        conditional: a family of this package, a `pyro.distributions.ConditionalDistribution` (its `condition` is
            called), a distribution (returned as it is), or any callable that returns one: a module, a function, a Zuko
            flow.
        inputs: what to condition on.
        event_dims: number of event dimensions of each input, which are to the right of its batch dimensions.
        role: what error messages call it.

    Returns:
        A Pyro distribution. A distribution of torch or Zuko is wrapped in one.

    Raises:
        TypeError: `conditional` is not callable, or does not return a distribution.

    Example:
        >>> condition(lambda z: torch.distributions.Normal(z, 1.0), torch.zeros(3)).sample().shape
        torch.Size([3])
    """
    if isinstance(conditional, (PyroDistribution, torch.distributions.Distribution)):
        result = conditional
    elif isinstance(conditional, dist.ConditionalDistribution):
        result = conditional.condition(*inputs)
    elif isinstance(conditional, Broadcasting):
        result = conditional(*inputs, event_dims=event_dims)
    else:
        result = check_conditional(role, conditional)(*inputs)
    if isinstance(result, PyroDistribution):
        return result
    if isinstance(result, torch.distributions.Distribution):
        return Adapted(result)
    raise TypeError(
        f"{role}: expected a distribution, got {type(result).__name__} from {type(conditional).__name__}. "
        "Try to return dist.Normal(loc, scale).to_event(1), or wrap the network: ConditionalNormal(network, size)."
    )


class Broadcasting(nn.Module):
    """Abstract base class of conditional distributions that tell batch from event dimensions of their inputs.

    The caller says how many event dimensions an input has. All dimensions to the left of these are batch dimensions,
    under any number of plates and particles.

    It is not an `abc.ABC`, whose metaclass would meet that of `pyro.nn.PyroModule`: `PyroModule[ConditionalNormal]` and
    `to_pyro_module_` work, and an instance of an abstract class is refused when it is made.

    Raises:
        TypeError: the class lacks a method that is abstract here, such as `forward`.
    """

    def __init__(self) -> None:
        cls = type(self)
        missing = [name for name in dir(cls) if getattr(getattr(cls, name), "__isabstractmethod__", False)]
        if missing:
            raise TypeError(
                f"{cls.__name__}: expected a subclass that defines {', '.join(missing)}, got one that does not. Try "
                f"def {missing[0]}(self, …) in it, or a family of pyro_vae.distributions."
            )
        super().__init__()

    def __getstate__(self) -> dict[str, Any]:
        return picklable_state(self, super())

    @abstractmethod
    def forward(self, *inputs: Tensor, event_dims: Sequence[int] | None = None) -> Any:
        """The distribution of y given `inputs`, each (*batch, *event). Batch shapes broadcast.

        Args:
            *inputs: what to condition on.
            event_dims: number of event dimensions of each input; default: one each.
        """

    @staticmethod
    def rows(inputs: Sequence[Tensor], event_dims: Sequence[int] | None) -> tuple[Size, list[Tensor]]:
        """The batch shape of the inputs, and the inputs with the batch flattened, (B, *event)."""
        dims = [1] * len(inputs) if event_dims is None else event_dims
        for x, d in zip(inputs, dims, strict=True):
            if x.dim() < d:
                raise ValueError(
                    f"expected an input (*batch, *event) with {d} event dimensions, got shape {tuple(x.shape)}. Try "
                    "x.reshape(1, -1)."
                )
        shapes = [x.shape[: x.dim() - d] for x, d in zip(inputs, dims, strict=True)]
        try:
            batch = torch.broadcast_shapes(*shapes)
        except RuntimeError as error:
            got = " and ".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(f"expected inputs of batch shapes that broadcast, got {got}. Try c.expand(…).") from error
        rows = [x.expand(*batch, *x.shape[x.dim() - d :]) for x, d in zip(inputs, dims, strict=True)]
        return batch, [x.reshape(prod(batch), *x.shape[len(batch) :]) for x in rows]


def picklable_state(module: nn.Module, parent: Any) -> dict[str, Any]:
    """What `pickle` and `copy` take of a module. `pyro.param` leaves a weak reference on each parameter that is in the
    store, which cannot be pickled and which it makes anew; it is removed, as `ParamStoreDict.get_state` does.

    Args:
        module: whose state it is.
        parent: `super()` in its class.
    """
    for parameter in module.parameters():
        vars(parameter).pop("unconstrained", None)
    return parent.__getstate__()


class Adapted(dist.TorchDistribution):
    """A distribution of torch or Zuko as one of Pyro, with the `support`, `sample` and `rsample` that Pyro's own
    adapter for Zuko lacks."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: torch.distributions.Distribution) -> None:
        self.base = base
        self.has_rsample = base.has_rsample
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Adapted:
        return Adapted(self.base.expand(Size(batch_shape)))

    @property
    def support(self) -> Any:
        try:
            support = self.base.support
        except (AttributeError, NotImplementedError):
            support = None
        return constraints.independent(constraints.real, len(self.event_shape)) if support is None else support

    @property
    def mean(self) -> Tensor:
        return self.base.mean

    @property
    def variance(self) -> Tensor:
        return self.base.variance

    def rsample(self, sample_shape: Size = Size()) -> Tensor:
        return self.base.rsample(sample_shape)

    def sample(self, sample_shape: Size = Size()) -> Tensor:
        with torch.no_grad():
            return self.base.sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(value)


def expected_value(distribution: Any) -> Tensor | None:
    """E[y], or None if it is not known in closed form. Categories have no mean; this gives the most probable one."""
    base = distribution
    while isinstance(base, Independent):
        base = base.base_dist
    try:
        return base.mode.to(base.logits.dtype) if isinstance(base, dist.Categorical) else distribution.mean
    except NotImplementedError:
        return None


def event_shape_of(shape: int | Sequence[int]) -> tuple[int, ...]:
    """The event shape as a tuple; an int is the length of a vector."""
    return check_shape("event_shape", shape)
