r"""Distributions of single elements that keep their digits, and their tails, where those of torch lose them.

Each is the Pyro distribution of the same name, computed in another way. With large parameters, a difference of
log-gammas loses its digits. Here it is replaced by its excess over its limit,

    excess(r, k) = log Γ(r + k) − log Γ(r) − k log r,

which goes to zero for r → ∞, where the negative binomial becomes a Poisson and Student's t becomes a Normal.
"""

from __future__ import annotations

from math import log, pi
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import biject_to, constraints, register_kl, transform_to
from torch.distributions.utils import broadcast_all

__all__ = ["Beta", "ContinuousBernoulli", "NegativeBinomial", "StudentT", "excess"]


def excess(r: Tensor, k: Tensor | float) -> Tensor:
    """log Γ(r + k) − log Γ(r) − k log r for r > 0 and k ≥ 0, by Stirling's series where r is large.

    Example:
        >>> excess(torch.tensor([2.0, 1e8]), 2.0)  # log((1 + r) / r)
        tensor([0.4055, 0.0000])
    """
    large = r > 20
    s = torch.where(large, r, 20.0)  # each branch gets only values that it can take; otherwise its gradient is NaN
    stirling = (s + k - 0.5) * torch.log1p(k / s) - k + _stirling_tail(s + k) - _stirling_tail(s)
    s = torch.where(large, 1.0, r)
    return torch.where(large, stirling, torch.lgamma(s + k) - torch.lgamma(s) - k * s.log())


def _stirling_tail(y: Tensor) -> Tensor:
    """log Γ(y) − (y − ½) log y + y − ½ log 2π, to 1e-14 for y > 20."""
    square = y**-2
    return (1 / 12 - (1 / 360 - (1 / 1260 - square / 1680) * square) * square) / y


class NegativeBinomial(dist.NegativeBinomial):
    """Counts with mean μ and variance μ + μ²/r, numerically stable for any r:

        log p(k) = excess(r, k) − (r + k) log(1 + μ/r) + k log μ − log k!.

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
        count, self._mean = broadcast_all(total_count, mean)
        super().__init__(count, logits=self._mean.log() - count.log(), validate_args=validate_args)

    def expand(self, batch_shape: Size, _instance: Any = None) -> NegativeBinomial:
        new = type(self).__new__(type(self)) if _instance is None else _instance
        new._mean = self._mean.expand(batch_shape)
        return super().expand(batch_shape, new)

    @property
    def mean(self) -> Tensor:
        return self._mean

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        count, mean, value = broadcast_all(self.total_count, self._mean, value)
        poisson = value * mean.log() - torch.lgamma(value + 1)  # without −μ, the limit of the second term below
        return excess(count, value) - (count + value) * torch.log1p(mean / count) + poisson


class StudentT(dist.StudentT):
    """Student's t with ν degrees of freedom, numerically stable for any ν. With y = (x − μ) / σ,

        log p(x) = excess(ν/2, ½) − (ν + 1)/2 log(1 + y²/ν) − log σ − ½ log 2π.

    Args:
        df: ν > 0.
        loc: μ.
        scale: σ > 0.

    Example:
        >>> zero = torch.tensor(0.0)
        >>> StudentT(torch.tensor(1e9)).log_prob(zero), dist.Normal(0.0, 1.0).log_prob(zero)
        (tensor(-0.9189), tensor(-0.9189))
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        tail = torch.log1p(((value - self.loc) / self.scale).square() / self.df)
        return excess(self.df / 2, 0.5) - 0.5 * (self.df + 1) * tail - self.scale.log() - 0.5 * log(2 * pi)


class _OpenInterval(constraints.interval):
    """lower_bound < x < upper_bound."""

    def check(self, value: Tensor) -> Tensor:
        return (self.lower_bound < value) & (value < self.upper_bound)


@biject_to.register(_OpenInterval)
@transform_to.register(_OpenInterval)
def _to_open_interval(constraint: _OpenInterval) -> Any:
    return biject_to(constraints.interval(constraint.lower_bound, constraint.upper_bound))


class Beta(dist.Beta):
    """The Beta distribution on the open interval: at 0 and 1 its density is zero, infinite or defined only as a limit.

    Args:
        concentration1: α > 0.
        concentration0: β > 0.

    Example:
        >>> Beta(2.0, 3.0).support.check(torch.tensor([0.0, 0.5, 1.0]))
        tensor([False,  True, False])
    """

    support = _OpenInterval(0.0, 1.0)


# log(L / (e^L − 1)) = −L/2 + Σ c_n L^(2n), from the cumulants of the uniform distribution on [0, 1]
_SERIES = (-1 / 24, 1 / 2880, -1 / 181440, 1 / 9676800, -1 / 479001600)
_SMALL = 0.5  # the largest |L| for which the series is used; its remainder is below 1e-11


class ContinuousBernoulli(dist.ContinuousBernoulli):
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
        if self._validate_args:
            self._validate_sample(value)
        logits, x = broadcast_all(self.logits, value)
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
