r"""Evidence: log p(x) of every data point, with an error bar and a verdict on it.

With log-weights log w_k = log p(x, z_k) − log q(z_k|x), z_k ~ q(z|x), the importance sampling estimate is

    log p̂(x) = log 1/K Σ_k w_k,   E log p̂(x) ≤ log p(x) = log E w,

a lower bound in expectation that rises with K (Burda, Grosse & Salakhutdinov 2016, *Importance Weighted Autoencoders*,
theorem 1); its bias is −Var(w) / (2 K p(x)²) + O(1/K²) (Nowozin 2018). What belongs to it:

- effective sample size, ESS = (Σ w)² / Σ w², between 1 and K;
- standard error of log p̂ by the delta method, √(1/ESS − 1/K): it needs weights of finite variance;
- Pareto k-hat, the shape of a generalized Pareto distribution fitted to the largest weights: above
  min(1 − 1/log₁₀ K, 0.7) neither the estimate nor its standard error can be trusted (Vehtari et al. 2024, *Pareto
  Smoothed Importance Sampling*, JMLR 25(72)). It is fitted as Zhang & Stephens (2009, Technometrics 51) do.

Weights stream through in chunks; sums are kept in float64 and of the weights only the tail, so that memory depends on
neither K nor N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, log, log10, nan, sqrt
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.particles import ParticleSampler, check_num_particles
from pyro_vae.progress import progress_bar
from pyro_vae.traces import evaluation_mode

__all__ = ["Evidence", "LogWeightSummary", "importance_sampling", "pareto_khat", "prior_sampling"]


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
            f"Evidence of {n} data points by {self.method}, {self.num_particles} particles each (nats)",
            f"  mean log p(x)          {mean:.3f} ± {spread:.3f} (points) ± {error:.3f} (particles)",
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


def importance_sampling(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int = 5000,
    plate: str = "data",
    chunk_size: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Evidence:
    """Estimates log p(x) of each data point by importance sampling, log 1/K Σ p(x, z_k)/q(z_k|x), z_k ~ q(z|x).

    Works on any pair with its data points in a plate; runs without gradients and with modules in evaluation mode.
    A row of `args` may depend on no other row. Fails, and says so by k-hat and ESS, where q is narrower than the
    posterior or high-dimensional.

    References:
        Burda, Grosse & Salakhutdinov (2016), Importance Weighted Autoencoders, equation 8.

    Args:
        model: a Pyro model with the data points in a plate called `plate`, at any depth.
        guide: its guide.
        *args: what both are called with; tensors as long as the plate are cut into rows.
        num_particles: K ≥ 1, of which exactly K are drawn.
        plate: name of the plate of data points.
        chunk_size: particles × rows of one pass; default: as many as make 24 MiB of tensors. It decides which random
            numbers meet which particle, and nothing else.
        progress: show a progress bar, if on a terminal.
        **kwargs: what both are called with.

    Returns:
        `Evidence`; log_evidence (N,) in nats is a lower bound in expectation. No error bar where K = 1 (NaN).

    Raises:
        ValueError: as `draw_particles`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> pyro.set_rng_seed(0)
        >>> evidence = importance_sampling(model, guide, torch.tensor([0.0, 2.0]), num_particles=1000)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor([0.0, 2.0]))
        >>> bool(((evidence.log_evidence - exact).abs() < 4 * evidence.standard_error).all())
        True
    """
    num_particles = check_num_particles(num_particles)
    sampler = ParticleSampler(model, guide, args, kwargs, plate=plate)
    parts = []
    with torch.no_grad(), evaluation_mode():
        rows, counts = sampler.chunks(num_particles, chunk_size)
        with progress_bar(sampler.num_points * num_particles, "importance sampling", progress) as bar:
            for r in rows:
                summary = LogWeightSummary(num_particles)
                for i, count in enumerate(counts):
                    log_weight = sampler.draw(count, r, check=i == 0).log_weight
                    summary.update(log_weight)
                    bar.update(log_weight.numel())
                parts.append(summary.result())
    values = [torch.cat([part[i] for part in parts]) for i in range(4)]
    return Evidence(*values, num_particles, "lower bound on log p(x) in expectation", "importance_sampling")


def prior_sampling(
    model: Callable,
    guide: Callable | None,
    *args: Any,
    num_particles: int = 5000,
    plate: str = "data",
    chunk_size: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Evidence:
    """Estimates log p(x) of each data point by simple Monte Carlo, log 1/K Σ p(x|z_k), z_k ~ p(z).

    Importance sampling with the prior as proposal. p̂(x) is unbiased, but where the posterior is much narrower than the
    prior, which is soon the case beyond a few latent dimensions, hardly a draw hits it: a check, not a method.

    Args:
        model: as in `importance_sampling`, whose other arguments are the same.
        guide: not used; it is there so that estimators can be exchanged.
        *args: what the model is called with.
        num_particles: K ≥ 1.
        plate: name of the plate of data points.
        chunk_size: particles × rows of one pass.
        progress: show a progress bar, if on a terminal.
        **kwargs: what the model is called with.

    Returns:
        `Evidence`; log_evidence (N,) in nats is a lower bound in expectation.

    Raises:
        ValueError: as `draw_particles`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> pyro.set_rng_seed(0)
        >>> evidence = prior_sampling(model, None, torch.tensor([0.0]), num_particles=1000)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor([0.0]))
        >>> bool((evidence.log_evidence - exact).abs() < 4 * evidence.standard_error)
        True
    """
    prior = poutine.block(model, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])
    options = {"num_particles": num_particles, "plate": plate, "chunk_size": chunk_size, "progress": progress}
    return replace(importance_sampling(model, prior, *args, **options, **kwargs), method="prior_sampling")


class LogWeightSummary:
    """Log-mean-exp, error, ESS and k-hat of K log-weights for each of n points, from chunks of them in any order.

    Args:
        num_particles: K in total, which decides how many of the largest weights are kept.

    Example:
        >>> summary = LogWeightSummary(100)
        >>> summary.update(torch.ones(60, 2))
        >>> summary.update(torch.ones(40, 2))
        >>> [round(v[0].item(), 3) for v in summary.result()]
        [1.0, 0.0, 100.0, -inf]
    """

    def __init__(self, num_particles: int) -> None:
        self.num_particles = num_particles
        self.count = 0
        self._tail_length = ceil(min(0.2 * num_particles, 3 * sqrt(num_particles)))
        self._top: Tensor | None = None  # the largest, and one more as the threshold
        self._sums: Tensor | None = None  # log Σ w and log Σ w², (2, n)
        self._tolerance = 0.0

    def update(self, log_weight: Tensor) -> None:
        """Takes a chunk (k, n) of log-weights."""
        self._tolerance = max(self._tolerance, sqrt(torch.finfo(log_weight.dtype).eps))
        log_weight = log_weight.double()
        self.count += len(log_weight)
        sums = torch.stack([log_weight.logsumexp(0), (2 * log_weight).logsumexp(0)])
        self._sums = sums if self._sums is None else torch.logaddexp(self._sums, sums)
        top = log_weight if self._top is None else torch.cat([self._top, log_weight])
        self._top = top.topk(min(self._tail_length + 1, len(top)), dim=0).values

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log evidence, its standard error, effective sample size and k-hat, each (n,), float64."""
        if self.count != self.num_particles:
            raise ValueError(f"expected {self.num_particles} log-weights per point, got {self.count}.")
        first, second = self._sums
        k = self.num_particles
        ess = (2 * first - second).exp().clamp(max=k)
        error = (1 / ess - 1 / k).clamp(min=0).sqrt() if k > 1 else torch.full_like(ess, nan)
        return first - log(k), error, ess, _khat_of_tail(self._top, self._tail_length, self._tolerance)


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


def _khat_of_tail(top: Tensor, length: int, tolerance: float) -> Tensor:
    """k-hat from the `length` largest log-weights and the one before them, (length + 1, n), descending."""
    khat = torch.full_like(top[0], nan)
    if length < 5 or len(top) <= length:
        return khat
    largest, cutoff = top[0], top[length]
    equal = largest - cutoff <= tolerance
    khat[equal] = -float("inf")
    fit = torch.isfinite(largest) & ~equal
    excess = (top[:length, fit] - largest[fit]).exp() - (cutoff[fit] - largest[fit]).exp()
    khat[fit] = _generalized_pareto_shape(excess.flip(0))
    return khat


def _generalized_pareto_shape(x: Tensor) -> Tensor:
    """Shape k of generalized Pareto distributions fitted to x (M, n), ascending, ≥ 0.

    Zhang & Stephens (2009): a profile posterior over b = −k/σ on a grid set by the quartile; then the
    weak prior of Vehtari et al. (2024, appendix G) that draws k to ½ with the weight of ten observations.
    """
    x = x.clamp(min=torch.finfo(x.dtype).tiny)
    m = len(x)
    grid = 30 + int(sqrt(m))
    i = torch.arange(1, grid + 1, dtype=x.dtype, device=x.device).unsqueeze(-1)
    b = 1 / x[-1] + (1 - (grid / (i - 0.5)).sqrt()) / (3 * x[int(m / 4 + 0.5) - 1])  # (grid, n)
    k = torch.stack([torch.log1p(-row * x).mean(0) for row in b])
    log_likelihood = m * ((-b / k).log() - k - 1)
    weight = log_likelihood.softmax(0)
    k = torch.log1p(-(weight * b).sum(0) * x).mean(0)
    return (m * k + 10 * 0.5) / (m + 10)
