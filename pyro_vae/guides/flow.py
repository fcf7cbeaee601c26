r"""A flow for one site, given a context: u = c + s ∘ [μ(h) + σ(h) ∘ A(S(ε; h); h)], ε ~ N(0, I).

S is a monotone rational spline of each coordinate (Durkan, Bekasov, Murray & Papamakarios 2019, *Neural Spline Flows*),
A an affine autoregressive map of several (Papamakarios, Pavlakou & Murray 2017); both start near the identity.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.transforms import conditional_affine_autoregressive, conditional_spline
from torch import Tensor, nn
from torch.distributions import AffineTransform, constraints

from pyro_vae.distributions.conditional import positive
from pyro_vae.distributions.flows import ConditionalFlow

__all__ = ["SiteFlow"]

BINS, BOUND = 8, 5.0
NEUTRAL = 0.5413  # softplus of it is one: the slope of a spline that is the identity


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
        spline = conditional_spline(size, width, hidden_dims=[hidden], count_bins=BINS, bound=BOUND)
        transforms = [spline]
        if size > 1:
            transforms.append(conditional_affine_autoregressive(size, width, hidden_dims=[max(hidden, 2 * size)]))
        with torch.no_grad():
            for transform in transforms:
                transform.nn.layers[-1].weight.mul_(0.1)
                transform.nn.layers[-1].bias.zero_()
            slopes = slice(2 * size * BINS, 2 * size * BINS + size * (BINS - 1))
            spline.nn.layers[-1].bias[slopes] = NEUTRAL
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


class _Affine(ConditionalTransformModule):
    """u = c + s ∘ [μ(h) + σ(h) ∘ y]."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

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
