"""Stacked models: each layer is a VAE (or an autoencoder) of the previous layer's codes, and the stack is again a VAE.

Greedy layer-wise training (Hinton & Salakhutdinov 2006, *Reducing the Dimensionality of Data with Neural Networks*;
Bengio et al. 2007, *Greedy Layer-Wise Training of Deep Networks*): `fit_layers` trains one layer after the other,
`stack` composes them, and `fit` then tunes the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.arguments import checked
from pyro_vae.distributions.structure import Broadcasting, condition, expected_value
from pyro_vae.models.vae import VAE
from pyro_vae.pairs.threads import one_thread
from pyro_vae.training.loop import FitResult, fit

__all__ = ["fit_layers", "stack"]


@one_thread
@checked
def fit_layers(layers: Sequence[VAE], data: Tensor | np.ndarray, **options: Any) -> list[FitResult]:
    """Trains the layers greedily, each on the codes E_q[z|x] of the layer before.

    Args:
        layers: VAEs. The first models the data, and each further one the latent variable of the layer before.
        data: (N, *event).
        **options: passed to `fit`. `validation_data` is encoded along with the data. Each layer has its own
            `checkpoint`: "fit.pt" becomes "fit_1.pt", "fit_2.pt", ….

    Returns:
        A `FitResult` for each layer, the same as if the layers were fitted by hand.

    Raises:
        TypeError: `layers` is one VAE instead of a list, or the data have context or are in a DataLoader.

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
    _check_layers(layers, "fit_layers")
    given = {"data": data, "validation_data": options.pop("validation_data", None)}
    rows: dict[str, Any] = {n: _rows(x, n) for n, x in given.items() if n == "data" or x is not None}
    checkpoint = options.pop("checkpoint", None)
    results = []
    for i, layer in enumerate(layers, start=1):
        if checkpoint is not None:
            path = Path(checkpoint)
            options["checkpoint"] = path.with_name(f"{path.stem}_{i}{path.suffix}")
        results.append(fit(layer.model, layer.guide, **rows, **options))
        if results[-1].interrupted:
            break
        if i < len(layers):
            rows = {name: _codes(layer, x) for name, x in rows.items()}
    return results


@checked
def stack(layers: Sequence[VAE], *, name: str = "stack") -> VAE:
    """Combines the layers into one VAE of the data and the last layer's latent variable. It shares their weights.

    The layers pass on means: q(z|x) is the last layer's posterior given the posterior means of the layers below, and
    p(x|z) is the first layer's likelihood given the likelihood means of the layers above. Context belongs to the data,
    so that only the first layer sees it.

    Args:
        layers: as for `fit_layers`; the same layer may occur more than once.
        name: name of the new VAE.

    Returns:
        A `VAE`.
    """
    _check_layers(layers, "stack")
    posterior = _Composed([layer.posterior for layer in layers], "posterior", context_at=0)
    likelihood = _Composed([layer.likelihood for layer in reversed(layers)], "likelihood", context_at=len(layers) - 1)
    return VAE(layers[-1].prior, likelihood, posterior, name=name)


class _Composed(Broadcasting):
    """A chain of conditional distributions: each gets the mean of the one before it, and the last one is the result.
    The part at `context_at` also gets the context."""

    def __init__(self, parts: Sequence[Any], role: str, context_at: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(part if isinstance(part, nn.Module) else _NoModule(part) for part in parts)
        self.role, self.context_at = role, context_at

    def forward(self, y: Tensor, *context: Tensor, event_dims: Sequence[int] | None = None) -> Any:
        dim, *context_dims = [1] * (1 + len(context)) if event_dims is None else event_dims
        for i, part in enumerate(self.parts):
            c, c_dims = (context, context_dims) if i == self.context_at else ((), [])
            result = condition(part, y, *c, event_dims=[dim, *c_dims], role=self.role)
            if i < len(self.parts) - 1:
                y, dim = _mean(result, self.role), len(result.event_shape)
        return result


class _NoModule(nn.Module):
    """A module around a conditional distribution that is not one, such as a function, for a list of modules."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part

    def forward(self, *inputs: Tensor) -> Any:
        return condition(self.part, *inputs)


def _check_layers(layers: Any, where: str) -> None:
    if isinstance(layers, nn.Module):
        raise TypeError(f"{where}: expected a list of VAEs, got one {type(layers).__name__}. Try [layer].")
    if not isinstance(layers, (list, tuple)) or not all(isinstance(layer, VAE) for layer in layers):
        raise TypeError(f"{where}: expected a list of VAEs, got {layers!r}. Try [VAE(…), VAE(…)].")
    if not layers:
        raise ValueError(f"{where}: expected at least one layer, got none. Try [VAE(…), VAE(…)].")


def _rows(x: Any, name: str) -> Tensor:
    """The data as one tensor, which can be encoded."""
    if isinstance(x, np.ndarray) and x.dtype.kind in "fiub":
        x = torch.from_numpy(np.array(x, x.dtype.newbyteorder("=")))
        x = x.to(torch.get_default_dtype()) if x.is_floating_point() else x
    if not isinstance(x, Tensor):
        raise TypeError(
            f"fit_layers: {name}: expected a tensor or a numpy array, got {type(x).__name__}. Try a tensor of all "
            "rows, or fit(…) for each layer, with the means of layer.encode(…) as the data of the next one."
        )
    return x


def _codes(layer: VAE, x: Tensor) -> Tensor:
    weight = next(layer.posterior.parameters(), x) if isinstance(layer.posterior, nn.Module) else x
    return _mean(layer.encode(x.to(weight.device)), "posterior")


def _mean(distribution: Any, role: str) -> Tensor:
    mean = expected_value(distribution)
    if mean is None:
        raise ValueError(
            f"{role}: the mean of {type(distribution).__name__} is not known, so that no layer can follow it. "
            "Try a family such as ConditionalDelta or ConditionalNormal."
        )
    return mean
