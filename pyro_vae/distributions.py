r"""Conditional distributions: one family for three roles.

A model and its amortized posterior are two factorisations of one coupling, p(z) p(x|z) and q(z|x), so the
same classes serve as prior, likelihood and posterior. Each is a network, which maps rows of inputs to
features, and a head, which maps features linearly to the parameters of a Pyro distribution:

    features = network(inputs),   parameters = W features + b,   distribution = family(parameters).

Scales are softplus(·) + 1e-5, and start at one: they neither reach zero nor explode. A full covariance is

    z = μ + L ε,   L = diag(τ) (I + mask ∘ L' / √d),   Σ = L Lᵀ,

the L = mask ∘ L' + diag(τ) of Kingma & Welling (2019), *An Introduction to Variational Autoencoders*, section
2.5, with L' started at zero and its row i measured in units of τ_i √d: entries of order one then give a triangle whose
inverse is of order one too, in any dimension, where entries of order τ_i alone give one that grows exponentially.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import expm1, log, prod, sqrt
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.distribution import Distribution as PyroDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_vae.gaussians import MultivariateNormal

__all__ = [
    "Conditional",
    "ConditionalBernoulli",
    "ConditionalMultivariateNormal",
    "ConditionalNormal",
    "LearnedScale",
    "MultivariateNormal",
    "StandardNormal",
    "condition",
]

SMALLEST_SCALE = 1e-5


def condition(conditional: Any, *inputs: Tensor, event_dims: Sequence[int] | None = None, role: str = "it") -> Any:
    """The distribution of `conditional` given `inputs`, whatever kind of conditional distribution it is.

    Args:
        conditional: a `Conditional`, a `pyro.distributions.ConditionalDistribution` (its `condition` is called),
            a distribution (returned as it is), or any callable that returns one: a module, a function, a Zuko flow.
        inputs: what to condition on.
        event_dims: number of event dimensions of each input (those right of its batch dimensions).
        role: how error messages call it.

    Returns:
        A Pyro distribution; one of torch or Zuko is wrapped into one.

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
    elif isinstance(conditional, Conditional):
        result = conditional(*inputs, event_dims=event_dims)
    elif callable(conditional):
        result = conditional(*inputs)
    else:
        raise TypeError(f"{role}: expected a distribution or a callable that returns one, got {conditional!r}.")
    if isinstance(result, PyroDistribution):
        return result
    if isinstance(result, torch.distributions.Distribution):
        return _Adapted(result)
    raise TypeError(
        f"{role}: expected a distribution, got {type(result).__name__} from {type(conditional).__name__}. "
        "Try to return dist.Normal(loc, scale).to_event(1), or wrap the network: ConditionalNormal(network, size)."
    )


class StandardNormal(nn.Module):
    """The prior p(z) = N(0, I), on the device and in the dtype of the module.

    Args:
        event_shape: shape of one z.

    Example:
        >>> StandardNormal(8)().event_shape
        torch.Size([8])
    """

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__()
        self.event_shape = _shape(event_shape)
        self.register_buffer("loc", torch.zeros(self.event_shape), persistent=False)
        self.register_buffer("scale", torch.ones(self.event_shape), persistent=False)

    def forward(self) -> Any:
        return dist.Normal(self.loc, self.scale).to_event(len(self.event_shape))


class LearnedScale(nn.Module):
    """A positive scale that is learned but depends on nothing: softplus(ρ) + 1e-5.

    Args:
        shape: () for one scale shared by all dimensions, the event shape for one each.
        init: where it starts; positive.

    Example:
        >>> round(LearnedScale(init=0.1)().item(), 6)
        0.1
    """

    def __init__(self, shape: int | Sequence[int] = (), *, init: float = 1.0) -> None:
        super().__init__()
        if not init > SMALLEST_SCALE:
            raise ValueError(f"LearnedScale: expected init > {SMALLEST_SCALE}, got {init}.")
        self.raw = nn.Parameter(torch.full(_shape(shape), log(expm1(init - SMALLEST_SCALE))))

    def forward(self) -> Tensor:
        return nn.functional.softplus(self.raw) + SMALLEST_SCALE


class Conditional(nn.Module, ABC):
    """Abstract: a network and a linear head that give the parameters of a distribution of y given inputs.

    A family says which parameters it needs (`parameter_shapes` to the constructor) and how they make a
    distribution (`distribution`). Everything left of the events is batch: it is flattened before the network and
    restored after it, so that convolutions and batch norm work under any number of plates and particles.

    Args:
        network: maps inputs (B, *event) to features (B, features).
        event_shape: shape of one y.
        parameter_shapes: shape of each parameter of one y.
        features: what the network puts out: a width, or (channels, height, width) of a feature map, which the
            head maps pixel by pixel. Default: `network.out_features`, or that of its last linear layer.
    """

    def __init__(
        self,
        network: nn.Module,
        event_shape: int | Sequence[int],
        parameter_shapes: Sequence[Sequence[int]],
        features: int | Sequence[int] | None,
    ) -> None:
        super().__init__()
        self.network = network
        self.event_shape = _shape(event_shape)
        self._shapes = [tuple(shape) for shape in parameter_shapes]
        self.head = _head(_width(network) if features is None else features, self._shapes, type(self).__name__)
        with torch.no_grad():  # every parameter but the first starts at its neutral value
            first = self.head.out_channels // len(self._shapes) if self._is_map else prod(self._shapes[0])
            self.head.weight[first:] = 0.0
            self.head.bias[first:] = 0.0

    @property
    def _is_map(self) -> bool:
        return isinstance(self.head, nn.Conv2d)

    @abstractmethod
    def distribution(self, *parameters: Tensor) -> Any:
        """The distribution with these raw (unconstrained) parameters, each (*batch, *shape)."""

    def forward(self, *inputs: Tensor, event_dims: Sequence[int] | None = None) -> Any:
        """The distribution of y given `inputs`, each (*batch, *event); `event_dims` counts the event dimensions of
        each (default: one). Batch shapes broadcast.
        """
        dims = [1] * len(inputs) if event_dims is None else event_dims
        for x in inputs:
            self._check(x)
        batch = torch.broadcast_shapes(*(x.shape[: x.dim() - d] for x, d in zip(inputs, dims, strict=True)))
        rows = [x.expand(*batch, *x.shape[x.dim() - d :]) for x, d in zip(inputs, dims, strict=True)]
        rows = [x.reshape(prod(batch), *x.shape[len(batch) :]) for x in rows]  # (B, *event)
        raw = self.head(self.network(*rows))
        if self._is_map:
            parameters = list(raw.chunk(len(self._shapes), dim=1))
        else:
            parameters = list(raw.split([prod(shape) for shape in self._shapes], dim=1))
        shapes = self._shapes
        return self.distribution(*(p.reshape(*batch, *s) for p, s in zip(parameters, shapes, strict=True)))

    def _check(self, x: Tensor) -> None:
        weight = self.head.weight
        if x.dtype != weight.dtype:
            raise TypeError(
                f"{type(self).__name__}: expected inputs of {weight.dtype}, the weights' dtype, got {x.dtype}. "
                f"Try x.to({weight.dtype}) (and pixels / 255), or the module's .double()."
            )
        if x.device != weight.device:
            raise ValueError(
                f"{type(self).__name__}: expected inputs on {weight.device}, where the weights are, got {x.device}. "
                "Try to move one of them with .to(device)."
            )


class ConditionalNormal(Conditional):
    """The Normal with independent elements, y ~ N(μ(x), diag σ²), over events of any shape.

    Args:
        network: maps inputs to features.
        event_shape: shape of one y.
        scale: None: σ(x) comes from the network; a number or tensor: fixed; a module that is called without
            arguments, as `LearnedScale()` (shared) or `LearnedScale(event_shape)` (one per element): learned.
        features: see `Conditional`.

    Raises:
        ValueError: a fixed scale that is not positive.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> q = ConditionalNormal(MLP(784, [400]), 50)
        >>> q(torch.zeros(5, 784)).event_shape
        torch.Size([50])
    """

    def __init__(
        self,
        network: nn.Module,
        event_shape: int | Sequence[int],
        *,
        scale: float | Tensor | nn.Module | None = None,
        features: int | Sequence[int] | None = None,
    ) -> None:
        shape = _shape(event_shape)
        super().__init__(network, shape, [shape] if scale is not None else [shape, shape], features)
        if scale is None or isinstance(scale, nn.Module):
            self.scale = scale
        else:
            scale = torch.as_tensor(scale, dtype=self.head.weight.dtype)
            if not (scale > 0).all():
                raise ValueError(f"ConditionalNormal: expected a positive scale, got {scale}.")
            self.register_buffer("scale", scale)

    def distribution(self, loc: Tensor, raw_scale: Tensor | None = None) -> Any:
        if raw_scale is not None:
            scale = _positive(raw_scale)
        else:
            scale = self.scale() if isinstance(self.scale, nn.Module) else self.scale
        return dist.Normal(loc, scale).to_event(len(self.event_shape))


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
        self, network: nn.Module, event_shape: int | Sequence[int], *, features: int | Sequence[int] | None = None
    ) -> None:
        shape = _shape(event_shape)
        d = prod(shape)
        super().__init__(network, shape, [(d,), (d,), (d * (d - 1) // 2,)], features)
        row, column = torch.tril_indices(d, d, offset=-1)
        self.register_buffer("_strictly_lower", row * d + column, persistent=False)

    def distribution(self, loc: Tensor, raw_scale: Tensor, lower: Tensor) -> Any:
        d, batch = loc.shape[-1], loc.shape[:-1]
        flat = lower.new_zeros(*batch, d * d).index_copy(-1, self._strictly_lower, lower / sqrt(d))
        scale, lower = _positive(raw_scale), flat.unflatten(-1, (d, d))
        return MultivariateNormal(loc, event_shape=self.event_shape, scale=scale, lower=lower)


class ConditionalBernoulli(Conditional):
    """Independent Bernoulli elements with logits(x), over events of any shape; values are 0 or 1.

    Args:
        network: maps inputs to features.
        event_shape: shape of one y.
        features: see `Conditional`.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> p = ConditionalBernoulli(MLP(50, [400]), (28, 28))
        >>> p(torch.zeros(5, 50)).sample().shape
        torch.Size([5, 28, 28])
    """

    def __init__(
        self, network: nn.Module, event_shape: int | Sequence[int], *, features: int | Sequence[int] | None = None
    ) -> None:
        super().__init__(network, event_shape, [_shape(event_shape)], features)

    def distribution(self, logits: Tensor) -> Any:
        return dist.Bernoulli(logits=logits).to_event(len(self.event_shape))


class _Adapted(dist.TorchDistribution):
    """A distribution of torch or Zuko as one of Pyro's, with the `support`, `sample` and `rsample` that Pyro's own
    adapter for Zuko lacks."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: torch.distributions.Distribution) -> None:
        self.base = base
        self.has_rsample = base.has_rsample
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> _Adapted:
        return _Adapted(self.base.expand(Size(batch_shape)))

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


def _shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _positive(raw: Tensor) -> Tensor:
    return nn.functional.softplus(raw + log(expm1(1.0 - SMALLEST_SCALE))) + SMALLEST_SCALE  # one at raw = 0


def _width(network: nn.Module) -> int | tuple[int, ...]:
    """The width of what a network puts out, if it says."""
    width = getattr(network, "out_features", None)
    if width is not None:
        return width
    for layer in reversed(list(network.children()) if isinstance(network, nn.Sequential) else []):
        if any(True for _ in layer.parameters()) or hasattr(layer, "out_features"):
            return _width(layer)
    raise ValueError(
        f"cannot tell how many features {type(network).__name__} puts out: it has no attribute `out_features` and does "
        "not end in a linear layer. Try features=…, a width or (channels, height, width)."
    )


def _head(features: int | Sequence[int], shapes: list[tuple[int, ...]], family: str) -> nn.Linear | nn.Conv2d:
    if isinstance(features, int):
        return nn.Linear(features, sum(prod(shape) for shape in shapes))
    if any(len(shape) != 3 or shape[1:] != tuple(features[1:]) for shape in shapes):
        raise ValueError(
            f"{family}: a feature map {tuple(features)} expects an event shape (channels, *{tuple(features[1:])}), "
            f"got {shapes[0]}. Try nn.Flatten() at the end of the network."
        )
    return nn.Conv2d(features[0], sum(shape[0] for shape in shapes), 1)
