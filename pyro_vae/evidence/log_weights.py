r"""Summaries of log-weights that stream through in chunks: log-mean-exp, its error, effective sample size, k-hat.

With Σ over K weights w of a data point,

    L = log Σ w − log K,    ESS = (Σ w)² / Σ w²,    variance of L ≈ 1/ESS − 1/K.

The largest weights are kept, because k-hat, smoothing and the jackknife need them one by one. Of the others only
log Σ wᵖ is kept, for p = 1, 2, ….
"""

from __future__ import annotations

from math import log, nan, sqrt

import torch
from torch import Tensor

from pyro_vae.arguments import check_choice, check_dense
from pyro_vae.evidence.pareto import fit_tail, tail_length

__all__ = ["LogWeightSummary", "pareto_khat"]


class LogWeightSummary:
    """Log-mean-exp, error, ESS and k-hat of K log-weights for each of n points, which arrive in chunks in any order.

    Args:
        num_particles: K in total. It determines how many of the largest weights are kept.
        smooth: replace the largest weights by order statistics of the fitted Pareto distribution.
        correction: how to correct the bias: None, "delta" or "jackknife".

    Attributes:
        num_zero: how many weights were zero so far, (n,), int64.

    Example:
        >>> summary = LogWeightSummary(100)
        >>> summary.update(torch.ones(60, 2))
        >>> summary.update(torch.ones(40, 2))
        >>> [round(v[0].item(), 3) for v in summary.result()]
        [1.0, 0.0, 100.0, -inf]
    """

    def __init__(self, num_particles: int, *, smooth: bool = False, correction: str | None = None) -> None:
        check_choice("correction", correction, (None, "delta", "jackknife"))
        if correction is not None and num_particles < 2:
            raise ValueError(f"correction={correction!r} needs num_particles of at least 2, got {num_particles}.")
        self.num_particles, self.smooth, self.correction = num_particles, smooth, correction
        self.count = 0
        self._tail_length = tail_length(num_particles)
        # the tail, and one more as its threshold; at least 100, so that each of the others is below 1/100 of the sum
        self._kept = max(self._tail_length + 1, min(num_particles, 100))
        self._powers = 4 if correction == "jackknife" else 2
        self._top: Tensor | None = None
        self._rest: Tensor | float = -float("inf")  # log Σ wᵖ of the weights that are not kept, p = 1, 2, …
        self._tolerance = 0.0
        self.num_zero = torch.zeros((), dtype=torch.long)

    def update(self, log_weight: Tensor) -> None:
        """Adds a chunk of log-weights, (k, n)."""
        self._tolerance = max(self._tolerance, sqrt(torch.finfo(log_weight.dtype).eps))
        self.num_zero = self.num_zero.to(log_weight.device) + log_weight.isneginf().sum(0)
        log_weight = log_weight.double()
        self.count += len(log_weight)
        every = log_weight if self._top is None else torch.cat([self._top, log_weight])
        self._top, kept = every.topk(min(self._kept, len(every)), dim=0)
        if len(every) > len(kept):
            rest = every.scatter(0, kept, -float("inf"))
            sums = torch.stack([(p * rest).logsumexp(0) for p in range(1, self._powers + 1)])
            self._rest = torch.logaddexp(torch.as_tensor(self._rest).to(sums), sums)

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The log-evidence, its standard error, the effective sample size and k-hat, each (n,), float64."""
        k = self.num_particles
        if self.count != k:
            raise ValueError(f"expected {k} log-weights per point, got {self.count}.")
        top = self._top
        khat, smoothed = fit_tail(top, self._tail_length, self._tolerance)
        if self.smooth:
            top = torch.cat([smoothed, top[len(smoothed) :]])
        rest = torch.as_tensor(self._rest).to(top).expand(self._powers, *top.shape[1:])
        first, second = (torch.logaddexp((p * top).logsumexp(0), rest[p - 1]) for p in (1, 2))
        ess = (2 * first - second).exp().clamp(max=k)
        variance = (1 / ess - 1 / k).clamp(min=0) if k > 1 else torch.full_like(ess, nan)
        value = first - log(k)
        if self.correction == "delta":
            value = value + variance / 2
        if self.correction == "jackknife":
            value, variance = self._jackknife(top, rest, first)
        return value, variance.sqrt(), ess, khat

    def _jackknife(self, top: Tensor, rest: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """The jackknife estimate and its variance, from log(1 − r_j), where r_j = w_j / Σ w.

        Without w_j, L_{K−1} = log Σ w + log(1 − r_j) − log(K − 1). The shares of weights that were not kept are below
        1/100. For these, log(1 − r) and its square are expanded up to r⁴, with an error below 1e-8.
        """
        k = self.num_particles
        left = torch.log1p(-(top - first).exp().clamp(max=1 - 1e-15))
        r1, r2, r3, r4 = ((rest[p - 1] - p * first).exp() for p in (1, 2, 3, 4))
        total = left.sum(0) - (r1 + r2 / 2 + r3 / 3 + r4 / 4)
        squares = left.square().sum(0) + (r2 + r3 + 11 / 12 * r4)
        value = first - (k - 1) / k * total - k * log(k) + (k - 1) * log(k - 1)
        return value, ((k - 1) / k * (squares - total.square() / k)).clamp(min=0)


def pareto_khat(log_weight: Tensor) -> Tensor:
    """Pareto k-hat of K log-weights for each of N points; see `pyro_vae.evidence.evidence` for its meaning.

    Args:
        log_weight: (K, N), nats, up to a constant per point.

    Returns:
        (N,), float64: −inf if the largest weights are equal up to rounding, NaN if K < 21 or if a weight is NaN.

    References:
        Vehtari, Simpson, Gelman, Yao & Gabry (2024), Pareto Smoothed Importance Sampling, JMLR 25(72).

    Example:
        >>> torch.manual_seed(0)
        <torch._C.Generator object at ...>
        >>> ratio = torch.rand(4000, 1).pow(-0.5)  # a Pareto distribution of shape 0.5
        >>> round(pareto_khat(ratio.log()).item(), 1)
        0.5
    """
    check_dense("pareto_khat: log_weight", log_weight)
    if log_weight.dim() != 2 or not len(log_weight):
        raise ValueError(
            f"pareto_khat: expected log-weights (K, N), got shape {tuple(log_weight.shape)}. Try x.unsqueeze(1) for "
            "one data point."
        )
    summary = LogWeightSummary(len(log_weight))
    summary.update(log_weight)
    return summary.result()[3]
