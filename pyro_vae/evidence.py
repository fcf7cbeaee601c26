r"""Evidence: log p(x) of every data point, with an error bar and a verdict on it.

With log-weights log w_k = log p(x, z_k) − log q(z_k|x), z_k ~ q(z|x), every estimator here is a log-mean-exp,

    log p̂(x) = log 1/K Σ_k w_k,   E log p̂(x) ≤ log p(x) = log E w,

a lower bound in expectation that rises with K (Burda, Grosse & Salakhutdinov 2016, *Importance Weighted Autoencoders*,
theorem 1); its bias is −Var(w) / (2 K p(x)²) + O(1/K²) (Nowozin 2018). What belongs to it:

- effective sample size, ESS = (Σ w)² / Σ w², between 1 and K;
- standard error of log p̂ by the delta method, √(1/ESS − 1/K): it needs weights of finite variance;
- Pareto k-hat, the shape of the weights' tail (`pyro_vae.pareto`);
- corrections of the bias, on request: + ½ (1/ESS − 1/K) by the delta method; or the jackknife, K L_K − (K − 1) times
  the mean of L_{K−1} over the K subsets of K − 1 weights, whose bias is O(1/K²) (Nowozin 2018, *Debiasing Evidence
  Approximations*). Neither is a bound any more.

Weights stream through in chunks; sums are kept in float64 and of the weights only the largest, so that memory depends
on neither K nor N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log, log10, nan, sqrt

import torch
from torch import Tensor

from pyro_vae.pareto import fit_tail, tail_length
from pyro_vae.particles import ParticleSampler
from pyro_vae.progress import progress_bar
from pyro_vae.traces import evaluation_mode, sample_sites

__all__ = ["UPPER_BOUND", "Evidence", "LogWeightSummary", "collect", "pareto_khat"]

LOWER_BOUND = "lower bound on log p(x) in expectation"
UPPER_BOUND = "upper bound on log p(x) in expectation, over data and exact draws from the model"
NO_BOUND = "estimate of log p(x), neither a lower nor an upper bound"


@dataclass(frozen=True, repr=False)
class Evidence:
    """Estimates of log p(x) for N data points; `print` gives a summary.

    Attributes:
        log_evidence: estimate of log p(x), (N,), float64, nats.
        standard_error: of `log_evidence`, (N,), nats, by the delta method; too small where k-hat is too large.
        effective_sample_size: (Σw)²/Σw², (N,), of `num_particles`.
        pareto_khat: tail shape of the weights, (N,); −inf where the largest weights are all equal (the exact
            posterior), NaN where there are too few particles to tell (K < 21) or weights that are not finite.
        num_particles: K.
        bound: what `log_evidence` is a bound of, and in which sense.
        method: name of the estimator.
    """

    log_evidence: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    pareto_khat: Tensor
    num_particles: int
    bound: str
    method: str

    @property
    def threshold(self) -> float:
        """The largest k-hat to trust with K particles, min(1 − 1/log₁₀ K, 0.7); NaN for K < 21, where there is none."""
        return min(1 - 1 / log10(self.num_particles), 0.7) if self.num_particles > 20 else nan

    @property
    def doubtful(self) -> Tensor:
        """Which points not to trust, (N,), bool: k-hat above the threshold, unknown, or no finite estimate."""
        return ~(self.pareto_khat <= self.threshold) | ~torch.isfinite(self.log_evidence)

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of log p(x) over the finite points, its standard error from the N points, and that from the particles.

        The first error is the spread of the data, sd/√N (NaN for one point), the second √Σ se² / N, which is too small
        where points are `doubtful`; they add in quadrature.
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
        bad = (~torch.isfinite(self.log_evidence)).nonzero().flatten().tolist()
        if bad:
            shown = ", ".join(map(str, bad[:10])) + (", …" if len(bad) > 10 else "")
            lines.append(f"  not finite             {len(bad)} points, left out of the mean: rows {shown}")
        return "\n".join(lines)


def collect(
    sampler: ParticleSampler,
    prepare: Callable[[slice], Callable[[int], Tensor]],
    num_particles: int,
    *,
    method: str,
    exact: bool = False,
    smooth: bool = False,
    correction: str | None = None,
    chunk_size: int | None = None,
    tensors: float = 1.0,
    together: int | None = None,
    progress: bool = True,
) -> Evidence:
    """Evidence from log-weights, for chunks of rows and of particles.

    Args:
        sampler: of the pair.
        prepare: rows -> a function: count -> new log-weights (count, N). With `exact`, the first call is for one.
        num_particles: K.
        method: name of the estimator.
        exact: the first particle of each row is an exact draw from the posterior, and passed alone: an upper bound.
        smooth: replace the tail of the weights by that of the fitted Pareto distribution.
        correction: of the bias: None, "delta" or "jackknife".
        chunk_size: particles × rows of one pass.
        tensors: how many times the tensors of one log-weight a pass makes.
        together: how many particles of a row should pass at once, as in `ParticleSampler.chunks`.
        progress: show a progress bar, if on a terminal.
    """
    bound = NO_BOUND if smooth or correction is not None else UPPER_BOUND if exact else LOWER_BOUND
    sampler.layout.check_density()
    if not any(site["is_observed"] for site in sample_sites(sampler.layout.model_trace).values()):
        raise ValueError(
            "the model observes no site: there is no x to have a density. Try pyro.sample(…, obs=x), and look at the "
            "order of the arguments, (model, guide, x)."
        )
    parts = []
    with torch.no_grad(), evaluation_mode():
        rows, counts = sampler.chunks(num_particles - exact, chunk_size, tensors=tensors, together=together)
        with progress_bar(sampler.num_points * num_particles, method.replace("_", " "), progress) as bar:
            for r in rows:
                draw = prepare(r)
                summary = LogWeightSummary(num_particles, smooth=smooth, correction=correction)
                for count in [1] * exact + counts:
                    log_weight = draw(count)
                    summary.update(log_weight)
                    bar.update(log_weight.numel())
                parts.append(summary.result())
    values = [torch.cat([part[i] for part in parts]) for i in range(4)]
    return Evidence(*values, num_particles, bound, method)


class LogWeightSummary:
    """Log-mean-exp, error, ESS and k-hat of K log-weights for each of n points, from chunks of them in any order.

    Args:
        num_particles: K in total, which decides how many of the largest weights are kept.
        smooth: replace the tail of the weights by that of the fitted Pareto distribution.
        correction: of the bias: None, "delta" or "jackknife".

    Example:
        >>> summary = LogWeightSummary(100)
        >>> summary.update(torch.ones(60, 2))
        >>> summary.update(torch.ones(40, 2))
        >>> [round(v[0].item(), 3) for v in summary.result()]
        [1.0, 0.0, 100.0, -inf]
    """

    def __init__(self, num_particles: int, *, smooth: bool = False, correction: str | None = None) -> None:
        if correction not in (None, "delta", "jackknife"):
            raise ValueError(f"correction: expected None, 'delta' or 'jackknife', got {correction!r}.")
        if correction is not None and num_particles < 2:
            raise ValueError(f"correction={correction!r} needs num_particles of at least 2, got {num_particles}.")
        self.num_particles, self.smooth, self.correction = num_particles, smooth, correction
        self.count = 0
        self._tail_length = tail_length(num_particles)
        # the tail and one more as its threshold; the jackknife sums a series in the others, each below 1/100 of all
        self._kept = max(self._tail_length + 1, min(num_particles, 100))
        self._powers = 4 if correction == "jackknife" else 2
        self._top: Tensor | None = None
        self._rest: Tensor | float = -float("inf")  # log Σ wᵖ of those that are not kept, for p = 1, 2, …
        self._tolerance = 0.0

    def update(self, log_weight: Tensor) -> None:
        """Takes a chunk (k, n) of log-weights."""
        self._tolerance = max(self._tolerance, sqrt(torch.finfo(log_weight.dtype).eps))
        log_weight = log_weight.double()
        self.count += len(log_weight)
        every = log_weight if self._top is None else torch.cat([self._top, log_weight])
        self._top, kept = every.topk(min(self._kept, len(every)), dim=0)
        if len(every) > len(kept):
            rest = every.scatter(0, kept, -float("inf"))
            sums = torch.stack([(p * rest).logsumexp(0) for p in range(1, self._powers + 1)])
            self._rest = torch.logaddexp(torch.as_tensor(self._rest).to(sums), sums)

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log evidence, its standard error, effective sample size and k-hat, each (n,), float64."""
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
        """Jackknife estimate and its variance, from log(1 − r_j), r_j the share of w_j in the sum of all weights.

        Leaving w_j out gives L_{K−1} = log Σ w + log(1 − r_j) − log(K − 1). Shares of weights that were not kept are
        below 1/100: powers up to r⁴ are left of log(1 − r) and of its square, which errs by less than 1e-8.
        """
        k = self.num_particles
        left = torch.log1p(-(top - first).exp().clamp(max=1 - 1e-15))
        r1, r2, r3, r4 = ((rest[p - 1] - p * first).exp() for p in (1, 2, 3, 4))
        total = left.sum(0) - (r1 + r2 / 2 + r3 / 3 + r4 / 4)
        squares = left.square().sum(0) + (r2 + r3 + 11 / 12 * r4)
        value = first - (k - 1) / k * total - k * log(k) + (k - 1) * log(k - 1)
        return value, ((k - 1) / k * (squares - total.square() / k)).clamp(min=0)


def pareto_khat(log_weight: Tensor) -> Tensor:
    """Pareto k-hat of K log-weights for each of N points; see the top of this module for its meaning.

    Args:
        log_weight: (K, N), nats, up to a constant per point.

    Returns:
        (N,), float64. −inf where the largest weights are equal to rounding, NaN for K < 21 or weights that are NaN.

    References:
        Vehtari, Simpson, Gelman, Yao & Gabry (2024), Pareto Smoothed Importance Sampling, JMLR 25(72).

    Example:
        >>> torch.manual_seed(0)
        <torch._C.Generator object at ...>
        >>> ratio = torch.rand(4000, 1).pow(-0.5)  # a Pareto distribution of shape 0.5
        >>> round(pareto_khat(ratio.log()).item(), 1)
        0.5
    """
    summary = LogWeightSummary(len(log_weight))
    summary.update(log_weight)
    return summary.result()[3]
