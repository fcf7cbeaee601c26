r"""The Gamma and the Dirichlet, which keep their digits where torch takes differences of large log-gammas.

As in `univariate.py`, both are sums of terms of the order of the result: the deviance D(a, m) = a log(a/m) + m − a and
Stirling's error δ(a), with ω(a) = log a − ψ(a) in expectations (`special.py`).
"""

from __future__ import annotations

from math import log, pi
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, register_kl, transform_to
from torch.distributions.utils import broadcast_all

from pyro_vae.distributions.special import deviance, digamma_gap, stirling_error
from pyro_vae.distributions.state import Copied

__all__ = ["Dirichlet", "Gamma"]


class Gamma(Copied, dist.Gamma):
    """The Gamma distribution of positive values, numerically stable for any α and β:

        log p(x) = −D(α, βx) + ½ log(α/2π) − δ(α) − log x.

    Its support is open: at zero the density is zero, infinite or defined only as a limit.

    Args:
        concentration: α > 0.
        rate: β > 0; the mean is α/β and the variance α/β².

    Example:
        >>> Gamma(torch.tensor(1e6), torch.tensor(1e6)).log_prob(torch.tensor(1.0))  # about ½ log(α/2π)
        tensor(5.9888)
    """

    support = constraints.positive

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        a, rate, x = broadcast_all(self.concentration, self.rate, value)
        mean = rate * x
        return _gamma_root(a) - deviance(a, mean, a - mean) - x.log()

    def entropy(self) -> Tensor:
        """½ log(2π/α) + δ(α) + log(α/β) + (α − 1) ω(α), nats."""
        a = self.concentration
        return (a - 1) * digamma_gap(a) - _gamma_root(a) + (a / self.rate).log()


def _gamma_root(a: Tensor) -> Tensor:
    """½ log(α/2π) − δ(α), what Stirling's formula leaves of −log Γ(α)."""
    return 0.5 * (a / (2 * pi)).log() - stirling_error(a)


@register_kl(Gamma, Gamma)
def _kl_gammas(p: Gamma, q: Gamma) -> Tensor:
    """D(α_q, α_p β_q/β_p) + (α_q − α_p) ω(α_p) + ½ log(α_p/α_q) − δ(α_p) + δ(α_q)."""
    a, c = p.concentration, q.concentration
    mean = a * (q.rate / p.rate)
    return deviance(c, mean, c - mean) + (c - a) * digamma_gap(a) + _gamma_root(a) - _gamma_root(c)


class _OpenSimplex(constraints.Constraint):
    """Positive elements with sum one, to the rounding of so many of them."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        tolerance = max(1e-6, value.shape[-1] * torch.finfo(value.dtype).eps)
        return (value > 0).all(-1) & ((value.sum(-1) - 1).abs() < tolerance)


@biject_to.register(_OpenSimplex)
@transform_to.register(_OpenSimplex)
def _to_open_simplex(constraint: _OpenSimplex) -> Any:
    return biject_to(constraints.simplex)


class Dirichlet(Copied, dist.Dirichlet):
    """The Dirichlet distribution of proportions, numerically stable for any α. With n = Σ α_i,

        log p(x) = Σ [−D(α_i, n x_i) + ½ log(α_i/2π) − δ(α_i) − log x_i] − ½ log(n/2π) + δ(n).

    Where the x_i do not add up to one exactly, this is the density of x / Σ x_i to first order. The support is open: a
    proportion of zero has a density of zero, of infinity, or one that is defined only as a limit.

    Args:
        concentration: α > 0, (*batch, D).

    Example:
        >>> p = Dirichlet(torch.ones(3))
        >>> round(p.log_prob(torch.tensor([0.2, 0.3, 0.5])).exp().item(), 5)  # one over the area
        2.0
    """

    support = _OpenSimplex()

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        a, x = torch.broadcast_tensors(self.concentration, value)
        mean = a.sum(-1, keepdim=True) * x
        return _dirichlet_root(a) - (deviance(a, mean, a - mean) + x.log()).sum(-1)

    def entropy(self) -> Tensor:
        """Σ [(α_i − 1) ω(α_i) + log(α_i/n)] − (n − D) ω(n) less what is left of −log B(α), nats."""
        a = self.concentration
        n = a.sum(-1, keepdim=True)
        terms = (a - 1) * digamma_gap(a) + (a / n).log()
        return terms.sum(-1) - ((n - a.shape[-1]) * digamma_gap(n)).squeeze(-1) - _dirichlet_root(a)


def _dirichlet_root(a: Tensor) -> Tensor:
    """What Stirling's formula leaves of log Γ(n) − Σ log Γ(α_i)."""
    n = a.sum(-1)
    return _gamma_root(a).sum(-1) - 0.5 * n.log() + 0.5 * log(2 * pi) + stirling_error(n)


@register_kl(Dirichlet, Dirichlet)
def _kl_dirichlets(p: Dirichlet, q: Dirichlet) -> Tensor:
    """Σ [D(c_i, m α_i/n) + (c_i − α_i) ω(α_i)] − (m − n) ω(n), and what is left of the two log B."""
    a, c = p.concentration, q.concentration
    n, m = a.sum(-1, keepdim=True), c.sum(-1, keepdim=True)
    mean = m * (a / n)
    terms = deviance(c, mean, c - mean) + (c - a) * digamma_gap(a)
    rest = ((m - n) * digamma_gap(n)).squeeze(-1)
    return terms.sum(-1) - rest + _dirichlet_root(a) - _dirichlet_root(c)
