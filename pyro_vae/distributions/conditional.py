r"""`Conditional`, the base class of the families: a network and a linear head.

The network maps rows of inputs to features. The head maps features linearly to the parameters of a Pyro distribution:

    features = network(inputs),   parameters = W features + b,   distribution = family(parameters).

Without a network, the parameters themselves are learned, and the distribution has no inputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import expm1, log, prod
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from pyro_vae.arguments import check_dense, check_positive, checked
from pyro_vae.distributions.structure import Broadcasting, event_shape_of

__all__ = ["SMALLEST_SCALE", "Conditional", "positive"]

SMALLEST_SCALE = 1e-5


class Conditional(Broadcasting):
    """Abstract base class: a network and a linear head give the parameters of a distribution of y given inputs.

    A subclass, called a family, defines how its raw parameters make a distribution. It has `num_parameters` of them,
    each of the event's shape, unless it passes other shapes to the constructor. All dimensions to the left of the event
    dimensions are batch dimensions. They are flattened before the network and restored after it, so that convolutions
    and batch norm work under any number of plates and particles.

    Args:
        network: maps inputs (B, *event) to features (B, features). With None, the parameters are learned and do not
            depend on inputs, as in a prior.
        event_shape: shape of one y.
        features: size of the network's output: a width, or (channels, height, width) for a feature map, which the
            head maps pixel by pixel. Default: `network.out_features`, or the width of its last linear layer.
        parameter_shapes: set by families: the shape of each parameter of one y.

    Example:
        >>> import pyro.distributions as dist
        >>> class ConditionalWeibull(Conditional):  # your own family
        ...     num_parameters = 2
        ...     def distribution(self, scale, concentration):
        ...         return dist.Weibull(positive(scale), positive(concentration)).to_event(len(self.event_shape))
        >>> ConditionalWeibull(nn.Linear(2, 16), 5)(torch.zeros(3, 2)).sample().shape
        torch.Size([3, 5])
    """

    num_parameters: ClassVar[int] = 1

    @checked
    def __init__(
        self,
        network: nn.Module | None,
        event_shape: int | Sequence[int],
        *,
        features: int | Sequence[int] | None = None,
        parameter_shapes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.event_shape = event_shape_of(event_shape)
        shapes = [self.event_shape] * self.num_parameters if parameter_shapes is None else parameter_shapes
        self._shapes = [tuple(shape) for shape in shapes]
        if network is None:
            self.free = nn.Parameter(torch.zeros(sum(map(prod, self._shapes))))
            return
        self.head = _head(_width(network) if features is None else features, self._shapes, type(self).__name__)
        with torch.no_grad():  # every parameter but the first starts at its neutral value
            first = self.head.out_channels // len(self._shapes) if self._is_map else prod(self._shapes[0])  # type: ignore[operator]
            self.head.weight[first:] = 0.0
            self.head.bias[first:] = 0.0

    @property
    def _is_map(self) -> bool:
        return isinstance(self.head, nn.Conv2d)

    @abstractmethod
    def distribution(self, *parameters: Tensor) -> Any:
        """The distribution with these raw (unconstrained) parameters, each (*batch, *shape)."""

    def forward(self, *inputs: Tensor, event_dims: Sequence[int] | None = None) -> Any:
        if self.network is None:
            if inputs:
                raise ValueError(
                    f"{type(self).__name__}: expected no inputs without a network, got {len(inputs)}. Try a network."
                )
            parts = self.free.split([prod(shape) for shape in self._shapes])
            return self.distribution(*(p.reshape(s) for p, s in zip(parts, self._shapes, strict=True)))
        for x in inputs:
            self.check(x)
        batch, rows = self.rows(inputs, event_dims)
        return self.from_features(self.network(*rows), batch)

    def from_features(self, features: Tensor, batch: Size) -> Any:
        """The distribution with this batch shape, given the network's output for the flattened rows, (B, features)."""
        if len(features) != prod(batch) or features.dim() != (4 if self._is_map else 2):
            raise ValueError(
                f"{type(self).__name__}: expected features of {prod(batch)} rows from the network, got shape "
                f"{tuple(features.shape)}. Try nn.Flatten() at its end, or rows of the shape that it takes."
            )
        raw = self.head(features)
        if self._is_map:
            parts = list(raw.chunk(len(self._shapes), dim=1))
        else:
            parts = list(raw.split([prod(shape) for shape in self._shapes], dim=1))
        return self.distribution(*(p.reshape(*batch, *s) for p, s in zip(parts, self._shapes, strict=True)))

    def keep(self, name: str, value: float | Tensor | nn.Module | None) -> None:
        """Stores a positive parameter that need not come from the network.

        A number or tensor is fixed, and broadcasts to the event shape. A module is learned, and is called without
        arguments. None means that the parameter comes from the network.
        """
        if value is None or isinstance(value, nn.Module):
            setattr(self, name, value)
            return
        value = check_positive(f"{type(self).__name__}: {name}", value)
        value = torch.as_tensor(value, dtype=next(self.parameters()).dtype)
        shape, event = tuple(value.shape), self.event_shape
        pairs = zip(reversed(shape), reversed(event), strict=False)
        if len(shape) > len(event) or any(n not in (1, m) for n, m in pairs):  # more would pass for a batch
            raise ValueError(
                f"{type(self).__name__}: expected a {name} that broadcasts to the event shape {event}, got one of "
                f"shape {shape}. Try a single number, or one of shape {event}."
            )
        self.register_buffer(name, value)

    def kept(self, name: str, raw: Tensor | None, smallest: float = SMALLEST_SCALE) -> Tensor:
        """The parameter that `keep` stored, or the one from the network if `keep` was given None."""
        value = getattr(self, name)
        if value is None:
            return positive(raw, smallest)
        return value() if isinstance(value, nn.Module) else value

    def check(self, x: Tensor) -> None:
        """Raises TypeError if x has another dtype than the weights, and ValueError if it is on another device."""
        check_dense(type(self).__name__, x, meta=True)
        weight = self.head.weight
        if x.dtype != weight.dtype:
            raise TypeError(
                f"{type(self).__name__}: expected inputs of {weight.dtype}, the weights' dtype, got {x.dtype}. "
                f"Try x.to({weight.dtype}) (and x / 255 for pixels), or module.double()."
            )
        if x.device != weight.device:
            raise ValueError(
                f"{type(self).__name__}: expected inputs on {weight.device}, where the weights are, got {x.device}. "
                "Try to move one of them with .to(device)."
            )


def positive(raw: Tensor, smallest: float = SMALLEST_SCALE) -> Tensor:
    """softplus(raw + c) + smallest, where c makes the value one at raw = 0."""
    return nn.functional.softplus(raw + log(expm1(1.0 - smallest))) + smallest


def _width(network: nn.Module) -> int | tuple[int, ...]:
    """The size of a network's output, as its attribute `out_features` or its last layer tells it."""
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
