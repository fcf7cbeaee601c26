"""Stacked models: each layer is a VAE (or an autoencoder) of the codes of the layer before, and the stack is one again.

Greedy layer-wise training (Hinton & Salakhutdinov 2006, *Reducing the Dimensionality of Data with Neural Networks*;
Bengio et al. 2007, *Greedy Layer-Wise Training of Deep Networks*): `fit_layers` trains one layer after the other,
`stack` composes them, `fit` then tunes the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.conditional import Broadcasting, condition, expected_value
from pyro_vae.training import FitResult, fit
from pyro_vae.vae import VAE

__all__ = ["fit_layers", "stack"]


def fit_layers(layers: Sequence[VAE], data: Tensor, **options: Any) -> list[FitResult]:
    """Trains each layer on the codes of the one before, E_q[z|x], greedily.

    Args:
        layers: the first is one of the data, each other of the latent variable before.
        data: (N, *event).
        **options: of `fit`.

    Returns:
        A `FitResult` for each layer: the same as of fits that one does by hand.

    Example:
        >>> from pyro_vae.distributions import ConditionalNormal, StandardNormal
        >>> from pyro_vae.networks import MLP
        >>> def layer(size, code):
        ...     likelihood = ConditionalNormal(MLP(code, []), size, scale=1.0)
        ...     return VAE(StandardNormal(code), likelihood, ConditionalNormal(MLP(size, []), code))
        >>> layers, x = [layer(8, 4), layer(4, 2)], torch.randn(100, 8)
        >>> results = fit_layers(layers, x, num_epochs=2, seed=0)
        >>> stack(layers).encode(x).event_shape
        torch.Size([2])
    """
    results = []
    for layer in layers:
        results.append(fit(layer.model, layer.guide, data, **options))
        data = _mean(layer.encode(data), "posterior")
    return results


def stack(layers: Sequence[VAE], *, name: str = "stack") -> VAE:
    """The layers as one VAE, of the data and of the last layer's latent variable, with their weights, not copies.

    What lies between first and last layer passes as means: q(z|x) is the last layer's posterior given the means of
    those below, p(x|z) the first layer's likelihood given the means of those above.

    Args:
        layers: as for `fit_layers`.
        name: of the new VAE.

    Returns:
        A `VAE`.
    """
    if not layers:
        raise ValueError("stack: expected at least one layer.")
    posterior = _Composed([layer.posterior for layer in layers], "posterior")
    likelihood = _Composed([layer.likelihood for layer in reversed(layers)], "likelihood")
    return VAE(layers[-1].prior, likelihood, posterior, name=name)


class _Composed(Broadcasting):
    """The last of several conditional distributions, given the mean of the one before it, and so on."""

    def __init__(self, parts: Sequence[Any], role: str) -> None:
        super().__init__()
        self.parts, self.role = torch.nn.ModuleList(parts), role

    def forward(self, *inputs: Tensor, event_dims: Sequence[int] | None = None) -> Any:
        for part in self.parts:
            result = condition(part, *inputs, event_dims=event_dims, role=self.role)
            if part is not self.parts[-1]:
                inputs, event_dims = (_mean(result, self.role),), [len(result.event_shape)]
        return result


def _mean(distribution: Any, role: str) -> Tensor:
    mean = expected_value(distribution)
    if mean is None:
        raise ValueError(
            f"{role}: the mean of {type(distribution).__name__} is not known, so that no layer can be put on top. "
            "Try a family such as ConditionalDelta or ConditionalNormal."
        )
    return mean
