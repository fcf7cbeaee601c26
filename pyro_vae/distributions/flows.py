r"""Flows: a chain of invertible transformations of a simpler distribution,

    z₀ ~ q₀(z₀|x),   z = T_L(··· T_1(z₀; x) ···; x),   log q(z|x) = log q₀(z₀|x) − Σ_l log |det ∂T_l/∂z_{l−1}|,

with triangular Jacobians where the transformations are autoregressive (Rezende & Mohamed 2015, *Variational Inference
with Normalizing Flows*; Kingma et al. 2016, *Improving Variational Inference with Inverse Autoregressive Flow*). The
transformations are those of Pyro, torch and Zuko; here is what makes conditional distributions of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import ComposeTransform, Transform

from pyro_vae.distributions.structure import Broadcasting, condition

__all__ = ["ConditionalFlow"]


class ConditionalFlow(Broadcasting):
    r"""y = T_L(··· T_1(y₀)), y₀ from a base distribution: transformations of Pyro, torch and Zuko, mixed as you like.

    A transformation may be a torch or Pyro transform (`pyro.distributions.transforms.spline_coupling(2)`), one of
    Pyro's conditional ones (`conditional_affine_autoregressive(2, context_dim)`) or a lazy one of Zuko
    (`zuko.flows.MaskedAutoregressiveTransform(2, context)`); the last two see `network(x)`. Each is applied as it
    stands from base to y: an autoregressive one is then an inverse autoregressive flow, fast to draw from, its `.inv`
    a masked autoregressive flow, fast to score any value with. A flow scores its own draws without an inversion,
    whichever way it runs.

    Args:
        base: distribution of y₀: a conditional distribution, called with the same inputs, or a distribution.
        transforms: T_1, …, T_L, over vectors.
        network: maps inputs (B, *event) to the context of the conditional transformations, (B, width); default: none,
            they are called without.

    Returns (when called):
        A distribution with `support`, `rsample` and `log_prob`, and the batch shape of the inputs; its mean is not
        known.

    Raises:
        ValueError: a conditional transformation of Pyro without a network to give its context.

    Example:
        >>> from pyro.distributions.transforms import conditional_affine_autoregressive, spline_coupling
        >>> from pyro_vae.distributions import ConditionalNormal
        >>> from pyro_vae.networks import MLP
        >>> q = ConditionalFlow(
        ...     ConditionalNormal(MLP(784, [64]), 2),
        ...     [conditional_affine_autoregressive(2, 16), spline_coupling(2)],
        ...     network=MLP(784, [16]),
        ... )
        >>> q(torch.zeros(5, 784)).rsample().shape
        torch.Size([5, 2])
    """

    def __init__(self, base: Any, transforms: Sequence[Any], *, network: nn.Module | None = None) -> None:
        super().__init__()
        self.base, self.network = base, network
        self.transforms = list(transforms)
        self.transforms_modules = nn.ModuleList(m for t in transforms for m in _modules(t))
        if network is None and any(hasattr(t, "condition") for t in transforms):
            raise ValueError("ConditionalFlow: conditional transformations expect a context. Try network=MLP(…).")

    def forward(self, *inputs: Tensor, event_dims: Sequence[int] | None = None) -> Any:
        for module in self.transforms_modules:  # those of Pyro are not called as modules are, and have no hooks
            module.train(self.training)
        fixed = isinstance(self.base, torch.distributions.Distribution)
        base = condition(self.base, *(() if fixed else inputs), event_dims=event_dims, role="base of the flow")
        context = None
        if inputs:
            batch, rows = self.rows(inputs, event_dims)
            base = base.expand(batch)
            if self.network is not None:
                context = self.network(*rows)
                context = context.reshape(*batch, context.shape[-1])
        return _Flow(base, [self._transform(t, context) for t in self.transforms])

    def __getstate__(self) -> dict[str, Any]:
        """Without the last draw, which Pyro's transforms keep: a copy of a flow that was used has weights alone."""
        for module in self.transforms_modules.modules():
            for name, value in vars(module).items():
                if name == "_cached_x_y":
                    setattr(module, name, (None, None))
                elif isinstance(value, Tensor) and not value.is_leaf:
                    setattr(module, name, None)
        return vars(self).copy()

    @staticmethod
    def _transform(transform: Any, context: Tensor | None) -> Transform:
        if isinstance(transform, Transform):
            return transform
        if hasattr(transform, "condition"):
            return transform.condition(context)
        return transform(context)  # lazy, of Zuko


def _modules(transform: Any) -> list[nn.Module]:
    """The modules that hold its weights, also where it is the inverse of one, which is no module itself."""
    if isinstance(transform, nn.Module):
        return [transform]
    if isinstance(transform, ComposeTransform):
        return [m for part in transform.parts for m in _modules(part)]
    inverse = transform.inv if isinstance(transform, Transform) else None
    return [inverse] if isinstance(inverse, nn.Module) else []


class _Flow(dist.TransformedDistribution):
    """A transformed distribution that scores its last draw from the noise that made it."""

    _draw: tuple[Tensor, Tensor, int] | None = None  # the last draw, its log-probability and its version

    def expand(self, batch_shape: Size, _instance: Any = None) -> _Flow:
        return _Flow(self.base_dist.expand(Size(batch_shape)), self.transforms)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:
        value = self.base_dist.rsample(sample_shape)
        log_prob = self.base_dist.log_prob(value)
        for transform in self.transforms:
            previous, value = value, transform(value)
            jacobian = transform.log_abs_det_jacobian(previous, value)
            elements = range(1 - transform.domain.event_dim)  # of a transformation of single elements: to be summed
            log_prob = log_prob - (jacobian.sum([-1 - i for i in elements]) if elements else jacobian)
        self._draw = value, log_prob, value._version
        return value

    def sample(self, sample_shape: Size = Size()) -> Tensor:
        with torch.no_grad():
            value = self.rsample(sample_shape) if self.has_rsample else super().sample(sample_shape)
        if torch.is_grad_enabled():
            self._draw = None  # its log-probability has no gradient
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._draw is not None and self._draw[0] is value and self._draw[2] == value._version:
            return self._draw[1]
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)  # conditional transforms do not broadcast
        try:
            return super().log_prob(value.expand(*batch, value.shape[-1]))
        except (KeyError, NotImplementedError) as error:
            names = ", ".join(type(t).__name__ for t in self.transforms)
            raise NotImplementedError(
                f"flow of {names}: one of them has no inverse, so that only its own draws can be scored. Try affine or "
                "spline transformations."
            ) from error
