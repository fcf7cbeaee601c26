r"""The tail of importance weights: a generalized Pareto distribution fitted to the largest of them.

The excess x of the largest weights over a threshold has approximately the density

    p(x) = 1/σ (1 + k x/σ)^(−1 − 1/k).

The fitted shape, k-hat, tells how far to trust a mean of the weights. Below ½, their variance is finite. Above
min(1 − 1/log₁₀ K, 0.7), neither the mean nor its error bar is reliable (Vehtari et al. 2024, *Pareto Smoothed
Importance Sampling*, JMLR 25(72)). The fit is that of Zhang & Stephens (2009, Technometrics 51).
"""

from __future__ import annotations

from math import ceil, nan, sqrt

import torch
from torch import Tensor

__all__ = ["fit_tail", "tail_length"]


def tail_length(num_particles: int) -> int:
    """How many of K weights belong to the tail: min(K/5, 3√K), rounded up."""
    return ceil(min(0.2 * num_particles, 3 * sqrt(num_particles)))


def fit_tail(top: Tensor, length: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Fits a generalized Pareto distribution to the `length` largest log-weights; the next one is the threshold.

    Args:
        top: the largest log-weights, (at least length + 1, n), descending, up to a constant per column.
        length: M.
        tolerance: differences of log-weights up to this size count as rounding.

    Returns:
        k-hat, (n,): −inf if the largest weights are all equal, NaN if there are fewer than five or they are not finite;
        and the M largest log-weights, descending and smoothed. Smoothing replaces them by the expected order
        statistics of the fit, up to the largest weight (Vehtari et al. 2024, section 3).
    """
    khat, smoothed = torch.full_like(top[0], nan), top[:length].clone()
    if length < 5 or len(top) <= length:
        return khat, smoothed
    largest, cutoff = top[0], top[length]
    equal = largest - cutoff <= tolerance
    khat[equal] = -float("inf")
    fit = torch.isfinite(largest) & ~equal
    threshold = (cutoff[fit] - largest[fit]).exp()
    excess = (top[:length, fit] - largest[fit]).exp() - threshold
    shape, scale = _generalized_pareto(excess.flip(0))
    khat[fit] = shape
    p = ((torch.arange(length, 0, -1, dtype=top.dtype, device=top.device) - 0.5) / length).unsqueeze(-1)
    small = shape.abs() < 1e-8
    k = torch.where(small, 1.0, shape)
    quantile = torch.where(small, -torch.log1p(-p), torch.expm1(-k * torch.log1p(-p)) / k) * scale
    smoothed[:, fit] = (threshold + quantile).log().clamp(max=0.0) + largest[fit]
    return khat, smoothed


def _generalized_pareto(x: Tensor) -> tuple[Tensor, Tensor]:
    """Shape k and scale σ of generalized Pareto distributions fitted to x, (M, n), ascending and not negative.

    The estimate of b = −k/σ is the mean of its profile posterior on a grid, which the first quartile of x determines
    (Zhang & Stephens 2009). The weak prior of Vehtari et al. (2024, appendix G) then draws k towards ½ with the weight
    of ten observations.
    """
    x = x.clamp(min=torch.finfo(x.dtype).tiny)
    m = len(x)
    grid = 30 + int(sqrt(m))
    i = torch.arange(1, grid + 1, dtype=x.dtype, device=x.device).unsqueeze(-1)
    b = 1 / x[-1] + (1 - (grid / (i - 0.5)).sqrt()) / (3 * x[int(m / 4 + 0.5) - 1])  # (grid, n)
    k = torch.stack([torch.log1p(-row * x).mean(0) for row in b])
    log_likelihood = m * ((-b / k).log() - k - 1)
    weight = log_likelihood.softmax(0)
    b_hat = (weight * b).sum(0)
    k = torch.log1p(-b_hat * x).mean(0)
    return (m * k + 10 * 0.5) / (m + 10), -k / b_hat
