r"""Functions of gamma and beta type that keep their digits where arguments are large, in float32 as well.

A log-probability of a count or of a fraction is a small difference of large numbers: log Γ(10⁶) is 1.3 · 10⁷, and in
float32 the next number above that is one away. Here these differences are taken before anything is rounded (Loader
2000, *Fast and accurate computation of binomial probabilities*):

    log Γ(y) = (y − ½) log y − y + ½ log 2π + δ(y),   ψ(y) = log y − ω(y),   D(x, m) = x log(x/m) + m − x ≥ 0,

where δ and ω vanish for large y, and D is of the order (x − m)²/2m near m.
"""

from __future__ import annotations

from math import log, pi

import torch
from torch import Tensor

__all__ = ["deviance", "digamma_gap", "excess", "stirling_error"]

LARGE = 20.0  # from here on, the series of log Γ below are as good as float64; half of it for ψ
NEAR = 0.4  # up to this distance of x/m from one, D is summed as a series, whose terms fall by a factor of 16 or more


def excess(r: Tensor, k: Tensor | float) -> Tensor:
    """log Γ(r + k) − log Γ(r) − k log r for r > 0 and k ≥ 0, by Stirling's series where r is large.

    Example:
        >>> excess(torch.tensor([2.0, 1e8]), 2.0)  # log((1 + r) / r)
        tensor([0.4055, 0.0000])
    """
    large = r > LARGE
    s = torch.where(large, r, LARGE)  # each branch gets only values that it can take; otherwise its gradient is NaN
    stirling = (s + k - 0.5) * torch.log1p(k / s) - k + _stirling_series(s + k) - _stirling_series(s)
    s = torch.where(large, 1.0, r)
    return torch.where(large, stirling, torch.lgamma(s + k) - torch.lgamma(s) - k * s.log())


def stirling_error(y: Tensor) -> Tensor:
    """δ(y) = log Γ(y) − (y − ½) log y + y − ½ log 2π for y > 0, which is about 1 / 12y.

    Example:
        >>> stirling_error(torch.tensor([1.0, 1e6])) * 12 * torch.tensor([1.0, 1e6])
        tensor([0.9727, 1.0000])
    """
    large = y > LARGE
    s = torch.where(large, 1.0, y)
    direct = torch.lgamma(s) - (s - 0.5) * s.log() + s - 0.5 * log(2 * pi)
    return torch.where(large, _stirling_series(torch.where(large, y, LARGE)), direct)


def digamma_gap(y: Tensor) -> Tensor:
    """ω(y) = log y − ψ(y) for y > 0, which is about 1 / 2y.

    Example:
        >>> digamma_gap(torch.tensor([1.0, 1e6])) * 2 * torch.tensor([1.0, 1e6])
        tensor([1.1544, 1.0000])
    """
    large = y > LARGE / 2
    s = torch.where(large, y, LARGE / 2)
    square = s**-2
    series = torch.zeros_like(square)
    for coefficient in (1 / 12, -691 / 32760, 1 / 132, -1 / 240, 1 / 252, -1 / 120, 1 / 12):  # B_2n / 2n, n = 7, …, 1
        series = (series + coefficient) * square
    series = 0.5 / s + series
    s = torch.where(large, 1.0, y)
    return torch.where(large, series, s.log() - torch.digamma(s))


def deviance(x: Tensor, mean: Tensor, difference: Tensor) -> Tensor:
    """D(x, m) = x log(x/m) + m − x for x ≥ 0 and m > 0, given the difference x − m, from which it gets its digits.

    Example:
        >>> x, mean = torch.tensor([0.0, 1e6]), torch.tensor([2.0, 1e6 + 1e3])
        >>> deviance(x, mean, x - mean)  # the last one is about (x − m)² / 2m
        tensor([2.0000, 0.4997])
    """
    near = difference.abs() < NEAR * mean
    t = torch.where(near, difference, 0.0) / torch.where(near, mean, 1.0)  # x/m − 1
    v = t / (2 + t)  # log(1 + t) = 2 (v + v³/3 + v⁵/5 + …)
    square = v.square()
    num_terms = 13 if x.dtype == torch.float64 else 6
    tail = square / (2 * num_terms + 1)
    for n in range(num_terms - 1, 0, -1):
        tail = (tail + 1 / (2 * n + 1)) * square
    series = mean * v * (t + 2 * (1 + t) * tail)
    far = ~near & (x > 0)
    s, m = torch.where(far, x, 1.0), torch.where(far, mean, 1.0)
    ratio = s.sqrt() / m.sqrt()  # s / m may be too large for a float
    return torch.where(near, series, 2 * s * ratio.log() - difference)


def _stirling_series(y: Tensor) -> Tensor:
    """δ(y) to 1e-14 for y > 20."""
    square = y**-2
    return (1 / 12 - (1 / 360 - (1 / 1260 - square / 1680) * square) * square) / y
