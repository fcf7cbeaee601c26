"""Gamma, Dirichlet and log-normal against 40 digits, and the conditional distributions over them."""

import copy
import math

import mpmath as mp
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import biject_to, kl_divergence

from pyro_vae import VAE, CompiledELBO, fit
from pyro_vae.distributions import (
    ConditionalDirichlet,
    ConditionalGamma,
    ConditionalLogNormal,
    ConditionalNormal,
    ConditionalTruncatedNormal,
    LearnedScale,
    StandardNormal,
)
from pyro_vae.distributions.gammas import Dirichlet, Gamma
from pyro_vae.networks import MLP

mp.mp.dps = 40
DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 2e-13}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [1e-3, 0.1, 0.7, 1.0, 3.0, 25.0, 1e3, 1e6]
CONCENTRATIONS = [[1e-2, 0.3], [1.0, 1.0, 1.0], [0.5, 30.0, 2.0], [1e5, 2e5, 3e4], [1e6, 1.0, 0.2], [1e6] * 4]


def close(tensor, exact, tolerance, scale=1.0):
    assert abs(tensor.item() - float(exact)) <= tolerance * max(scale, abs(float(exact))), (tensor.item(), float(exact))


def exactly(tensor):
    return [mp.mpf(v) for v in tensor.tolist()]


# -- Gamma ------------------------------------------------------------------------------------------------------------


def gamma_log_p(a, rate, x):
    return a * mp.log(rate) + (a - 1) * mp.log(x) - rate * x - mp.loggamma(a)


@dtypes
@pytest.mark.parametrize("concentration", SHAPES)
def test_gamma_log_prob_and_gradient(concentration, dtype):
    """At quantiles from the lowest to the highest, where the density is not too steep in the rate for the dtype."""
    theta = torch.tensor([concentration, 2.5], dtype=dtype, requires_grad=True)
    a, rate = exactly(theta)
    p, tolerance = Gamma(theta[0], theta[1]), TOLERANCE[dtype]
    for x in stats.gamma(float(a), scale=1 / float(rate)).ppf([1e-3, 0.2, 0.5, 0.9, 1 - 1e-3]):
        x = max(x, 1e-30)
        value = torch.tensor(x, dtype=dtype)
        (v,) = exactly(value[None])
        rounding = 8 * abs(float(v * rate - a)) * torch.finfo(dtype).eps  # of βx, next to which x is exact
        log_prob = p.log_prob(value)
        close(log_prob, gamma_log_p(a, rate, v), tolerance + rounding)
        (gradient,) = torch.autograd.grad(log_prob, theta)
        close(gradient[0], mp.log(rate * v) - mp.digamma(a), 10 * tolerance)
        close(gradient[1], a / rate - v, 10 * tolerance, scale=float(a / rate))


@dtypes
@pytest.mark.parametrize("concentration", SHAPES)
def test_gamma_entropy_and_kl(concentration, dtype):
    p = Gamma(torch.tensor(concentration, dtype=dtype), torch.tensor(2.5, dtype=dtype))
    (a, b), tolerance = exactly(torch.stack([p.concentration, p.rate])), TOLERANCE[dtype]
    entropy = a - mp.log(b) + mp.loggamma(a) + (1 - a) * mp.digamma(a)
    close(p.entropy(), entropy, 10 * tolerance)
    for other in (concentration * 1.01, concentration + 1.0, 0.2):
        q = Gamma(torch.tensor(other, dtype=dtype), torch.tensor(2.0, dtype=dtype))
        c, d = exactly(torch.stack([q.concentration, q.rate]))
        exact = (a - c) * mp.digamma(a) - mp.loggamma(a) + mp.loggamma(c) + c * mp.log(b / d) + a * (d - b) / b
        close(kl_divergence(p, q), exact, 20 * tolerance)
    close(kl_divergence(p, p), 0, 1e-7)


def test_torchs_gamma_loses_what_this_keeps():
    """Two nats of noise at α = 10⁶ in float32."""
    x = torch.linspace(0.999, 1.001, 50)
    exact = Gamma(torch.tensor(1e6).double(), torch.tensor(1e6).double()).log_prob(x.double())
    ours = Gamma(torch.tensor(1e6), torch.tensor(1e6)).log_prob(x)
    theirs = dist.Gamma(torch.tensor(1e6), torch.tensor(1e6)).log_prob(x)
    assert (ours - exact).abs().max() < 1e-3
    assert (theirs - exact).abs().max() > 0.1


# -- Dirichlet --------------------------------------------------------------------------------------------------------


def log_beta(a):
    return sum(map(mp.loggamma, a)) - mp.loggamma(sum(a))


@dtypes
@pytest.mark.parametrize("concentration", CONCENTRATIONS, ids=str)
def test_dirichlet_against_40_digits(concentration, dtype):
    theta = torch.tensor(concentration, dtype=dtype, requires_grad=True)
    a, tolerance = exactly(theta), TOLERANCE[dtype]
    n, p = sum(a), Dirichlet(theta)
    weights = [mp.mpf(w) for w in (3, 5, 7, 2)][: len(a)]
    for far in map(mp.mpf, (0, 1e-3, 0.3)):  # from the mean to far away
        exact_x = [(1 - far) * ai / n + far * w / sum(weights) for ai, w in zip(a, weights, strict=True)]
        value = torch.tensor([float(v) for v in exact_x], dtype=dtype)
        x = exactly(value)
        x = [v / sum(x) for v in x]
        rounding = 4 * float(sum(abs(n * v - ai) for v, ai in zip(x, a, strict=True))) * torch.finfo(dtype).eps
        log_prob = p.log_prob(value)
        exact = sum((ai - 1) * mp.log(v) for ai, v in zip(a, x, strict=True)) - log_beta(a)
        close(log_prob, exact, 5 * tolerance + rounding)
        (gradient,) = torch.autograd.grad(log_prob, theta)
        for g, ai, v in zip(gradient, a, x, strict=True):
            close(g, mp.log(v) - mp.digamma(ai) + mp.digamma(n), 20 * tolerance)
    entropy = log_beta(a) + (n - len(a)) * mp.digamma(n) - sum((ai - 1) * mp.digamma(ai) for ai in a)
    close(p.entropy(), entropy, 20 * tolerance)
    for q in (Dirichlet(theta.detach() * 1.01), Dirichlet(torch.full_like(theta.detach(), 0.7))):
        c = exactly(q.concentration)
        exact = (
            log_beta(c)
            - log_beta(a)
            + sum((ai - ci) * (mp.digamma(ai) - mp.digamma(n)) for ai, ci in zip(a, c, strict=True))
        )
        close(kl_divergence(p, q), exact, 100 * tolerance)


@dtypes
@pytest.mark.parametrize("concentration", [0.01, 1.0, 50.0])
def test_draws_of_many_proportions_are_in_the_support(concentration, dtype):
    p = Dirichlet(torch.full((1000,), concentration, dtype=dtype))
    y = p.sample((20,))
    assert p.support.check(y).all()
    assert p.log_prob(y).isfinite().all()
    assert not p.support.check(torch.full((1000,), 1.1e-3, dtype=dtype))
    transform = biject_to(p.support)
    z = transform(torch.randn(999, dtype=torch.float64))
    assert p.support.check(z)


def test_zeros_are_outside_of_the_open_supports():
    assert not Gamma(1.0, 1.0).support.check(torch.tensor(0.0))
    assert Dirichlet(torch.ones(2)).support.check(torch.tensor([[0.0, 1.0], [0.5, 0.5]])).tolist() == [False, True]


@pytest.mark.parametrize("make", [lambda a: Gamma(a[0], a[1]), lambda a: Dirichlet(a)])
def test_copies_and_changes_in_place(make):
    a = torch.tensor([2.0, 3.0])
    p = make(a)
    again = copy.deepcopy(p)
    value = p.sample()
    a.add_(1.0)
    torch.testing.assert_close(p.log_prob(value), make(a.clone()).log_prob(value))
    torch.testing.assert_close(again.log_prob(value), make(a - 1.0).log_prob(value))


# -- conditional distributions ----------------------------------------------------------------------------------------


def fixed(conditional, bias):
    """One that gives the same parameters for all inputs."""
    with torch.no_grad():
        conditional.head.weight.zero_()
        conditional.head.bias.copy_(torch.tensor(bias))
    return conditional(torch.zeros(1, 2))


def softplus(x):
    return math.log1p(math.exp(x))


def test_log_normal_is_the_normal_of_the_logarithm():
    p = fixed(ConditionalLogNormal(MLP(2, [3]), 1), [0.3, 0.2])
    scale = softplus(0.2 + math.log(math.expm1(1 - 1e-5))) + 1e-5
    truth = stats.lognorm(scale, scale=math.exp(0.3))
    for x in (1e-20, 1e-3, 0.5, 3.0, 1e10):
        assert p.log_prob(torch.tensor([[x]])).item() == pytest.approx(truth.logpdf(x), rel=1e-5)
    assert p.mean.item() == pytest.approx(truth.mean(), rel=1e-5)
    assert p.variance.item() == pytest.approx(truth.var(), rel=1e-5)
    assert p.entropy().item() == pytest.approx(truth.entropy(), rel=1e-5)
    q = fixed(ConditionalLogNormal(MLP(2, [3]), 1, scale=2.0), [1.0])
    exact = kl_divergence(dist.Normal(0.3, scale), dist.Normal(1.0, 2.0)).item()
    assert kl_divergence(p, q).item() == pytest.approx(exact, rel=1e-5)


def test_gamma_has_the_mean_of_the_network():
    p = fixed(ConditionalGamma(MLP(2, [3]), 1), [0.7, -1.0])
    shift = math.log(math.expm1(1 - 1e-5))
    mean, concentration = softplus(0.7 + shift) + 1e-5, softplus(-1.0 + shift) + 1e-5
    truth = stats.gamma(concentration, scale=mean / concentration)
    assert p.mean.item() == pytest.approx(truth.mean(), rel=1e-5)
    assert p.variance.item() == pytest.approx(truth.var(), rel=1e-5)
    for x in (1e-20, 1e-3, 0.5, 3.0, 40.0):
        assert p.log_prob(torch.tensor([[x]])).item() == pytest.approx(truth.logpdf(x), rel=1e-5)
    exponential = fixed(ConditionalGamma(MLP(2, [3]), 1, concentration=1.0), [0.7])
    assert exponential.log_prob(torch.tensor([[2.0]])).item() == pytest.approx(
        stats.expon(scale=mean).logpdf(2.0), rel=1e-5
    )


def test_dirichlet_over_rows_of_an_event():
    p = ConditionalDirichlet(MLP(2, [3]), (4, 3))(torch.randn(5, 2))
    y = p.sample()
    torch.testing.assert_close(y.sum(-1), torch.ones(5, 4))
    rows = torch.stack([Dirichlet(p.base_dist.concentration[:, i]).log_prob(y[:, i]) for i in range(4)])
    torch.testing.assert_close(p.log_prob(y), rows.sum(0))


def simulated(name, n):
    """Rows from a known decoder of one latent, as each family may have made them."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, 1, generator=generator)
    loc = z * torch.tensor([0.8, -0.6, 0.4])
    torch.manual_seed(0)
    return {
        "log-normal": lambda: dist.LogNormal(loc, 0.3),
        "gamma": lambda: dist.Gamma(5.0 * torch.ones(n, 3), 5.0 / (1.0 + loc.exp())),
        "dirichlet": lambda: dist.Dirichlet(20 * loc.softmax(-1)),
        "truncated normal": lambda: dist.Uniform(0.0, 1.0 + loc.sigmoid()),
    }[name]().sample()


@pytest.mark.parametrize(
    ("name", "likelihood"),
    [
        ("log-normal", lambda: ConditionalLogNormal(MLP(1, [8]), 3, scale=LearnedScale(3))),
        ("gamma", lambda: ConditionalGamma(MLP(1, [8]), 3, concentration=LearnedScale(3))),
        ("dirichlet", lambda: ConditionalDirichlet(MLP(1, [8]), 3)),
        ("truncated normal", lambda: ConditionalTruncatedNormal(MLP(1, [8]), 3, low=0.0)),
        ("truncated normal", lambda: ConditionalTruncatedNormal(MLP(1, [8]), 3, low=0.0, high=torch.full((3,), 2.0))),
    ],
)
def test_a_vae_learns_with_it(name, likelihood):
    """By steps of plain Pyro and by recorded ones, which end at the same weights."""
    x, losses = simulated(name, 300), []
    for compile in (False, True):
        torch.manual_seed(0)
        loss = CompiledELBO(backend="eager") if compile else None
        vae = VAE(StandardNormal(1), likelihood(), ConditionalNormal(MLP(3, [8]), 1), name=f"compile {compile}")
        options = {"num_epochs": 50, "batch_size": 100, "learning_rate": 0.04, "seed": 0, "compile": False}
        losses.append(fit(vae.model, vae.guide, x, loss=loss, **options).loss)
        assert losses[-1][-1] < losses[-1][0] - 0.2
        assert vae.decode(vae.encode(x).mean).support.check(vae.reconstruct(x)).all()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConditionalDirichlet(MLP(2, [3]), 1), "at least two proportions.*Try event_shape=2"),
        (lambda: ConditionalDirichlet(MLP(2, [3]), ()), "at least two proportions"),
        (lambda: ConditionalGamma(MLP(2, [3]), 3, concentration=-1.0), "expected a positive concentration"),
        (lambda: ConditionalTruncatedNormal(None, 3, low=1.0, high=0.0), "expected low < high.*Try to swap"),
        (
            lambda: ConditionalTruncatedNormal(None, 3, low=torch.zeros(2)),
            r"a low that broadcasts to .* \(3,\)",
        ),
        (lambda: ConditionalTruncatedNormal(None, 3, low=torch.full((3,), -math.inf)), "a tensor of finite numbers"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_weights_of_bounds_are_kept_and_cast():
    p = ConditionalTruncatedNormal(nn.Linear(2, 3), 3, low=torch.tensor([0.0, 0.1, 0.2]), scale=0.3)
    assert set(p.state_dict()) >= {"low", "scale"}
    double = copy.deepcopy(p).double()
    assert double(torch.zeros(1, 2, dtype=torch.float64)).log_prob(torch.ones(1, 3).double()).dtype == torch.float64
