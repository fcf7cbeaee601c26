"""What importance weights of draws say in ArviZ: log p(x_n) at each draw, and draws by their weights."""

from __future__ import annotations

from math import log

import numpy as np
import torch
from torch import Tensor

__all__ = ["from_the_others", "resampled"]


def from_the_others(log_weights: np.ndarray) -> np.ndarray:
    """log p(x_n) for each draw, as the other draws estimate it, (S, N): log Σ_{k≠s} w_kn − log(S − 1).

    The same number for all draws would be as right, but has no tail for `az.loo` to fit. These differ by what one draw
    adds, 1/S of it where weights are equal, so that Pareto's k of `az.loo` is that of the importance weights.
    """
    value = torch.from_numpy(log_weights).double()
    total, count = value.logsumexp(0), len(value)
    if count == 1:
        return value.numpy()
    shares = (value - total).exp().clamp(max=1 - 1e-15)
    return (total + torch.log1p(-shares) - log(count - 1)).numpy()


def resampled(log_weights: Tensor) -> Tensor:
    """Indices of draws by systematic resampling, in random order, (S,) or (S, N), from log-weights of this shape."""
    count = len(log_weights)
    columns = log_weights.double().reshape(count, -1)
    places = (torch.rand(1, columns.shape[1]) + torch.arange(count)[:, None]).double() / count
    index = torch.searchsorted(columns.softmax(0).cumsum(0).T.contiguous(), places.T.contiguous()).T.clamp(
        max=count - 1
    )
    order = torch.rand(index.shape).argsort(0)
    return index.gather(0, order).reshape(log_weights.shape)
