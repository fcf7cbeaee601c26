r"""Distributions of single elements that keep their digits, and their tails, where those of torch lose them.

Each is the Pyro distribution of the same name, computed in another way. With large parameters, torch takes a difference
of log-gammas, which loses its digits. Here it is a sum of terms of the order of the result (`special.py`): δ, which is
Stirling's error, and the deviance D(x, m) = x log(x/m) + m − x. For r → ∞, the terms of the negative binomial become
those of a Poisson.
"""

from __future__ import annotations

from math import inf, log, pi
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import biject_to, constraints, register_kl, transform_to
from torch.distributions.utils import broadcast_all

from pyro_vae.distributions.special import deviance, digamma_gap, excess, stirling_error
from pyro_vae.distributions.state import Copied

__all__ = ["Beta", "ContinuousBernoulli", "NegativeBinomial", "Poisson", "StudentT"]


class Poisson(Copied, dist.Poisson):
    """Counts with mean and variance λ, numerically stable for any λ:

        log p(k) = −D(k, λ) − δ(k) − ½ log 2πk,   log p(0) = −λ.

    Args:
        rate: λ ≥ 0.

    Example:
        >>> Poisson(torch.tensor(1e6)).log_prob(torch.tensor(1e6))  # about −½ log 2πk
        tensor(-7.8267)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        rate, value = broadcast_all(self.rate, value)
        value = value.to(rate.dtype)
        return -deviance(value, rate, value - rate) - _log_root(value)


def _log_root(k: Tensor) -> Tensor:
    """δ(k) + ½ log 2πk, what Stirling's formula leaves of log k!. Zero for k = 0."""
    positive = k > 0
    s = torch.where(positive, k, 1.0)
    return torch.where(positive, stirling_error(s) + 0.5 * (2 * pi * s).log(), 0.0)


class NegativeBinomial(Copied, dist.NegativeBinomial):
    """Counts with mean μ and variance μ + μ²/r, numerically stable for any r:

        log p(k) = −D(r, mr/k') − D(k, mμ/k') + ½ log(r/m) + δ(m) − δ(r) − δ(k) − ½ log 2πk,

    where m = r + k and k' = r + μ. For k = 0 only the first two terms are left.

    Args:
        total_count: r > 0.
        mean: μ > 0.

    Example:
        >>> p = NegativeBinomial(torch.tensor(1e9), torch.tensor(3.0))
        >>> p.log_prob(torch.tensor(2.0)), dist.Poisson(3.0).log_prob(torch.tensor(2.0))
        (tensor(-1.4959), tensor(-1.4959))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"total_count": constraints.positive, "mean": constraints.positive}

    def __init__(self, total_count: Tensor | float, mean: Tensor | float, validate_args: bool | None = None) -> None:
        self.total_count, self._mean = broadcast_all(total_count, mean)
        TorchDistribution.__init__(self, self._mean.shape, validate_args=validate_args)

    def expand(self, batch_shape: Size, _instance: Any = None) -> NegativeBinomial:
        new = type(self).__new__(type(self)) if _instance is None else _instance
        new.total_count, new._mean = self.total_count.expand(batch_shape), self._mean.expand(batch_shape)
        TorchDistribution.__init__(new, Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    # torch keeps the rest as it was when the distribution was made; here it follows r and μ
    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def variance(self) -> Tensor:
        return self._mean + self._mean.square() / self.total_count

    @property
    def logits(self) -> Tensor:
        return self._mean.log() - self.total_count.log()

    @property
    def probs(self) -> Tensor:
        return self._mean / (self.total_count + self._mean)

    @property
    def param_shape(self) -> Size:
        return self._mean.shape

    def sample(self, sample_shape: Size = Size()) -> Tensor:
        with torch.no_grad():
            rate = dist.Gamma(self.total_count, self.total_count / self._mean, validate_args=False)
            return torch.poisson(rate.sample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        r, mean, k = broadcast_all(self.total_count, self._mean, value)
        k = k.to(mean.dtype)
        both = r + k
        share = r / (r + mean)
        difference = (k - mean) * share
        result = -deviance(r, both * share, -difference) - deviance(k, mean * (both / (r + mean)), difference)
        root = 0.5 * (r / both).log() + stirling_error(both) - stirling_error(r) - _log_root(k)
        return result + torch.where(k > 0, root, 0.0)


class StudentT(Copied, dist.StudentT):
    """Student's t with ν degrees of freedom, numerically stable for any ν. With y = (x − μ) / σ,

        log p(x) = excess(ν/2, ½) − (ν + 1)/2 log(1 + y²/ν) − log σ − ½ log 2π,
        excess(r, k) = log Γ(r + k) − log Γ(r) − k log r,

    whose excess goes to zero for ν → ∞, where Student's t becomes a Normal.

    Args:
        df: ν > 0.
        loc: μ.
        scale: σ > 0.

    Example:
        >>> zero, normal = torch.tensor(0.0), dist.Normal(0.0, 1.0)
        >>> StudentT(torch.tensor(1e9)).log_prob(zero), normal.log_prob(zero)
        (tensor(-0.9189), tensor(-0.9189))
        >>> StudentT(torch.tensor(1e9)).entropy(), normal.entropy()
        (tensor(1.4189), tensor(1.4189))
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        tail = torch.log1p(((value - self.loc) / self.scale).square() / self.df)
        return excess(self.df / 2, 0.5) - 0.5 * (self.df + 1) * tail - self.scale.log() - 0.5 * log(2 * pi)

    def entropy(self) -> Tensor:
        """log σ + ½ log 2π − excess(ν/2, ½) + (ν + 1)/2 [ψ((ν + 1)/2) − ψ(ν/2)], nats."""
        r = self.df / 2
        slope = torch.log1p(0.5 / r) + digamma_gap(r) - digamma_gap(r + 0.5)
        return self.scale.log() + 0.5 * log(2 * pi) - excess(r, 0.5) + (r + 0.5) * slope


class _OpenInterval(constraints.interval):
    """lower_bound < x < upper_bound."""

    def check(self, value: Tensor) -> Tensor:
        return (self.lower_bound < value) & (value < self.upper_bound)


@biject_to.register(_OpenInterval)
@transform_to.register(_OpenInterval)
def _to_open_interval(constraint: _OpenInterval) -> Any:
    return biject_to(constraints.interval(constraint.lower_bound, constraint.upper_bound))


class Beta(Copied, dist.Beta):
    """The Beta distribution on the open interval: at 0 and 1 its density is zero, infinite or defined only as a limit.

    With n = α + β it is numerically stable for any α and β:

        log p(x) = −D(α, nx) − D(β, n(1 − x)) + ½ log(αβ/2πn) + δ(n) − δ(α) − δ(β) − log x(1 − x).

    Args:
        concentration1: α > 0.
        concentration0: β > 0.

    Example:
        >>> Beta(2.0, 3.0).support.check(torch.tensor([0.0, 0.5, 1.0]))
        tensor([False,  True, False])
    """

    support = _OpenInterval(0.0, 1.0)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        a, b, x = broadcast_all(self.concentration1, self.concentration0, value)
        edge = (x == 0) | (x == 1)
        to, other = torch.where(x == 0, a, b), torch.where(x == 0, b, a)
        limit = torch.where(to > 1, -inf, torch.where(to < 1, inf, other.log()))
        x = torch.where(edge, 0.5, x)
        n, difference = a + b, a * (1 - x) - b * x
        terms = deviance(a, n * x, difference) + deviance(b, n * (1 - x), -difference)
        terms = terms + x.log() + torch.log1p(-x)
        return torch.where(edge, limit, _beta_root(a, b) - terms)

    def entropy(self) -> Tensor:
        """log B(α, β) − (α − 1) ψ(α) − (β − 1) ψ(β) + (n − 2) ψ(n), nats."""
        a, b = self.concentration1, self.concentration0
        n = a + b
        slopes = (a - 1) * digamma_gap(a) + (b - 1) * digamma_gap(b) - (n - 2) * digamma_gap(n)
        return slopes - _beta_root(a, b) + (a / n).log() + (b / n).log()


def _beta_root(a: Tensor, b: Tensor) -> Tensor:
    """½ log(αβ/2πn) + δ(n) − δ(α) − δ(β), what Stirling's formula leaves of −log B(α, β)."""
    n = a + b
    root = 0.5 * (a.log() + (b / n).log() - log(2 * pi))
    return root + stirling_error(n) - stirling_error(a) - stirling_error(b)


@register_kl(Beta, Beta)
def _kl_betas(p: Beta, q: Beta) -> Tensor:
    """log B(q) − log B(p) + Σ (α_p − α_q) ψ(α_p), where the last sum is over α, β and, with the other sign, n."""
    a, b, c, d = p.concentration1, p.concentration0, q.concentration1, q.concentration0
    n, m = a + b, c + d
    difference = (c * b - d * a) / n
    distance = deviance(c, m * (a / n), difference) + deviance(d, m * (b / n), -difference)
    slopes = (c - a) * digamma_gap(a) + (d - b) * digamma_gap(b) - (m - n) * digamma_gap(n)
    return distance + slopes + _beta_root(a, b) - _beta_root(c, d)


# log(L / (e^L − 1)) = −L/2 + Σ c_n L^(2n), from the cumulants of the uniform distribution on [0, 1]
_SERIES = (-1 / 24, 1 / 2880, -1 / 181440, 1 / 9676800, -1 / 479001600)
_SMALL = 0.5  # the largest |L| for which the series is used; its remainder is below 1e-11


class ContinuousBernoulli(Copied, dist.ContinuousBernoulli):
    """The density p(x) = exp(L x) L / (e^L − 1) on [0, 1] with logits L, numerically stable for any L.

    torch computes it from the probability 1/(1 + e^−L), which in float32 cannot be told from one beyond L = 16. Here
    everything is computed from L: by a Taylor series near zero, and from e^−|L| elsewhere.

    Args:
        probs: 1/(1 + e^−L). Give either this or `logits`.
        logits: L.

    Example:
        >>> p = ContinuousBernoulli(logits=torch.tensor([-60.0, 0.0, 60.0]))
        >>> p.mean, p.log_prob(torch.tensor([0.0, 0.5, 0.0]))
        (tensor([0.0167, 0.5000, 0.9833]), tensor([  4.0943,   0.0000, -55.9057]))
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        logits, value = broadcast_all(self.logits, value)
        small, a = self._split(logits)
        series = logits * (value - 0.5) + sum(c * logits ** (2 * n) for n, c in enumerate(_SERIES, 1))
        # the exponent is zero at the end that has most of the mass, where x − 1 is not rounded
        exact = logits * (value - (logits > 0).to(value.dtype)) + a.log() - torch.log(-torch.expm1(-a))
        return torch.where(small, series, exact)

    @property
    def mean(self) -> Tensor:
        small, a = self._split(self.logits)
        series = 0.5 - sum(2 * n * c * self.logits ** (2 * n - 1) for n, c in enumerate(_SERIES, 1))
        below = 1 / a + torch.exp(-a) / torch.expm1(-a)  # the mean for −|L|
        return torch.where(small, series, torch.where(self.logits > 0, 1 - below, below))

    @property
    def variance(self) -> Tensor:
        small, a = self._split(self.logits)
        series = -sum(2 * n * (2 * n - 1) * c * self.logits ** (2 * n - 2) for n, c in enumerate(_SERIES, 1))
        return torch.where(small, series, a**-2 - torch.exp(-a) / torch.expm1(-a).square())

    def entropy(self) -> Tensor:
        mean = self.mean  # log p is linear in x
        return -ContinuousBernoulli(logits=self.logits, validate_args=False).log_prob(mean)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X ≤ x), for any real x: zero below the support and one above."""
        logits, x = broadcast_all(self.logits, value)
        x = x.clamp(0, 1)
        small, a = self._split(logits, 1e-4)
        exact = torch.exp(-logits.relu() * (1 - x)) * torch.expm1(-a * x) / torch.expm1(-a)
        return torch.where(small, x - logits / 2 * x * (1 - x), exact)

    def icdf(self, value: Tensor) -> Tensor:
        """x = log(1 − u + u e^L) / L, which is Σ κ_n L^(n−1) / n! with the cumulants κ of a Bernoulli(u)."""
        logits, u = broadcast_all(self.logits, value)
        small, a = self._split(logits, 0.1)
        k = u * (1 - u)
        series = (k * (1 - 6 * k) / 24 + k * (1 - 2 * u) * (1 - 12 * k) / 120 * logits) * logits
        series = u + logits * (k / 2 + logits * (k * (1 - 2 * u) / 6 + series))
        logits = torch.where(small, a, logits)
        return torch.where(small, series, torch.logaddexp(torch.log1p(-u), u.log() + logits) / logits)

    @staticmethod
    def _split(logits: Tensor, below: float = _SMALL) -> tuple[Tensor, Tensor]:
        """Where |L| is small, and |L| with ones there, so that the formula that is not used has a finite gradient."""
        a = logits.abs()
        return a < below, torch.where(a < below, 1.0, a)


@register_kl(ContinuousBernoulli, ContinuousBernoulli)
def _kl_continuous_bernoullis(p: ContinuousBernoulli, q: ContinuousBernoulli) -> Tensor:
    q = ContinuousBernoulli(logits=q.logits, validate_args=False)
    return -p.entropy() - q.log_prob(p.mean)  # log q is linear in x
