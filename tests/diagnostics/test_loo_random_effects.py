"""Counts with an effect of each data point: log p(y_n|θ) and leave-one-out against quadrature and exact refits."""

from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_vae import draw_posterior, fit, integrated_log_likelihood
from pyro_vae.diagnostics import leave_one_out, log_predictive

N = 40
PRIOR_A, PRIOR_S = dist.Normal(0.0, 3.0), dist.LogNormal(-0.5, 0.5)


def model(y):
    a, s = pyro.sample("a", PRIOR_A), pyro.sample("s", PRIOR_S)
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(a, s))
        pyro.sample("y", dist.Poisson(z.exp()), obs=y)


def counts():
    generator = torch.Generator().manual_seed(0)
    return torch.poisson((2.5 + 0.8 * torch.randn(N, generator=generator)).exp(), generator=generator)


def log_p_given(y, a, s):
    """log p(y_n|a, s) by the trapezium rule over (z_n − a) / s, (*a and s, N)."""
    u = torch.linspace(-8, 8, 321).double()
    z = a.double()[..., None, None] + s.double()[..., None, None] * u
    terms = dist.Poisson(z.exp()).log_prob(y.double()[:, None]) + dist.Normal(0.0, 1.0).log_prob(u)
    return terms.logsumexp(-1) + log(u[1] - u[0])


def refits(y):
    """log p(y_n|y_−n), of a posterior on a grid that has not seen y_n."""
    a, s = torch.meshgrid(torch.linspace(1.5, 3.5, 41), torch.linspace(0.2, 2.0, 41), indexing="ij")
    log_p = torch.cat([log_p_given(y, *row) for row in zip(a, s, strict=True)])  # (grid, N)
    prior = (PRIOR_A.log_prob(a) + PRIOR_S.log_prob(s)).double().flatten()
    others = (prior + log_p.sum(1))[:, None] - log_p
    assert (others.exp()[[0, -1]] / others.exp().amax(0) < 1e-6).all()  # the grid ends where nothing is left
    return (others + log_p).logsumexp(0) - others.logsumexp(0)


@pytest.fixture(scope="module")
def fitted():
    y, guide = counts(), AutoNormal(model)
    pyro.set_rng_seed(0)
    fit(model, guide, y, num_epochs=300, learning_rate=0.05, seed=0, compile=False, progress=False)
    draws = draw_posterior(model, guide, y, num_samples=1000, seed=0, progress=False)
    settings = {"num_samples": 1000, "adaptive": True, "seed": 0, "progress": False}
    log_p = integrated_log_likelihood(model, guide, y, draws={name: draws[name] for name in "as"}, **settings)
    return y, guide, draws, log_p, refits(y)


@pytest.mark.parametrize("adaptive", [True, False])
def test_integrated_log_likelihood_is_that_of_quadrature(fitted, adaptive):
    y, guide, *_ = fitted
    settings = {"num_samples": 50, "num_particles": 2000, "adaptive": adaptive, "seed": 1, "progress": False}
    log_p = integrated_log_likelihood(model, guide, y, **settings)
    exact = log_p_given(y, log_p.globals["a"], log_p.globals["s"])
    error = (log_p - exact) / log_p.standard_error
    assert error.abs().max() < 5
    assert 0.5 < error.square().mean().sqrt() < 1.1
    assert log_p.standard_error.median() < 0.02


def test_leave_one_out_is_that_of_refits_and_not_on_conditional_terms(fitted):
    y, _, draws, log_p, exact = fitted
    some = slice(0, 20)
    loo = leave_one_out(log_p)
    resampled = 1 + len(log_p) / draws.effective_sample_size  # the draws are not independent: they were resampled
    noise = (resampled * loo.pointwise_error.square() + log_p.standard_error.square().mean(0) / len(log_p)).sqrt()
    error = (loo.pointwise - exact) / noise
    assert error[some].abs().max() < 5
    assert error.square().mean().sqrt() < 1.5
    assert abs(loo.elpd - exact.sum()) < 5 * loo.monte_carlo_error
    assert not loo.doubtful.any()
    assert 1 < loo.p_loo < 4  # of two global latents

    conditional = leave_one_out(dist.Poisson(draws["z"].exp()).log_prob(y))
    error = (conditional.pointwise - exact) / conditional.pointwise_error
    assert error[some].abs().max() > 5
    assert conditional.doubtful.double().mean() > 0.4
    assert conditional.elpd > exact.sum() + 10
    assert conditional.p_loo > N / 2


def proposal(y):
    """For new data, which the fitted guide has no parameters for."""
    a, s = pyro.sample("a", PRIOR_A), pyro.sample("s", PRIOR_S)
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(((y + 0.5).log() + a) / 2, s + 0.1))


def test_a_refit_by_the_package_predicts_what_leave_one_out_says(fitted):
    y, *_, exact = fitted
    for n in (0, int(y.argmax())):
        others, left, guide = torch.cat([y[:n], y[n + 1 :]]), y[n : n + 1], AutoNormal(model)
        draws = draw_posterior(model, guide, others, num_samples=1000, seed=0, progress=False)
        draws = {name: draws[name] for name in "as"}
        new = integrated_log_likelihood(model, proposal, left, draws=draws, num_particles=1000, seed=0, progress=False)
        found = log_predictive(new)
        assert abs(found.log_evidence - exact[n]) < 5 * found.standard_error
        assert found.standard_error < 0.1
