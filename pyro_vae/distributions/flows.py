r"""Flows: chains of invertible transformations of a simpler distribution.

    z₀ ~ q₀(z₀|x),   z = T_L(··· T_1(z₀; x) ···; x),   log q(z|x) = log q₀(z₀|x) − Σ_l log |det ∂T_l/∂z_{l−1}|.

The Jacobians are triangular if the transformations are autoregressive (Rezende & Mohamed 2015, *Variational
Inference with Normalizing Flows*; Kingma et al. 2016, *Improving Variational Inference with Inverse Autoregressive
Flow*). The transformations come from Pyro, torch and Zuko; this file makes conditional distributions of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import ComposeTransform, Transform

from pyro_vae.arguments import checked
from pyro_vae.distributions.state import Copied, tensors_of, versions
from pyro_vae.distributions.structure import Broadcasting, check_conditional, condition

__all__ = ["ConditionalFlow"]


class ConditionalFlow(Broadcasting):
    r"""y = T_L(··· T_1(y₀)) with y₀ from a base distribution; transformations of Pyro, torch and Zuko mix freely.

    A transformation may be a torch or Pyro transform (`pyro.distributions.transforms.spline_coupling(2)`), a
    conditional transform of Pyro (`conditional_affine_autoregressive(2, context_dim)`) or a lazy transform of Zuko
    (`zuko.flows.MaskedAutoregressiveTransform(2, context)`). The last two kinds get `network(x)` as context. Each
    transformation is applied in the direction from base to y. An autoregressive transformation therefore makes an
    inverse autoregressive flow, which is fast to draw from. Its `.inv` makes a masked autoregressive flow, which is
    fast to score any value with. Either flow scores its own draws without an inversion.

    Args:
        base: distribution of y₀: a conditional distribution, which is called with the same inputs, or a fixed one.
        transforms: T_1, …, T_L, over vectors.
        network: maps inputs (B, *event) to the context of the conditional transformations, (B, width). Default: no
            network and no context.

    Returns (when called):
        A distribution with `support`, `rsample` and `log_prob`, and with the batch shape of the inputs. Its mean is not
        known.

    Raises:
        ValueError: a conditional transformation of Pyro needs a context, and there is no network.

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

    @checked
    def __init__(self, base: Any, transforms: Sequence[Any], *, network: nn.Module | None = None) -> None:
        super().__init__()
        self.base, self.network = check_conditional("ConditionalFlow: base", base), network
        if not isinstance(transforms, Iterable) or not all(callable(t) for t in transforms):
            raise TypeError(
                f"ConditionalFlow: transforms: expected a list of transformations, got {transforms!r}. Try "
                "[pyro.distributions.transforms.Spline(2)]."
            )
        self.transforms = list(transforms)
        self.transforms_modules = nn.ModuleList(m for t in transforms for m in _modules(t))
        if network is None and any(hasattr(t, "condition") for t in transforms):
            raise ValueError(
                "ConditionalFlow: conditional transformations expect a context: expected a network, got none. Try "
                "network=MLP(…)."
            )

    def forward(self, *inputs: Tensor, event_dims: Sequence[int] | None = None) -> Any:
        for module in self.transforms_modules:  # Pyro's are not called as modules, so that hooks do not reach them
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
        return _Flow(base, [self._transform(t, context) for t in self.transforms], self.transforms_modules)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the last draw, which Pyro's transforms cache: a copy of a used flow holds only weights."""
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
    """The modules that hold a transformation's weights. An inverse is not a module, but what it inverts may be one."""
    if isinstance(transform, nn.Module):
        return [transform]
    if isinstance(transform, ComposeTransform):
        return [m for part in transform.parts for m in _modules(part)]
    inverse = transform.inv if isinstance(transform, Transform) else None
    return [inverse] if isinstance(inverse, nn.Module) else []


class _Flow(Copied, dist.TransformedDistribution):
    """A transformed distribution that scores its last draw from the noise that made it, as long as neither the draw
    nor a parameter is changed in place.

    Args:
        base: distribution of y₀.
        transforms: T_1, …, T_L.
        weights: modules whose weights the transforms use.
    """

    # the last draw, its log-probability, the tensors that this is made of, and how often these were changed
    _draw: tuple[Tensor, Tensor, list[Tensor], tuple[int, ...]] | None = None

    def __init__(self, base: Any, transforms: Sequence[Transform], weights: nn.Module) -> None:
        super().__init__(base, list(transforms))
        self._weights = weights

    def expand(self, batch_shape: Size, _instance: Any = None) -> _Flow:
        return _Flow(self.base_dist.expand(Size(batch_shape)), self.transforms, self._weights)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:
        value = self.base_dist.rsample(sample_shape)
        log_prob = self.base_dist.log_prob(value)
        for transform in self.transforms:
            previous, value = value, transform(value)
            jacobian = transform.log_abs_det_jacobian(previous, value)
            elements = range(1 - transform.domain.event_dim)  # dimensions to sum over, if it acts on single ones
            log_prob = log_prob - (jacobian.sum([-1 - i for i in elements]) if elements else jacobian)
        made_of = [value, *tensors_of(self.base_dist, self.transforms, self._weights)]
        now = versions(made_of)
        self._draw = None if now is None else (value, log_prob, made_of, now)
        return value

    def sample(self, sample_shape: Size = Size()) -> Tensor:
        with torch.no_grad():
            value = self.rsample(sample_shape) if self.has_rsample else super().sample(sample_shape)
        if torch.is_grad_enabled():
            self._draw = None  # its log-probability has no gradient
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._draw is not None and self._draw[0] is value and self._draw[3] == versions(self._draw[2]):
            return self._draw[1]
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)  # conditional transforms do not broadcast
        try:
            return super().log_prob(value.expand(*batch, value.shape[-1]))
        except (KeyError, NotImplementedError) as error:
            names = ", ".join(type(t).__name__ for t in self.transforms)
            raise NotImplementedError(
                f"flow of {names}: one of them has no inverse, so that only the flow's own draws can be scored. Try "
                "affine or spline transformations."
            ) from error
