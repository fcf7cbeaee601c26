r"""A flow for one site, given a context: u = c + s ∘ [μ(h) + σ(h) ∘ A(S(ε; h); h)], ε ~ N(0, I).

S is a monotone rational-quadratic spline of each coordinate (Durkan, Bekasov, Murray & Papamakarios 2019, *Neural
Spline Flows*; Zuko's), A an affine autoregressive map of several (Papamakarios, Pavlakou & Murray 2017; Pyro's). Both
start near the identity.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.transforms import conditional_affine_autoregressive
from torch import Tensor, nn
from torch.distributions import AffineTransform, IndependentTransform, constraints

from pyro_vae.distributions.conditional import positive
from pyro_vae.distributions.flows import ConditionalFlow

__all__ = ["SiteFlow"]

BINS, BOUND = 8, 5.0


class SiteFlow(nn.Module):
    """q(u|context) over R^size.

    Args:
        width: of the context.
        centre, spread: units of each coordinate, (size,).
        first_raw_scale: σ before training, as `positive` takes it.
        hidden: width of the hidden layers that read the context.
    """

    def __init__(self, width: int, centre: Tensor, spread: Tensor, *, first_raw_scale: float, hidden: int = 32) -> None:
        super().__init__()
        size = len(centre)
        transforms: list[Any] = [_Spline(size, width, hidden)]
        if size > 1:
            transforms.append(conditional_affine_autoregressive(size, width, hidden_dims=[max(hidden, 2 * size)]))
            with torch.no_grad():
                transforms[-1].nn.layers[-1].weight.mul_(0.1)
                transforms[-1].nn.layers[-1].bias.zero_()
        transforms.append(_Affine(width, centre, spread, first_raw_scale))
        self.flow = ConditionalFlow(_Standard(size), transforms, network=nn.Identity())

    def forward(self, context: Tensor) -> Any:
        return self.flow(context)


class _Standard(nn.Module):
    """N(0, I), where the weights are."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(size), persistent=False)

    def forward(self, *_: Tensor) -> Any:
        return dist.Normal(self.zeros, 1.0).to_event(1)


class _Map(ConditionalTransformModule):
    """A map of vectors with a context."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True


class _Spline(_Map):
    """A monotone spline of each coordinate, the identity beyond ±5."""

    def __init__(self, size: int, width: int, hidden: int) -> None:
        super().__init__()
        try:
            from zuko.transforms import MonotonicRQSTransform
        except ImportError as error:
            raise ImportError("AmortizedFlow needs Zuko's splines. Try pip install 'pyro-vae[flows]'.") from error
        self._spline, self._shape = MonotonicRQSTransform, (size, 3 * BINS - 1)
        last = nn.Linear(hidden, size * (3 * BINS - 1))
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), last)
        with torch.no_grad():
            last.weight.mul_(0.1)
            last.bias.zero_()

    def condition(self, context: Tensor) -> Any:
        raw = self.head(context).unflatten(-1, self._shape)
        return IndependentTransform(self._spline(*raw.split([BINS, BINS, BINS - 1], -1), bound=BOUND), 1)


class _Affine(_Map):
    """u = c + s ∘ [μ(h) + σ(h) ∘ y]."""

    def __init__(self, width: int, centre: Tensor, spread: Tensor, first_raw_scale: float) -> None:
        super().__init__()
        size = len(centre)
        self.head = nn.Linear(width, 2 * size)
        self.register_buffer("centre", centre)
        self.register_buffer("spread", spread)
        with torch.no_grad():
            self.head.weight[size:] = 0.0
            self.head.bias[size:] = first_raw_scale

    def condition(self, context: Tensor) -> Any:
        loc, raw_scale = self.head(context).chunk(2, -1)
        return AffineTransform(self.centre + self.spread * loc, self.spread * positive(raw_scale), event_dim=1)
