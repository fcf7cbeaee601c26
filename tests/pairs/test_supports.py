"""Draws outside of the prior's support weigh nothing, in every estimator, and are counted."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae import (
    adaptive_importance_sampling,
    annealed_importance_sampling,
    draw_particles,
    importance_sampling,
    prior_sampling,
)
from pyro_vae.pairs.supports import inside_support, support_of

X = torch.tensor([0.1, 0.5, 1.0])
QUIET = {"progress": False}
ESTIMATORS = {
    "prior": lambda *a: prior_sampling(*a, num_particles=50_000, **QUIET),
    "plain": lambda *a: importance_sampling(*a, num_particles=50_000, **QUIET),
    "defensive": lambda *a: importance_sampling(*a, num_particles=50_000, defensive=0.3, **QUIET),
    "adaptive": lambda *a: adaptive_importance_sampling(*a, num_particles=20_000, **QUIET),
    "annealed": lambda *a: annealed_importance_sampling(*a, num_particles=1000, num_temperatures=15, **QUIET),
}
PRIORS = {
    "Uniform": (dist.Uniform(0.0, 1.0), 0.0, 1.0),
    "Exponential": (dist.Exponential(1.0), 0.0, 20.0),
    "Weibull": (dist.Weibull(1.0, 2.0), 0.0, 20.0),
    "Beta": (dist.Beta(2.0, 3.0), 0.0, 1.0),
    "Gamma": (dist.Gamma(2.0, 2.0), 0.0, 20.0),
    "LogNormal": (dist.LogNormal(0.0, 0.7), 0.0, 20.0),
    "Pareto": (dist.Pareto(0.3, 2.0), 0.3, 200.0),
    "VonMises": (dist.VonMises(0.5, 2.0), -math.pi, math.pi),
    "mixture": (
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Gamma(torch.tensor([2.0, 6.0]), 3.0)),
        0.0,
        20.0,
    ),
}


def pair(prior):
    """A guide whose draws may lie anywhere on the real line."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 0.4), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.6, 0.6).expand([len(x)]))

    return model, guide


def quadrature(prior, low, high):
    z = torch.linspace(low, high, 400_001, dtype=torch.float64)[1:-1]
    log_joint = prior.log_prob(z) + dist.Normal(z, 0.4).log_prob(X.double().unsqueeze(1))
    return log_joint.logsumexp(1) + math.log((high - low) / 400_000)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", PRIORS)
def test_evidence_under_priors_of_any_support(name, estimator):
    prior, low, high = PRIORS[name]
    evidence = ESTIMATORS[estimator](*pair(prior), X)
    error = (evidence.log_evidence - quadrature(prior, low, high)).abs()
    assert (error < 5 * evidence.standard_error + 1e-4).all(), (error, evidence.standard_error)


def test_weights_outside_are_zero_and_counted():
    model, guide = pair(dist.Gamma(2.0, 2.0))
    particles = draw_particles(model, guide, X, num_particles=1000)
    outside = particles.latents["z"] <= 0
    assert 100 < outside.sum() < 1500
    assert torch.equal(particles.log_weight.isneginf(), outside)
    assert torch.equal(particles.log_prior.isneginf(), outside)
    assert not particles.log_weight.isnan().any()
    pyro.set_rng_seed(0)
    evidence = importance_sampling(model, guide, X, num_particles=1000, progress=False)
    assert ((evidence.num_zero > 100) & (evidence.num_zero < 250)).all()
    assert "of all, at 3 points: draws outside the prior's support" in repr(evidence)
    inside = importance_sampling(*pair(dist.Normal(0.0, 1.0)), X, num_particles=1000, progress=False)
    assert not inside.num_zero.any()
    assert "zero weights" not in repr(inside)


def test_a_likelihood_that_is_nothing_outside_gives_no_nan():
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Normal(1.0, 1.0).expand([len(x)]))

    x = torch.tensor([0.0, 1.0, 3.0])
    evidence = importance_sampling(model, guide, x, num_particles=100_000, progress=False)
    exact = dist.GammaPoisson(2.0, 2.0).log_prob(x)
    assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error).all()


def test_a_guide_with_a_smaller_support_than_the_prior():
    """LogNormal where the prior is Normal: log q is −∞ below zero, where other components of the mixture draw."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.4), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.0, 0.5).expand([len(x)]))

    for name in ("defensive", "adaptive"):
        evidence = ESTIMATORS[name](model, guide, X)
        exact = dist.Normal(0.0, 1.16**0.5).log_prob(X)
        assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error).all(), name


SHAPES = [
    dist.Dirichlet(torch.ones(200)),
    dist.LKJCholesky(12, 1.0),
    dist.ProjectedNormal(torch.ones(30)),
    dist.Uniform(torch.zeros(5), 1.0).to_event(1),
    dist.Beta(0.1 * torch.ones(5), 0.1).to_event(1),
    dist.VonMises(3.0, 0.1).expand([4]).to_event(1),
    dist.Gamma(2.0, 1.0).mask(torch.tensor(True)),
]


@pytest.mark.parametrize("fn", SHAPES, ids=lambda fn: type(fn).__name__)
def test_a_distributions_own_draws_lie_inside(fn):
    """In float32 too, where sums and norms are not exactly one."""
    inside = inside_support(fn, fn.sample((2000,)))
    assert inside.shape == (2000, *fn.batch_shape)
    assert inside.all()


def test_angles_are_an_interval():
    assert support_of(dist.VonMises(0.0, 1.0)).upper_bound == math.pi
    assert inside_support(dist.VonMises(0.0, 1.0), torch.tensor([3.0, 3.5])).tolist() == [True, False]


def test_supports_without_a_bijection_are_refused_by_name():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ProjectedNormal(torch.ones(3)))
            pyro.sample("x", dist.Normal(z[..., 0], 0.4), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.ProjectedNormal(torch.ones(len(x), 3)))

    assert importance_sampling(model, guide, X, num_particles=100, progress=False).log_evidence.isfinite().all()
    for name in ("defensive", "adaptive", "annealed"):
        with pytest.raises(ValueError, match="site 'z': ProjectedNormal cannot be mapped to unconstrained coordinates"):
            ESTIMATORS[name](model, guide, X)
