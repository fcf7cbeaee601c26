"""Densities, gradients, entropies and divergences against 60 digits, where parameters and counts are large."""

import math

import mpmath as mp
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from pyro_vae.distributions import (
    ConditionalBernoulli,
    ConditionalBeta,
    ConditionalCategorical,
    ConditionalNegativeBinomial,
    ConditionalNormal,
    ConditionalPoisson,
    ConditionalStudentT,
)
from pyro_vae.distributions.special import deviance, digamma_gap, stirling_error
from pyro_vae.distributions.univariate import Beta, NegativeBinomial, Poisson, StudentT

ROUNDING = {torch.float32: 6e-8, torch.float64: 1.2e-16}
dtypes = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


@pytest.fixture(autouse=True)
def _digits():
    with mp.workdps(60):
        yield


def leaf(value, dtype):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def exactly(tensor):
    return mp.mpf(tensor.item())


def close(tensor, exact, dtype, digits=30, scale=1.0):
    """To so many times the rounding of one number, of the size of the result or of `scale`."""
    bound = digits * ROUNDING[dtype] * max(scale, abs(float(exact)))
    assert abs(tensor.item() - float(exact)) <= bound, (tensor.item(), float(exact), bound)


def log_beta(a, b):
    return mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)


# -- what they are made of --------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("y", [1e-6, 1e-2, 1.0, 7.3, 19.9, 20.1, 1e3, 1e6, 1e12])
def test_what_stirling_leaves(y, dtype):
    value = torch.tensor(y, dtype=dtype)
    v = exactly(value)
    exact = mp.loggamma(v) - (v - 0.5) * mp.log(v) + v - mp.log(2 * mp.pi) / 2
    close(stirling_error(value), exact, dtype, scale=1 if y > 20 else 40)
    close(digamma_gap(value), mp.log(v) - mp.digamma(v), dtype)
    if y > 100:
        close(stirling_error(value) * 12 * value, exact * 12 * v, dtype, digits=4)
        close(digamma_gap(value) * 2 * value, (mp.log(v) - mp.digamma(v)) * 2 * v, dtype, digits=4)


@dtypes
@pytest.mark.parametrize("ratio", [0.0, 1e-6, 0.5, 0.59, 0.61, 0.999, 1 - 1e-5, 1.0, 1 + 1e-5, 1.39, 1.41, 3.0, 1e9])
@pytest.mark.parametrize("mean", [1e-25, 0.3, 1e6, 1e25])
def test_deviance(ratio, mean, dtype):
    m = leaf(mean, dtype)
    x = (m * ratio).detach()
    value = deviance(x, m, x - m)
    a, b = exactly(x), exactly(m)
    exact = (a * mp.log(a / b) if a else 0) + b - a
    close(value, exact, dtype, digits=100, scale=0)
    close(torch.autograd.grad(value, m)[0], 1 - a / b, dtype, digits=30)


# -- counts -----------------------------------------------------------------------------------------------------------

COUNTS = [0, 1, 3, 12, 30, 100, 10_000, 990_000, 1_000_000, 1_003_000, 10_000_000]


@dtypes
@pytest.mark.parametrize("mean", [1e-4, 1.0, 100.0, 1e4, 1e6, 1e7])
def test_poisson(mean, dtype):
    for k in COUNTS:
        rate = leaf(mean, dtype)
        log_prob = Poisson(rate).log_prob(torch.tensor(float(k), dtype=dtype))
        m = exactly(rate)
        close(log_prob, k * mp.log(m) - m - mp.loggamma(k + 1), dtype, digits=20, scale=min(1 + k, 20))
        close(torch.autograd.grad(log_prob, rate)[0], k / m - 1, dtype, digits=20)


@dtypes
@pytest.mark.parametrize("r", [1e-4, 0.3, 2.0, 15.0, 100.0, 1e4, 1e6, 1e9])
@pytest.mark.parametrize("mean", [1e-4, 1.0, 100.0, 1e4, 1e6, 1e7])
def test_negative_binomial(r, mean, dtype):
    for k in COUNTS:
        count, mu = leaf(r, dtype), leaf(mean, dtype)
        log_prob = NegativeBinomial(count, mu).log_prob(torch.tensor(float(k), dtype=dtype))
        a, m = exactly(count), exactly(mu)
        exact = mp.loggamma(a + k) - mp.loggamma(a) - mp.loggamma(k + 1) + k * mp.log(m / (a + m))
        close(log_prob, exact - a * mp.log1p(m / a), dtype, digits=20, scale=min(1 + k, 20))
        by_count, by_mean = torch.autograd.grad(log_prob, (count, mu))
        exact = mp.digamma(a + k) - mp.digamma(a) - mp.log1p(m / a) + (m - k) / (a + m)
        # what one draw tells about log r is of the order of (k − μ)² / var, and at most r log(k/r)
        spread = 1 + min((k - m) ** 2 / (m + m**2 / a), a * (1 + abs(mp.log((a + k) / (a + m)))))
        close(by_count * count, exact * a, dtype, digits=60, scale=float(spread))
        by_log_mean = a * (k - m) / (a + m)
        close(by_mean * mu, by_log_mean, dtype, digits=30, scale=1 + math.sqrt(k))


def test_counts_of_sequencing_depth():
    """r = 10⁴ and 100, μ = k = 10⁶, in float32."""
    k = torch.tensor(1e6)
    assert NegativeBinomial(torch.tensor(1e4), k).log_prob(k).item() == pytest.approx(-10.1343, abs=1e-3)
    assert NegativeBinomial(torch.tensor(100.0), k).log_prob(k).item() == pytest.approx(-12.4327, abs=1e-3)
    assert Poisson(k).log_prob(k).item() == pytest.approx(-7.8267, abs=1e-3)


def test_poisson_remains_one_of_pyro():
    p = ConditionalPoisson(None, 3)()
    assert isinstance(p.base_dist, dist.Poisson)
    assert isinstance(p.expand((4,)).base_dist, Poisson)
    rate, k = torch.tensor([0.0, 0.0, 1.5]), torch.tensor([0.0, 2.0, 4.0])
    torch.testing.assert_close(Poisson(rate).log_prob(k), dist.Poisson(rate).log_prob(k))
    torch.testing.assert_close(Poisson(rate[2]).log_prob(k.long()), dist.Poisson(rate[2]).log_prob(k))
    total = Poisson(torch.tensor(1e4)).log_prob(torch.arange(9000.0, 11_000.0)).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="support"):
        Poisson(torch.tensor(1.0), validate_args=True).log_prob(torch.tensor(0.5))


# -- Student's t ------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("df", [1e-3, 0.1, 1.0, 5.0, 39.0, 41.0, 1e3, 1e6, 1e8, 1e12, 1e30])
def test_entropy_of_student_t(df, dtype):
    nu, scale = leaf(df, dtype), leaf(0.5, dtype)
    entropy = StudentT(nu, 0.0, scale).entropy()
    n = exactly(nu)
    exact = (n + 1) / 2 * (mp.digamma((n + 1) / 2) - mp.digamma(n / 2)) + mp.log(n) / 2 + log_beta(n / 2, 0.5)
    if df > 1e25:  # where 60 digits cancel
        exact = (1 + mp.log(2 * mp.pi)) / 2
    close(entropy, exact + mp.log(0.5), dtype, scale=5 if df > 1 else 1 / df)
    by_nu, by_scale = torch.autograd.grad(entropy, (nu, scale))
    slope = (n + 1) / 4 * (mp.polygamma(1, (n + 1) / 2) - mp.polygamma(1, n / 2)) + 1 / (2 * n) if df < 1e25 else 0
    # torch's trigamma is good to 1e-9, and its slope at ν = 39 is the difference of two
    bound = 1e-8 if dtype is torch.float64 else 1e-5
    assert abs((by_nu * nu).item() - float(slope * n)) < bound * max(1, 1 / df)
    assert by_scale.item() == pytest.approx(2.0)


def test_entropy_of_student_t_is_that_of_the_normal():
    for df in (1e6, 1e8, 1e15):
        for dtype in ROUNDING:
            entropy = StudentT(torch.tensor(df, dtype=dtype), 0.0, 1.0).entropy().item()
            assert entropy == pytest.approx(1.4189385, abs=2e-6)


# -- Beta -------------------------------------------------------------------------------------------------------------

FRACTIONS = [1e-30, 1e-6, 0.1, 0.3, 0.5, 0.5005, 0.7, 0.999, 1 - 1e-6]
CONCENTRATIONS = [1e-4, 0.3, 1.0, 15.0, 100.0, 1e4, 1e6, 1e8]


@dtypes
@pytest.mark.parametrize("alpha", CONCENTRATIONS)
@pytest.mark.parametrize("beta", CONCENTRATIONS)
def test_beta(alpha, beta, dtype):
    a, b = leaf(alpha, dtype), leaf(beta, dtype)
    p, q = exactly(a), exactly(b)
    for x in torch.tensor([*FRACTIONS, min(max(alpha / (alpha + beta), 1e-6), 1 - 1e-6)], dtype=dtype):
        v = exactly(x)
        log_prob = Beta(a, b).log_prob(x)
        exact = (p - 1) * mp.log(v) + (q - 1) * mp.log1p(-v) - log_beta(p, q)
        # x is known to one rounding, and moving it by that moves the result by this many of them
        scale = abs(p - (p + q) * v) + abs(mp.log(v)) + abs(mp.log1p(-v)) + abs(mp.log(p)) + abs(mp.log(q))
        close(log_prob, exact, dtype, digits=20, scale=float(1 + scale))
        by_a, by_b = torch.autograd.grad(log_prob, (a, b))
        gap = mp.digamma(p + q)
        for got, parameter, c, part in ((by_a, a, p, mp.log(v)), (by_b, b, q, mp.log1p(-v))):
            exact = c * (part + gap - mp.digamma(c))
            close(got * parameter, exact, dtype, digits=8, scale=float(1 + c * (1 + abs(part))))


@dtypes
@pytest.mark.parametrize("alpha", CONCENTRATIONS)
@pytest.mark.parametrize("beta", CONCENTRATIONS)
def test_entropy_and_divergence_of_betas(alpha, beta, dtype):
    a, b = (torch.tensor(v, dtype=dtype) for v in (alpha, beta))
    p, q = exactly(a), exactly(b)
    exact = log_beta(p, q) - (p - 1) * mp.digamma(p) - (q - 1) * mp.digamma(q) + (p + q - 2) * mp.digamma(p + q)
    close(Beta(a, b).entropy(), exact, dtype, digits=60, scale=float(20 + 1 / p + 1 / q))
    for other in ((1.0, 1.0), (alpha, beta), (alpha * 1.001, beta), (2e5, 3e5)):
        c, d = (torch.tensor(v, dtype=dtype) for v in other)
        r, s = exactly(c), exactly(d)
        exact = log_beta(r, s) - log_beta(p, q) + (p - r) * mp.digamma(p) + (q - s) * mp.digamma(q)
        exact = exact - (p + q - r - s) * mp.digamma(p + q)
        scale = 20 + (1 + r) / p + (1 + s) / q + abs(p - r) + abs(q - s)  # ψ(α) is about −1/α
        close(kl_divergence(Beta(a, b), Beta(c, d)), exact, dtype, digits=60, scale=float(scale))


def test_beta_at_its_ends_is_that_of_torch():
    a, b = torch.tensor([0.5, 1.0, 2.0]).unsqueeze(-1), torch.tensor([0.5, 1.0, 3.0])
    for x in (0.0, 1.0):
        ours, theirs = (f(a, b, validate_args=False).log_prob(torch.tensor(x)) for f in (Beta, dist.Beta))
        torch.testing.assert_close(ours, theirs)
    assert Beta(a, b, validate_args=False).log_prob(torch.tensor(1.5)).isnan().all()


# -- the families -----------------------------------------------------------------------------------------------------


@dtypes
def test_families_far_from_zero(dtype):
    """Raw parameters of ±10⁴, as an unlucky step of an optimizer makes them: finite, and those of the formula."""
    for raw in (-1e4, -30.0, 30.0, 1e4):
        for family, value in (
            (ConditionalBernoulli(None, 1), 1.0),
            (ConditionalCategorical(None, 1, num_categories=2), 1.0),
            (ConditionalNormal(None, 1), 3.0),
            (ConditionalStudentT(None, 1), 3.0),
            (ConditionalPoisson(None, 1), 4.0),
            (ConditionalNegativeBinomial(None, 1), 4.0),
            (ConditionalBeta(None, 1), 0.25),
        ):
            family = family.to(dtype)
            with torch.no_grad():
                family.free.fill_(raw)
            log_prob = family().log_prob(torch.tensor([value], dtype=dtype))
            (gradient,) = torch.autograd.grad(log_prob, family.free)
            assert torch.isfinite(log_prob).all(), (type(family), raw)
            assert torch.isfinite(gradient).all(), (type(family), raw)
