r"""Evidence: log p(x) of every data point, with an error bar and a verdict on how far to trust it.

With log-weights log w_k = log p(x, z_k) − log q(z_k|x), z_k ~ q(z|x), every estimator is a log-mean-exp,

    log p̂(x) = L_K = log 1/K Σ_k w_k,   E log p̂(x) ≤ log p(x) = log E w.

In expectation it is a lower bound that rises with K (Burda, Grosse & Salakhutdinov 2016, *Importance Weighted
Autoencoders*, theorem 1). Its bias is −Var(w) / (2 K p(x)²) + O(1/K²) (Nowozin 2018). Each estimate comes with

- the effective sample size, ESS = (Σ w)² / Σ w², between 1 and K;
- the standard error of log p̂ by the delta method, √(1/ESS − 1/K), which needs weights of finite variance;
- Pareto k-hat, the shape of the weights' tail (`pyro_vae.evidence.pareto`);
- on request, a correction of the bias: the delta method adds ½ (1/ESS − 1/K); the jackknife gives K L_K − (K − 1) times
  the mean of L_{K−1} over the K subsets of K − 1 weights, and its bias is O(1/K²) (Nowozin 2018, *Debiasing Evidence
  Approximations*). A corrected estimate is no longer a bound.

Weights stream through in chunks. Only sums, in float64, and the largest weights are kept, so that memory depends on
neither K nor N.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log10, nan, sqrt

import torch
from torch import Tensor

__all__ = ["LOWER_BOUND", "NO_BOUND", "UPPER_BOUND", "Evidence", "is_trusted", "khat_threshold"]

LOWER_BOUND = "lower bound on log p(x) in expectation"
EVEN = 0.5  # effective sample size as a share of K: weights have a coefficient of variation below one
UPPER_BOUND = "upper bound on log p(x) in expectation, over data and exact draws from the model"
NO_BOUND = "estimate of log p(x), neither a lower nor an upper bound"


@dataclass(frozen=True, repr=False)
class Evidence:
    """Estimates of log p(x) for N data points; `print` gives a summary.

    Attributes:
        log_evidence: estimate of log p(x), (N,), float64, nats.
        standard_error: of `log_evidence`, by the delta method, (N,), nats; too small if k-hat is too large.
        effective_sample_size: (Σw)²/Σw², (N,), from 1 to `num_particles`.
        pareto_khat: tail shape of the weights, (N,); −inf if the largest weights are all equal (the exact posterior),
            NaN if there are too few particles to tell (K < 21) or weights that are not finite.
        num_particles: K.
        bound: whether `log_evidence` is a lower or an upper bound, and in which sense.
        method: name of the estimator.
        num_zero: how many of the K weights are zero, (N,), int64. A weight is zero if its draw lies outside the
            prior's support, or if x is impossible given the draw.
        bounded: whether no weight exceeds p(x|z)/a, as a share a of the draws comes from the prior.
    """

    log_evidence: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    pareto_khat: Tensor
    num_particles: int
    bound: str
    method: str
    num_zero: Tensor | None = None
    bounded: bool = False

    @property
    def threshold(self) -> float:
        """The largest k-hat to trust with K particles, min(1 − 1/log₁₀ K, 0.7); NaN for K < 21 (k-hat unknown)."""
        return khat_threshold(self.num_particles)

    @property
    def doubtful(self) -> Tensor:
        """Which points not to trust, (N,), bool: k-hat is too large or unknown, or the estimate is not finite.

        Bounded weights that are even (ESS above K/2) are trusted whatever k-hat is, which looks at the shape of their
        tail alone, however little the tail amounts to.
        """
        trusted = is_trusted(self.pareto_khat, self.effective_sample_size, self.num_particles, bounded=self.bounded)
        return ~trusted | ~torch.isfinite(self.log_evidence)

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of log p(x) over the finite points, and its standard errors from the points and from the particles.

        The first error, sd/√N, comes from the spread of the data; it is NaN for one point. The second, √Σ se² / N, is
        too small if points are `doubtful`. The two add in quadrature.
        """
        x, se = self.log_evidence, self.standard_error
        finite = torch.isfinite(x)
        x, se = x[finite], se[finite]
        n = max(len(x), 1)
        sd = x.std().item() if n > 1 else nan
        return x.mean().item(), sd / sqrt(n), se.square().sum().sqrt().item() / n

    def __repr__(self) -> str:
        n, (mean, spread, error) = len(self.log_evidence), self.mean
        ess, khat = self.effective_sample_size, self.pareto_khat
        known = khat[~khat.isnan()]
        khat_line = f"median {known.median():.2f}, largest {known.max():.2f}; " if len(known) else ""
        lines = [
            f"Evidence of {n} data point{'s' * (n != 1)} by {self.method}, {self.num_particles} particles each (nats)",
            f"  mean log p(x)          {mean:.3f}{f' ± {spread:.3f} (points)' * (n > 1)} ± {error:.3f} (particles)",
            f"  standard error         median {self.standard_error.nanmedian():.3f}, "
            f"largest {self.standard_error.nan_to_num(0).max():.3f}",
            f"  effective sample size  median {ess.nanmedian():.1f}, smallest {ess.nan_to_num(0).min():.1f}",
            f"  Pareto k-hat           {khat_line}{int(self.doubtful.sum())} of {n} points not to trust "
            + (f"(above {self.threshold:.2f})" if len(known) else "(too few particles to tell)"),
            f"  bound                  {self.bound}",
        ]
        if self.num_zero is not None and (points := int((self.num_zero > 0).sum())):
            share = self.num_zero.double().mean() / self.num_particles
            lines.append(
                f"  zero weights           {share:.2%} of all, at {points} point{'s' * (points != 1)}: draws outside "
                "the prior's support, or for which x is impossible"
            )
        bad = (~torch.isfinite(self.log_evidence)).nonzero().flatten().tolist()
        if bad:
            shown = ", ".join(map(str, bad[:10])) + (", …" if len(bad) > 10 else "")
            lines.append(f"  not finite             {len(bad)} points, left out of the mean: rows {shown}")
        return "\n".join(lines)


def khat_threshold(num_particles: int) -> float:
    """The largest k-hat to trust with K particles, min(1 − 1/log₁₀ K, 0.7); NaN for K < 21 (k-hat unknown)."""
    return min(1 - 1 / log10(num_particles), 0.7) if num_particles > 20 else nan


def is_trusted(khat: Tensor, effective_sample_size: Tensor, num_particles: int, *, bounded: bool) -> Tensor:
    """Whether k-hat is small enough, or weights that are bounded are even."""
    trusted = (khat <= khat_threshold(num_particles)) | khat.isneginf()  # all weights equal
    return trusted | (effective_sample_size > EVEN * num_particles) if bounded else trusted
