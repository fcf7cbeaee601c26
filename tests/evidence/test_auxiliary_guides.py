"""Guides over auxiliary variables with their log-determinant have the numbers of the same guides without."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import block_autoregressive, planar
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch.distributions import biject_to, constraints

from pyro_vae import (
    adaptive_importance_sampling,
    annealed_importance_sampling,
    draw_particles,
    draw_posterior,
    importance_sampling,
    sandwich,
    simulate,
)
from pyro_vae.diagnostics import inference_gaps
from pyro_vae.evidence.density import LatentDensity
from pyro_vae.particles.sampler import ParticleSampler

X = torch.tensor([0.0, 1.0, 3.0, 7.0, 2.0, 4.0])
QUIET = {"progress": False, "seed": 0}


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(z), obs=x)


def plain(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.LogNormal((x + 1).log() - 0.5, 0.7))


def by_hand(x):
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal((x + 1).log() - 0.5, 0.7), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u.exp(), log_density=-u))


EXACT = torch.lgamma(X + 2) - torch.lgamma(X + 1) - (X + 2) * math.log(2)  # negative binomial


def exact_draws():
    return {"z": dist.Gamma(X + 2, 2.0).sample()}


def values(tool):
    found = tool()
    return [found.log_evidence, found.standard_error, found.effective_sample_size]


@pytest.mark.parametrize(
    "tool",
    [
        lambda q: values(lambda: importance_sampling(model, q, X, num_particles=500, **QUIET)),
        lambda q: values(lambda: importance_sampling(model, q, X, num_particles=500, defensive=0.3, **QUIET)),
        lambda q: values(
            lambda: importance_sampling(model, q, X, num_particles=500, exact_draw=exact_draws(), **QUIET)
        ),
        lambda q: values(
            lambda: annealed_importance_sampling(model, q, X, num_particles=8, num_temperatures=20, **QUIET)
        ),
        lambda q: [sandwich(model, q, X, estimator=importance_sampling, num_particles=500, **QUIET).gap],
        lambda q: [draw_particles(model, q, X, num_particles=20, seed=0).log_weight],
    ],
    ids=["importance sampling", "defensive", "upper bound", "annealing", "sandwich", "particles"],
)
def test_the_same_numbers_as_without_auxiliary_sites(tool):
    found = []
    for q in (plain, by_hand):
        pyro.set_rng_seed(1)
        found.append(tool(q))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_adaptive_mixtures_have_the_guide_as_a_component():
    """The look for it takes random numbers from nobody: the same estimates, digit by digit but for rounding."""
    found = [adaptive_importance_sampling(model, q, X, num_particles=500, **QUIET) for q in (plain, by_hand)]
    torch.testing.assert_close(found[0].log_evidence, found[1].log_evidence, rtol=1e-3, atol=1e-3)
    assert ((found[1].log_evidence - EXACT).abs() < 5 * found[1].standard_error).all()
    draws = draw_posterior(model, by_hand, X, num_samples=2000, seed=0)["z"]
    exact = dist.Gamma(X + 2, 2.0)
    assert ((draws.mean(0) - exact.mean).abs() < 5 * exact.stddev / 2000**0.5).all()


def two(x):
    """A rate and a probability vector for each row, and a latent without an image."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        w = pyro.sample("w", dist.Normal(z, 1.0))
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(z + w + p[..., 0], 1.0), obs=x)


def one_vector(x):
    """v = (two of p, one of z), in another order than the model's, of full covariance."""
    tril = torch.tensor([[0.5, 0.0, 0.0], [0.2, 0.6, 0.0], [-0.1, 0.3, 0.4]])
    with pyro.plate("data", len(x)):
        loc = torch.stack([0.1 * x, 0 * x, 0 * x + 0.3], -1)
        v = pyro.sample("v", dist.MultivariateNormal(loc, scale_tril=tril), infer={"is_auxiliary": True})
        to_p, to_z = biject_to(constraints.simplex), biject_to(constraints.positive)
        p, z = to_p(v[..., :2]), to_z(v[..., 2])
        pyro.sample("p", dist.Delta(p, log_density=-to_p.log_abs_det_jacobian(v[..., :2], p), event_dim=1))
        z = pyro.sample("z", dist.Delta(z, log_density=-to_z.log_abs_det_jacobian(v[..., 2], z)))
        pyro.sample("w", dist.Normal(z + 0.1 * x, 0.8))


@pytest.mark.parametrize("parallel", [True, False])
def test_one_vector_for_several_latents(parallel):
    """log q of the guide's own draws, which it knows without inverting anything."""
    sampler = ParticleSampler(two, one_vector, (X,), parallel=parallel)
    for rows in (None, slice(1, 4)):
        particles = sampler.draw(7, rows)
        density = LatentDensity(sampler, rows)
        assert density.knows_guide
        prior, likelihood, posterior = density.log_all(density.unconstrain(particles.latents))
        torch.testing.assert_close(
            prior + likelihood - posterior, particles.log_weight, rtol=1e-4, atol=1e-3, check_stride=False
        )


@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_autoguides_over_all_data(make):
    """plate=None: all latents of all rows at once."""
    x = torch.tensor([1.0, 4.0, 2.0])
    guide = make(two)
    guide(x)
    for p in guide.parameters():
        p.data.add_(0.1 * torch.rand_like(p))
    sampler = ParticleSampler(two, guide, (x,), plate=None)
    particles = sampler.draw(5)
    density = LatentDensity(sampler)
    assert density.knows_guide
    prior, likelihood, posterior = density.log_all(density.unconstrain(particles.latents))
    torch.testing.assert_close(prior + likelihood - posterior, particles.log_weight, rtol=1e-4, atol=1e-3)
    latents = {
        name: value[0] for name, value in draw_particles(two, guide, x, num_particles=1, plate=None).latents.items()
    }
    evidence = importance_sampling(two, guide, x, num_particles=50, plate=None, exact_draw=latents, **QUIET)
    assert evidence.log_evidence.isfinite().all()


def test_what_is_no_coordinate_stays_unknown():
    def shifted(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 0.7).expand([len(x)]), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta((u + x.log1p()).exp(), log_density=-u - x.log1p()))

    def softplus(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x, 0.7), infer={"is_auxiliary": True})
            z = torch.nn.functional.softplus(u)
            pyro.sample("z", dist.Delta(z, log_density=-torch.nn.functional.logsigmoid(u)))

    def clamped(x, bound=12.0):  # a bijection where its draws are, and not farther out
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x.log1p(), 0.7), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.clamp(max=bound).exp(), log_density=-u))

    def near(x):
        return clamped(x, 4.0)

    for q in (shifted, softplus, near):
        density = LatentDensity(ParticleSampler(model, q, (X,)))
        assert not density.knows_guide
        with pytest.raises(ValueError, match=r"the guide draws \['u'\], which are no latents"):
            density.log_all(density.draw(2))
        evidence = adaptive_importance_sampling(model, q, X, num_particles=500, **QUIET)  # without it
        assert ((evidence.log_evidence - EXACT).abs() < 5 * evidence.standard_error).all()
    density = LatentDensity(ParticleSampler(model, clamped, (X,)))
    assert density.knows_guide
    with pytest.raises(ValueError, match=r"site 'z' of the guide is a point .* at some values and not at others"):
        density.log_all(torch.full((2, len(X), 1), 13.0))


def test_a_wrong_log_determinant_is_refused_by_name():
    def wrong(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x.log1p(), 0.7), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp(), log_density=torch.zeros_like(u)))

    with pytest.raises(ValueError, match=r"sites \['z'\] of the guide are points"):
        sandwich(model, wrong, X, estimator=importance_sampling, **QUIET)


def test_upper_bounds_are_above():
    """On simulated data, with the guide's density at the exact draws: a wrong sign would show."""
    simulation = simulate(model, by_hand, torch.zeros(400), seed=0)
    x = simulation.args[0]
    exact = torch.lgamma(x + 2) - torch.lgamma(x + 1) - (x + 2) * math.log(2)
    lower = importance_sampling(model, by_hand, x, num_particles=10, **QUIET)
    upper = importance_sampling(model, by_hand, x, num_particles=10, exact_draw=simulation.latents, **QUIET)
    assert lower.log_evidence.mean() < exact.mean() < upper.log_evidence.mean()
    assert upper.log_evidence.mean() - lower.log_evidence.mean() < 0.2


@pytest.mark.parametrize("transform", [planar, block_autoregressive])
def test_a_flow_without_an_inverse_is_drawn_from_only(transform):
    """It scores its own draws alone: the fit starts at it, and what needs its density elsewhere says so."""
    torch.manual_seed(0)
    flow, x = transform(2), torch.randn(6, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(0.8 * x, 0.5).to_event(1), [flow]))

    exact = dist.Normal(0.0, 1.25**0.5).log_prob(x).sum(-1)
    found = adaptive_importance_sampling(model, guide, x, num_particles=1000, seed=0, progress=False)
    assert ((found.log_evidence - exact).abs() < 5 * found.standard_error + 1e-4).all()
    gaps = inference_gaps(model, guide, x, num_particles=500, seed=0, progress=False)
    assert (gaps.approximation.abs() < 5 * gaps.approximation_error + 0.01).all()
    for estimate in (
        partial(importance_sampling, defensive=0.2),
        partial(annealed_importance_sampling, num_temperatures=3),
    ):
        with pytest.raises(ValueError, match=r"sites \['z'\] of the guide are flows without an inverse.*Try adaptive"):
            estimate(model, guide, x, num_particles=10, progress=False)
