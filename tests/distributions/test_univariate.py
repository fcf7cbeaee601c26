"""Distributions of single elements against 40 digits, from tiny to extreme parameters."""

import math

import mpmath as mp
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy import stats
from torch.distributions import biject_to, kl_divergence, transform_to

from pyro_vae import VAE, CompiledELBO, fit
from pyro_vae.distributions import (
    ConditionalBeta,
    ConditionalContinuousBernoulli,
    ConditionalLowRankMultivariateNormal,
    ConditionalNegativeBinomial,
    ConditionalNormal,
    ConditionalStudentT,
    LearnedScale,
    StandardNormal,
)
from pyro_vae.distributions.special import excess
from pyro_vae.distributions.univariate import Beta, ContinuousBernoulli, NegativeBinomial, StudentT
from pyro_vae.networks import MLP

mp.mp.dps = 40
DTYPES = [torch.float32, torch.float64]
LOGITS = [0.0] + [s * a for a in (1e-8, 1e-3, 0.05, 0.3, 0.499, 0.501, 1, 5, 17, 40, 60, 90, 300, 1e4) for s in (1, -1)]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def leaf(value, dtype):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def exactly(tensor):
    return mp.mpf(tensor.item())


def close(tensor, exact, tolerance, scale=1.0):
    assert abs(tensor.item() - float(exact)) <= tolerance * max(scale, abs(float(exact))), (tensor.item(), float(exact))


# -- continuous Bernoulli ---------------------------------------------------------------------------------------------


def log_norm(logit):
    return mp.log(logit / mp.expm1(logit)) if logit else mp.mpf(0)


def cb_mean(logit):
    return 1 / (1 - mp.exp(-logit)) - 1 / logit if abs(logit) > 1e-15 else mp.mpf(0.5)


def cb_variance(logit):
    return 1 / logit**2 - 1 / (4 * mp.sinh(logit / 2) ** 2) if abs(logit) > 1e-15 else mp.mpf(1) / 12


def test_the_truth_about_the_continuous_bernoulli_is_a_density():
    for logit in (-3.0, 0.7, 20.0):
        logit = mp.mpf(logit)
        moments = [
            mp.quad(lambda x, n=n, logit=logit: x**n * mp.exp(logit * x + log_norm(logit)), [0, 1]) for n in range(3)
        ]
        exact = (1, cb_mean(logit), cb_variance(logit) + cb_mean(logit) ** 2)
        assert all(mp.almosteq(a, b, 1e-20) for a, b in zip(moments, exact, strict=True))


@dtypes
@pytest.mark.parametrize("logit", LOGITS)
class TestContinuousBernoulli:
    def test_log_prob_and_gradient(self, logit, dtype):
        parameter, tolerance = leaf(logit, dtype), {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
        p, exact = ContinuousBernoulli(logits=parameter), exactly(parameter)
        for value in torch.tensor([0.0, 1e-3, 0.3, 0.5, 0.999, 1.0], dtype=dtype):
            log_prob = p.log_prob(value)
            close(log_prob, exact * exactly(value) + log_norm(exact), tolerance)
            close(torch.autograd.grad(log_prob, parameter)[0], exactly(value) - cb_mean(exact), tolerance)

    def test_moments_and_entropy(self, logit, dtype):
        parameter, tolerance = leaf(logit, dtype), {torch.float32: 2e-5, torch.float64: 1e-9}[dtype]
        p, exact = ContinuousBernoulli(logits=parameter), exactly(parameter)
        close(p.mean, cb_mean(exact), tolerance / 10, scale=0.01)
        close(torch.autograd.grad(p.mean, parameter)[0], cb_variance(exact), tolerance, scale=0.01)
        close(p.variance, cb_variance(exact), tolerance, scale=0)
        close(p.entropy(), -exact * cb_mean(exact) - log_norm(exact), 2 * tolerance)
        (gradient,) = torch.autograd.grad(p.variance, parameter)
        assert torch.isfinite(gradient)

    def test_quantiles_and_their_gradient(self, logit, dtype):
        """∂x/∂L at fixed u is what reparametrised draws carry."""
        parameter, tolerance = leaf(logit, dtype), {torch.float32: 1e-5, torch.float64: 2e-7}[dtype]
        p, exact = ContinuousBernoulli(logits=parameter), exactly(parameter)
        for u in torch.tensor([0.0, 1e-6, 0.2, 0.5, 0.9, 1.0], dtype=dtype):
            x, v = p.icdf(u), exactly(u)
            inside = 1 - v + v * mp.exp(exact)
            expected = mp.log(inside) / exact if exact else v
            slope = v * (1 - v) / 2
            if abs(exact) > 1e-15:
                slope = (v * mp.exp(exact) / inside - expected) / exact
            close(x, expected, tolerance / 10)
            assert 0 <= x.item() <= 1
            close(torch.autograd.grad(x, parameter)[0], slope, tolerance)
            close(p.cdf(u), mp.expm1(exact * v) / mp.expm1(exact) if exact else v, tolerance / 10)


@dtypes
@pytest.mark.parametrize("logit", LOGITS[::4])
def test_distribution_function_outside_of_the_support(logit, dtype):
    """0 below and 1 above, whether values are validated or not; its slope there is zero."""
    for validate in (False, True):
        p = ContinuousBernoulli(logits=torch.tensor(logit, dtype=dtype), validate_args=validate)
        x = torch.tensor([-math.inf, -0.1, 0.0, 1.0, 3.0, math.inf], dtype=dtype, requires_grad=True)
        cdf = p.cdf(x)
        assert cdf.tolist() == [0, 0, 0, 1, 1, 1]
        (slope,) = torch.autograd.grad(cdf.sum(), x)
        assert slope[[0, 1, 4, 5]].tolist() == [0, 0, 0, 0]
        assert p.cdf(torch.tensor(math.nan, dtype=dtype)).isnan()


@pytest.mark.parametrize("logit", [-300.0, -60.0, -17.0, -3.0, -0.2, 0.0, 0.05, 1.0, 20.0, 60.0, 300.0])
def test_draws_of_the_continuous_bernoulli(logit):
    parameter = leaf(logit, torch.float32)
    x = ContinuousBernoulli(logits=parameter).expand((40_000,)).rsample()
    exact = mp.mpf(logit)
    error = math.sqrt(float(cb_variance(exact)) / len(x))
    assert abs(x.double().mean().item() - float(cb_mean(exact))) < 5 * error
    # scipy has it as an exponential distribution that is cut off at one
    draws = x.detach().double().numpy()
    truth = stats.truncexpon(b=abs(logit), scale=1 / abs(logit)) if logit else stats.uniform()
    assert stats.kstest(1 - draws if logit > 0 else draws, truth.cdf).pvalue > 1e-4
    (slope,) = torch.autograd.grad(x.mean(), parameter)
    assert slope.item() == pytest.approx(float(cb_variance(exact)), rel=0.05)


def test_divergence_of_continuous_bernoullis():
    logits = (-60.0, -2.0, 0.0, 0.3, 60.0)
    for p in logits:
        for q in logits:
            a, b = mp.mpf(p), mp.mpf(q)
            exact = (a - b) * cb_mean(a) + log_norm(a) - log_norm(b)
            got = kl_divergence(*(ContinuousBernoulli(logits=torch.tensor(v)) for v in (p, q)))
            close(got, exact, 1e-5)


def test_black_images_under_extreme_logits():
    likelihood = ConditionalContinuousBernoulli(None, 784)
    with torch.no_grad():
        likelihood.free.fill_(-60.0)
    assert likelihood().log_prob(torch.zeros(784)).item() == pytest.approx(784 * math.log(60), rel=1e-6)


# -- negative binomial and Student's t --------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("r", [1e-5, 1e-3, 0.1, 1.0, 10.0, 19.9, 20.1, 1e3, 1e5, 1e7, 1e9, 1e12])
def test_negative_binomial(r, dtype):
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    for mean in (1e-3, 0.1, 3.0, 100.0, 1e4):
        for k in (0, 1, 3, 100, 10_000):
            count, mu = leaf(r, dtype), leaf(mean, dtype)
            log_prob = NegativeBinomial(count, mu).log_prob(torch.tensor(float(k), dtype=dtype))
            a, m = exactly(count), exactly(mu)
            log_binomial = mp.loggamma(a + k) - mp.loggamma(a) - mp.loggamma(k + 1)
            exact = log_binomial + k * mp.log(m / (a + m)) - a * mp.log1p(m / a)
            close(log_prob, exact, tolerance, scale=10 + k * math.log(k + 1))  # which log k! alone is rounded to
            got = torch.autograd.grad(log_prob, (count, mu))
            by_count = mp.digamma(a + k) - mp.digamma(a) - mp.log1p(m / a) + (m - k) / (a + m)
            close(got[0] * count, by_count * a, 5 * tolerance, scale=1 + k + mean)  # by log r
            close(got[1] * mu, k - m * (k + a) / (a + m), 5 * tolerance, scale=1 + k + mean)  # by log μ


@pytest.mark.parametrize("r", [0.5, 1e7, 1e12])
def test_negative_binomial_is_a_distribution(r):
    count = torch.tensor(r)
    p = NegativeBinomial(count, torch.tensor([3.0, 30.0]))
    k = torch.arange(3000.0).unsqueeze(-1)
    torch.testing.assert_close(p.log_prob(k).exp().sum(0), torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(p.mean, torch.tensor([3.0, 30.0]))
    torch.testing.assert_close(p.variance, p.mean + p.mean**2 / r)
    torch.testing.assert_close(p.logits, (p.mean / r).log())
    assert isinstance(p, dist.NegativeBinomial)
    q = p.expand((4, 2))
    assert q.to_event(1).log_prob(q.sample()).shape == (4,)
    x = p.sample((40_000,))
    assert ((x.mean(0) - p.mean).abs() < 5 * (p.variance / 40_000).sqrt()).all()
    with pytest.raises(ValueError, match="total_count"):
        NegativeBinomial(torch.tensor(-1.0), torch.tensor(1.0), validate_args=True)


@dtypes
@pytest.mark.parametrize("df", [1e-3, 0.1, 1.0, 5.0, 39.0, 41.0, 99.0, 1e3, 1e6, 1e7, 1e10, 1e15])
def test_student_t(df, dtype):
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    for y in (0.0, 0.5, 3.0, 1e3, 1e6):
        nu, loc, scale = leaf(df, dtype), leaf(0.25, dtype), leaf(0.5, dtype)
        value = torch.tensor(y / 2 + 0.25, dtype=dtype)
        log_prob = StudentT(nu, loc, scale).log_prob(value)
        n, t = exactly(nu), 2 * (exactly(value) - exactly(loc))
        normalizer = mp.loggamma((n + 1) / 2) - mp.loggamma(n / 2) - mp.log(n * mp.pi) / 2 - mp.log(0.5)
        close(log_prob, normalizer - (n + 1) / 2 * mp.log1p(t**2 / n), tolerance)
        by_nu, by_loc, by_scale = torch.autograd.grad(log_prob, (nu, loc, scale))
        exact = mp.digamma((n + 1) / 2) - mp.digamma(n / 2) - 1 / n - mp.log1p(t**2 / n)
        exact = (exact + (n + 1) / n * t**2 / (n + t**2)) / 2
        close(by_nu * nu, exact * n, 5 * tolerance, scale=1 + min(y**2, df))
        close(by_loc, 2 * (n + 1) * t / (n + t**2), tolerance)
        close(by_scale, 2 * ((n + 1) * t**2 / (n + t**2) - 1), tolerance)


def test_student_t_remains_one_of_pyro():
    p = StudentT(torch.tensor(1e7), torch.zeros(3), torch.tensor(2.0)).expand((4, 3)).to_event(1)
    assert isinstance(p.base_dist, dist.StudentT)
    assert p.log_prob(p.rsample((5,))).shape == (5, 4)
    zeros = torch.zeros(4, 3)
    torch.testing.assert_close(p.log_prob(zeros), dist.Normal(zeros, 2.0).log_prob(zeros).sum(-1))


def test_families_with_large_parameters_are_poisson_and_normal():
    x, k = torch.linspace(-3, 3, 5), torch.tensor([0.0, 1.0, 2.0, 7.0, 30.0])
    counts = ConditionalNegativeBinomial(None, 5, total_count=1e8)()
    torch.testing.assert_close(counts.log_prob(k), dist.Poisson(torch.ones(5)).to_event(1).log_prob(k))
    heavy = ConditionalStudentT(None, 5, df=1e8, scale=1.0)()
    torch.testing.assert_close(heavy.log_prob(x), dist.Normal(torch.zeros(5), 1.0).to_event(1).log_prob(x))


def test_excess_is_zero_at_infinity():
    r = torch.tensor([1e10, 1e20, 1e30])
    for k in (0.0, 0.5, 7.0):
        assert excess(r, k).abs().max() < 1e-6


# -- Beta -------------------------------------------------------------------------------------------------------------


def test_beta_has_an_open_support():
    p = ConditionalBeta(None, 3)()
    assert p.support.check(torch.full((3,), 1e-30))
    assert not p.support.check(torch.tensor([0.5, 0.0, 0.5]))
    assert not p.support.check(torch.tensor([0.5, 1.0, 0.5]))
    assert isinstance(p.expand((2,)).base_dist, Beta)
    for transform in (biject_to(p.support), transform_to(p.support)):
        assert p.support.check(transform(torch.randn(10, 3))).all()
    uniform = dist.Uniform(0.0, 1.0)
    torch.testing.assert_close(kl_divergence(Beta(1.0, 1.0), uniform), torch.tensor(0.0))


@pytest.mark.parametrize("a", [0.01, 1.0, 1e3])
@pytest.mark.parametrize("b", [0.01, 1e3])
def test_draws_of_a_beta_are_inside(a, b):
    p = Beta(torch.tensor(a), torch.tensor(b))
    x = p.sample((20_000,))
    assert p.support.check(x).all()
    assert torch.isfinite(p.log_prob(x)).all()


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_data_on_the_edge_are_refused(end):
    x = torch.rand(20, 3) * 0.8 + 0.1
    x[7, 1] = end
    vae = VAE(StandardNormal(2), ConditionalBeta(MLP(2, [4]), 3), ConditionalNormal(MLP(3, [4]), 2))
    with pytest.raises(ValueError, match=r"1 of 20 rows lie outside the support of Beta .*OpenInterval.* row 7"):
        fit(vae.model, vae.guide, x, num_epochs=1)


# -- all of them, in a fit --------------------------------------------------------------------------------------------

LIKELIHOODS = {
    "continuous bernoulli": (lambda network: ConditionalContinuousBernoulli(network, 4), lambda: torch.rand(40, 4)),
    "negative binomial": (
        lambda network: ConditionalNegativeBinomial(network, 4),
        lambda: torch.arange(160.0).view(40, 4) % 7,
    ),
    "student t": (lambda network: ConditionalStudentT(network, 4, scale=LearnedScale()), lambda: torch.randn(40, 4)),
    "beta": (lambda network: ConditionalBeta(network, 4), lambda: 0.1 + 0.8 * torch.rand(40, 4)),
}


@pytest.mark.parametrize(("family", "rank"), [*((family, None) for family in LIKELIHOODS), ("beta", 1)])
def test_recorded_and_run_they_give_the_same_floats(family, rank):
    make, data = LIKELIHOODS[family]
    x = data()
    network = MLP(4, [8])
    posterior = (
        ConditionalNormal(network, 2) if rank is None else ConditionalLowRankMultivariateNormal(network, 2, rank=rank)
    )
    vae = VAE(StandardNormal(2), make(MLP(2, [8])), posterior)
    compiled = CompiledELBO(Trace_ELBO(), backend="eager")
    for seed in range(4):
        results = []
        for elbo in (Trace_ELBO(), compiled):
            pyro.set_rng_seed(seed)
            vae.zero_grad()
            loss = elbo.loss_and_grads(vae.model, vae.guide, x)
            results.append((loss, [p.grad.clone() for p in vae.parameters()]))
        assert results[0][0] == results[1][0]
        for a, b in zip(results[0][1], results[1][1], strict=True):
            torch.testing.assert_close(a, b)
    assert compiled.plans
