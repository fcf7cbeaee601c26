r"""Leave-one-out cross-validation from draws of the global latents, with the locals integrated out.

With log p(x_n|θ_s) for draws θ_s ~ q(θ), in which the latents of the point itself are integrated out,

    elpd_n = log p(x_n|x_−n) ≈ log Σ_s r_s p(x_n|θ_s) / Σ_s r_s,     r_s = w_s / p(x_n|θ_s),
    w_s = p(θ_s) Π_n p(x_n|θ_s) / q(θ_s),

with the ratios r_s Pareto-smoothed (Vehtari, Gelman & Gabry 2017). Draws from the exact posterior, as of MCMC, have
w_s = 1; otherwise the weights correct q as well (Magnusson et al. 2019).

On terms p(x_n|z_n, θ) that are conditional on the latent of the point, this estimator fails: without x_n the posterior
of z_n is the prior, and importance sampling does not get from the one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nan, sqrt

import torch
from torch import Tensor

from pyro_vae.arguments import check_dense
from pyro_vae.evidence.evidence import NO_BOUND, Evidence
from pyro_vae.evidence.pareto import fit_tail, tail_length

__all__ = ["LeaveOneOut", "leave_one_out", "log_predictive"]


@dataclass(frozen=True, repr=False)
class LeaveOneOut:
    """Expected log predictive density (elpd) by leave-one-out; `print` gives a summary.

    Attributes:
        pointwise: elpd_n, (N,), float64, nats.
        pointwise_error: standard error of each from the finite number of draws, by the delta method, (N,), nats; for
            independent draws, and too small if k-hat is too large.
        pareto_khat: tail shape of the ratios, (N,); −inf if the largest are all equal, NaN if there are too few draws
            to tell (S < 21) or some are not finite.
        effective_sample_size: of the ratios, (Σr)²/Σr², (N,).
        log_predictive: log p(x_n|x) = log Σ_s w_s p(x_n|θ_s) / Σ_s w_s, (N,), of points that the draws have seen.
        monte_carlo_error: standard error of `elpd` from the finite number of draws, which the points share.
        num_draws: S. With one draw θ is fixed: nothing is left out, and elpd_n = log p(x_n|θ).
    """

    pointwise: Tensor
    pointwise_error: Tensor
    pareto_khat: Tensor
    effective_sample_size: Tensor
    log_predictive: Tensor
    monte_carlo_error: float
    num_draws: int

    @property
    def elpd(self) -> float:
        """Σ_n elpd_n, nats."""
        return self.pointwise.sum().item()

    @property
    def standard_error(self) -> float:
        """Standard error of `elpd` from the spread of the points, √N sd(elpd_n); NaN for one point."""
        n = len(self.pointwise)
        return sqrt(n) * self.pointwise.std().item() if n > 1 else nan

    @property
    def p_loo(self) -> float:
        """Effective number of parameters, Σ_n log p(x_n|x) − log p(x_n|x_−n); zero for a fixed θ."""
        return (self.log_predictive - self.pointwise).sum().item()

    @property
    def evidence(self) -> Evidence:
        """elpd_n as an `Evidence` of each point, for `compare`."""
        return Evidence(
            self.pointwise,
            self.pointwise_error,
            self.effective_sample_size,
            self.pareto_khat,
            self.num_draws,
            NO_BOUND,
            "leave_one_out",
        )

    @property
    def threshold(self) -> float:
        """The largest k-hat to trust with S draws, min(1 − 1/log₁₀ S, 0.7)."""
        return self.evidence.threshold

    @property
    def doubtful(self) -> Tensor:
        """Which points not to trust, (N,), bool: k-hat is too large or unknown, or elpd_n is not finite."""
        return self.evidence.doubtful if self.num_draws > 1 else ~self.pointwise.isfinite()

    def __repr__(self) -> str:
        n, fixed = len(self.pointwise), self.num_draws == 1
        draws = "one θ, so that nothing is left out" if fixed else f"{self.num_draws} draws"
        lines = [
            f"Leave-one-out of {n} data point{'s' * (n != 1)}, {draws} (nats)",
            f"  elpd          {self.elpd:.2f}{f' ± {self.standard_error:.2f} (points)' * (n > 1)}"
            + f" ± {self.monte_carlo_error:.2f} (draws)" * (not fixed),
            f"  p_loo         {self.p_loo:.2f}",
        ]
        known = self.pareto_khat[~self.pareto_khat.isnan()]
        if not fixed:
            khat_line = f"median {known.median():.2f}, largest {known.max():.2f}; " if len(known) else ""
            lines.append(
                f"  Pareto k-hat  {khat_line}{int(self.doubtful.sum())} of {n} points not to trust "
                + (f"(above {self.threshold:.2f})" if len(known) else "(too few draws to tell)")
            )
        bad = (~self.pointwise.isfinite()).nonzero().flatten().tolist()
        if bad:
            shown = ", ".join(map(str, bad[:10])) + (", …" if len(bad) > 10 else "")
            lines.append(f"  not finite    {len(bad)} points: rows {shown}")
        return "\n".join(lines)


def leave_one_out(log_likelihood: Tensor, log_weight: Tensor | None = None) -> LeaveOneOut:
    """Estimates log p(x_n|x_−n) of each data point by Pareto-smoothed importance sampling.

    To compare models, `compare({"a": a.evidence, "b": b.evidence})` gives the difference per point and its errors.

    References:
        Vehtari, Gelman & Gabry (2017), Practical Bayesian model evaluation using leave-one-out cross-validation and
            WAIC, Statistics and Computing 27.
        Magnusson, Andersen, Jonasson & Vehtari (2019), Bayesian leave-one-out cross-validation for large data.
        Merkle, Furr & Rabe-Hesketh (2019), Bayesian comparison of latent variable models: conditional versus marginal
            likelihoods, Psychometrika 84.

    Args:
        log_likelihood: log p(x_n|θ_s), (S, N), nats, the latents of point n integrated out, as
            `integrated_log_likelihood` gives it.
        log_weight: log p(θ_s) + Σ_n log p(x_n|θ_s) − log q(θ_s), (S,), up to a constant, of draws θ_s ~ q(θ). None for
            draws from the posterior itself, as of MCMC.

    Returns:
        `LeaveOneOut`. With S = 1, as for a decoder whose weights are fixed, θ does not know x: then elpd_n is
        log p(x_n|θ) exactly, and p_loo = 0.

    Raises:
        ValueError: the shapes do not match.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 1.0, 2.0])  # Normal(θ, 1), with a flat prior of θ
        >>> theta = x.mean() + torch.randn(4000, 1) / 2
        >>> loo = leave_one_out(torch.distributions.Normal(theta, 1.0).log_prob(x))
        >>> others = torch.distributions.Normal((x.sum() - x) / 3, (1 + 1 / 3) ** 0.5)  # given the other three
        >>> bool(((loo.pointwise - others.log_prob(x)).abs() < 5 * loo.pointwise_error).all())
        True
    """
    log_likelihood, log_weight, tolerance = _checked("leave_one_out", log_likelihood, log_weight)
    if len(log_likelihood) == 1:
        value, zero = log_likelihood[0], torch.zeros_like(log_likelihood[0])
        return LeaveOneOut(value, zero, torch.full_like(zero, -inf), zero + 1, value, 0.0, 1)
    # a draw of weight zero has ratio zero, even where x_n is impossible for it
    ratio = (log_weight - log_likelihood).masked_fill(log_weight.isneginf(), -inf)
    ratio, khat = _smoothed(ratio, tolerance)
    value, error, total = _mean(ratio, log_likelihood)
    impossible = ratio.isposinf().any(0)
    value = value.masked_fill(impossible, -inf)
    ess = (2 * ratio.logsumexp(0) - (2 * ratio).logsumexp(0)).exp()
    predictive = _mean(_smoothed(log_weight, tolerance)[0], log_likelihood)[0]
    return LeaveOneOut(value, error, khat, ess, predictive, total, len(log_likelihood))


def log_predictive(log_likelihood: Tensor, log_weight: Tensor | None = None) -> Evidence:
    r"""Estimates log p(x_new|x) of new data points, averaged over the posterior of the globals.

        log p(x_new|x) ≈ log Σ_s W_s p(x_new|θ_s),    W_s = w_s / Σ w_s, Pareto-smoothed.

    Args:
        log_likelihood: log p(x_new,n|θ_s), (S, N), nats, the latents of each new point integrated out.
        log_weight: as in `leave_one_out`, (S,); None for draws from the posterior itself.

    Returns:
        `Evidence` with S particles for each of the new points. Standard errors are by the delta method, for independent
        draws; k-hat is the larger of those of w_s and of w_s p(x_new|θ_s). One draw is a fixed θ: its value is exact.

    Raises:
        ValueError: the shapes do not match.

    Example:
        >>> theta = 0.5 * torch.randn(4000, 1)
        >>> new = torch.tensor([0.0, 2.0])
        >>> log_predictive(torch.distributions.Normal(theta, 1.0).log_prob(new)).log_evidence  # Normal(0, 1.25)
        tensor([-1.0..., -2.6...], dtype=torch.float64)
    """
    log_likelihood, log_weight, tolerance = _checked("log_predictive", log_likelihood, log_weight)
    num_draws = len(log_likelihood)
    weight, khat = _smoothed(log_weight, tolerance)
    product = (log_weight + log_likelihood).masked_fill(log_weight.isneginf(), -inf)
    value, error, _ = _mean(weight, log_likelihood)
    khat = torch.maximum(khat, _smoothed(product, tolerance)[1])
    ess = 1 / (error.square() + 1 / num_draws)
    if num_draws == 1:
        khat = torch.full_like(value, -inf)
    return Evidence(value, error, ess, khat, num_draws, NO_BOUND, "log_predictive")


def _checked(name: str, log_likelihood: Tensor, log_weight: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Both in float64, log-weights (S, 1), and up to which size their differences count as rounding."""
    check_dense(f"{name}: log_likelihood", log_likelihood)
    if log_weight is not None:
        check_dense(f"{name}: log_weight", log_weight)
    if log_likelihood.dim() != 2 or not len(log_likelihood):
        raise ValueError(
            f"{name}: expected a log_likelihood of shape (S draws, N points), got {tuple(log_likelihood.shape)}. "
            "Try log_likelihood.flatten(0, 1) if chains come first."
        )
    if log_weight is not None and log_weight.shape != log_likelihood.shape[:1]:
        raise ValueError(
            f"{name}: expected a log_weight for each of the {len(log_likelihood)} draws, got shape "
            f"{tuple(log_weight.shape)}. Try log_weight.flatten()."
        )
    tolerance = sqrt(torch.finfo(log_likelihood.dtype).eps)
    log_likelihood = log_likelihood.detach().double()
    log_weight = torch.zeros_like(log_likelihood[:, 0]) if log_weight is None else log_weight.detach().double()
    return log_likelihood, log_weight.unsqueeze(1), tolerance


def _smoothed(log_ratio: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Log-ratios (S, n) with their tails smoothed, and k-hat (n,)."""
    length = tail_length(len(log_ratio))
    top, order = log_ratio.topk(min(length + 1, len(log_ratio)), dim=0)
    khat, smoothed = fit_tail(top, length, tolerance)
    khat = khat.masked_fill(log_ratio.isnan().any(0), nan)
    return log_ratio.scatter(0, order[: len(smoothed)], smoothed), khat


def _mean(log_ratio: Tensor, log_value: Tensor) -> tuple[Tensor, Tensor, float]:
    """log Σ r v / Σ r over draws, (S, n), its standard error √(Σ r² (v/mean − 1)²) / Σ r, and that of the sum."""
    share = log_ratio.log_softmax(0)
    value = (share + log_value).masked_fill(share.isneginf(), -inf).logsumexp(0)
    deviation = (share.exp() * torch.expm1(log_value - value)).masked_fill(share.isneginf(), 0.0)
    return value, deviation.square().sum(0).sqrt(), deviation.sum(1).square().sum().sqrt().item()
