"""Every estimator of evidence against exact truths: benchmarks/evidence_truths.py in small, and its parts."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from evidence_truths import ESTIMATORS, TRUTHS, run
from truths import LinearGaussian

from pyro_vae import (
    adaptive_importance_sampling,
    annealed_importance_sampling,
    importance_sampling,
    simulate,
)
from pyro_vae.evidence.adaptive import fit_gaussians
from pyro_vae.evidence.density import LatentDensity
from pyro_vae.particles.sampler import ParticleSampler

DISCRETE = ("Bernoulli mixture", "Bernoulli mixture, enumerated")
NEAR = ESTIMATORS | {  # enough temperatures for guides that are as near as these
    "annealed": lambda *a, **k: annealed_importance_sampling(*a, num_particles=100, num_temperatures=20, **k)
}
CONTINUOUS = [name for name in TRUTHS if name not in DISCRETE]


@pytest.mark.parametrize("name", TRUTHS)
def test_battery_of_truths(name):
    estimators = ["prior", "importance", "importance, jackknife", "importance, defensive", "adaptive", "annealed"]
    for estimator in estimators if name in CONTINUOUS else estimators[:3]:
        cell = run(TRUTHS[name](), NEAR[estimator], num_points=4, num_seeds=10)
        if not cell.trusted.any():
            assert estimator == "prior"
            continue
        assert cell.largest < 5, estimator
        assert cell.coverage > 0.8, estimator  # of 40
        mean, error = cell.bias
        assert mean < 5 * error + 1e-4, estimator  # a lower bound, or nearly


@pytest.mark.parametrize("name", CONTINUOUS)
def test_upper_bounds_lie_above(name):
    for estimator in ("importance", "adaptive", "annealed"):
        mean, error = run(TRUTHS[name](), NEAR[estimator], num_points=40, num_seeds=1, upper=True).bias
        assert mean > -5 * error - 1e-4, estimator


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("estimator", [importance_sampling, adaptive_importance_sampling, annealed_importance_sampling])
def test_weights_have_the_expectation_that_makes_a_bound(estimator, exact):
    """E p̂(x) = p(x) for draws, E 1/p̂(x) = 1/p(x) for those around an exact one: few particles, many seeds, no bias."""
    truth = LinearGaussian(2, 3)
    simulation = simulate(truth.model, lambda x: truth.guide(x, 1.3), torch.zeros(4000, 3))
    options = {"exact_draw": simulation.latents} if exact else {}
    if estimator is annealed_importance_sampling:
        options |= {"num_temperatures": 3, "num_leapfrog": 2}
    x = simulation.args[0]
    evidence = estimator(truth.model, lambda x: truth.guide(x, 1.3), x, num_particles=2, **options)
    error = evidence.log_evidence - truth.log_evidence(x)
    ratio = (-error if exact else error).exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(len(x))
    assert ratio.std() < 5  # or the line above says nothing
    assert (error.mean() > 0) == exact
    assert evidence.bound.startswith("upper" if exact else "lower")


@pytest.mark.parametrize("schedule", ["linear", "sigmoid", "adaptive"])
@pytest.mark.parametrize("start", ["guide", "prior", "adapted"])
def test_annealing_from_any_start_on_any_schedule(start, schedule, device):
    truth = LinearGaussian(3, 5, device=device)
    x = truth.sample(20)
    options = {"start": start, "schedule": schedule, "num_particles": 64, "num_temperatures": 25}
    evidence = annealed_importance_sampling(truth.model, lambda x: truth.guide(x, 2.0), x, **options)
    z = (evidence.log_evidence - truth.log_evidence(x)) / (evidence.standard_error + 1e-4)
    assert z.abs().max() < 5
    assert evidence.standard_error.max() < 0.2


def test_more_temperatures_are_better():
    truth = LinearGaussian(8, 12, noise=0.3)
    x = truth.sample(10)
    few, many = (
        annealed_importance_sampling(truth.model, truth.guide, x, start="prior", num_particles=8, num_temperatures=t)
        for t in (5, 100)
    )
    exact = truth.log_evidence(x)
    assert (few.log_evidence - exact).mean() < -20
    assert -3 < (many.log_evidence - exact).mean() < 0.5


def test_adaptation_mends_a_guide_that_is_far_off(device):
    """A guide that is displaced by two standard deviations, and half as wide."""
    truth = LinearGaussian(5, 8, device=device)
    x = truth.sample(30)

    def guide(x):
        posterior = truth.posterior(x, 0.5)
        with pyro.plate("data", len(x)):
            shift = 2 * truth.covariance.diagonal().sqrt().to(x)
            pyro.sample("z", dist.MultivariateNormal(posterior.loc + shift, scale_tril=posterior.scale_tril))

    plain = importance_sampling(truth.model, guide, x, num_particles=5000)
    adapted = adaptive_importance_sampling(truth.model, guide, x, num_particles=3000)
    exact = truth.log_evidence(x)
    assert plain.doubtful.all()
    assert not adapted.doubtful.any()
    assert (adapted.effective_sample_size > 1500).all()
    assert ((adapted.log_evidence - exact).abs() < 5 * adapted.standard_error).all()


def test_the_fitted_gaussian_of_a_linear_model_is_its_posterior():
    truth = LinearGaussian(4, 6, dtype=torch.float64)
    x = truth.sample(5)
    with pyro.poutine.block():
        sampler = ParticleSampler(truth.model, lambda x: truth.guide(x, 3.0), (x,))
        fitted = fit_gaussians(LatentDensity(sampler, slice(0, 5)), num_steps=30)
    covariance = fitted.scale_tril @ fitted.scale_tril.mT
    torch.testing.assert_close(fitted.loc, truth.posterior(x).loc, atol=1e-6, rtol=0)
    torch.testing.assert_close(covariance, truth.covariance.expand(5, 4, 4), atol=1e-6, rtol=0)


def bounded(x):
    """Latents of several supports, one of which depends on another, with an inner plate."""
    with pyro.plate("rows", len(x), dim=-2):
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        b = pyro.sample("b", dist.Uniform(torch.zeros(()), a))
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("columns", x.shape[1], dim=-1):
            c = pyro.sample("c", dist.LogNormal(b, 1.0))
            pyro.sample("x", dist.Normal(c * a + w[..., 0], 1.0), obs=x)


def bounded_guide(x):
    with pyro.plate("rows", len(x), dim=-2):
        a = pyro.sample("a", dist.LogNormal(torch.zeros(len(x), 1), 0.5))
        pyro.sample("b", dist.Uniform(torch.zeros(()), a))
        pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("columns", x.shape[1], dim=-1):
            pyro.sample("c", dist.LogNormal(torch.zeros(()), 1.2))


def test_latents_of_any_support():
    x = torch.randn(7, 2) + 1
    sampler = ParticleSampler(bounded, bounded_guide, (x,), plate="rows")
    density = LatentDensity(sampler, slice(2, 5))
    assert density.dim == 1 + 1 + 2 + 2
    particles = sampler.draw(4, slice(2, 5))
    u = density.unconstrain(particles.latents)
    assert u.shape == (4, 3, 6)
    prior, likelihood, posterior = density.log_all(u)
    torch.testing.assert_close(prior + likelihood - posterior, particles.log_weight, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(likelihood, particles.log_likelihood, atol=1e-3, rtol=1e-4)
    reference = importance_sampling(bounded, bounded_guide, x, num_particles=30_000, plate="rows")
    for estimator in (adaptive_importance_sampling, annealed_importance_sampling):
        options = {"num_temperatures": 25} if estimator is annealed_importance_sampling else {}
        evidence = estimator(bounded, bounded_guide, x, plate="rows", num_particles=300, **options)
        error = (evidence.standard_error.square() + reference.standard_error.square()).sqrt()
        assert ((evidence.log_evidence - reference.log_evidence).abs() < 5 * error).all()


def test_masked_latents_are_left_out_of_every_density():
    """A latent that some rows do not have: masked in model and guide alike."""
    has = torch.tensor([True, False, True, False])

    def model(x, has):
        with pyro.plate("data", len(x)):
            with pyro.poutine.mask(mask=has):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(torch.where(has, z, 0.0), 1.0), obs=x)

    def guide(x, has):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=has):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    x = torch.randn(4)
    sampler = ParticleSampler(model, guide, (x, has))
    particles, density = sampler.draw(5), LatentDensity(sampler)
    prior, likelihood, posterior = density.log_all(density.unconstrain(particles.latents))
    torch.testing.assert_close(posterior, particles.log_posterior)
    torch.testing.assert_close(prior + likelihood, particles.log_prior + particles.log_likelihood)
    with pytest.raises(ValueError, match=r"latent sites \['z'\] are masked.*Try importance_sampling"):
        adaptive_importance_sampling(model, guide, x, has)
    exact = dist.Normal(0.0, torch.where(has, math.sqrt(2.0), 1.0)).log_prob(x)
    for estimator in (importance_sampling, annealed_importance_sampling):
        options = {"num_temperatures": 50} if estimator is annealed_importance_sampling else {}
        evidence = estimator(model, guide, x, has, **options)
        assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error + 1e-5).all()


def test_the_density_of_unconstrained_latents_integrates_to_one():
    """log p(u) has the Jacobian of the transform: a Gamma and a uniform below it, on a grid."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(2.0, 1.0))
            pyro.sample("b", dist.Uniform(torch.zeros(()), a))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    density = LatentDensity(ParticleSampler(model, pyro.poutine.block(model, hide=["x"]), (torch.zeros(1),)))
    axis = torch.linspace(-12, 12, 241)
    u = torch.cartesian_prod(axis, axis).unsqueeze(1)
    prior, _ = density.log_joint(u)
    assert (prior.double().logsumexp(0) + 2 * math.log(0.1)).exp().item() == pytest.approx(1.0, abs=1e-3)


# -- one row and all others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [adaptive_importance_sampling, annealed_importance_sampling])
def test_any_chunk_size_gives_the_same_answer_and_a_seed_repeats(estimator):
    truth = LinearGaussian(2, 3)
    x = truth.sample(7)
    runs = []
    options = {"num_temperatures": 4, "num_leapfrog": 3} if estimator is annealed_importance_sampling else {}
    for chunk_size in (None, None, 64, 15):
        pyro.set_rng_seed(0)
        guide = lambda x: truth.guide(x, 1.5)  # noqa: E731
        runs.append(estimator(truth.model, guide, x, num_particles=40, chunk_size=chunk_size, **options))
    assert runs[0].log_evidence.equal(runs[1].log_evidence)
    for evidence in runs:
        assert ((evidence.log_evidence - truth.log_evidence(x)).abs() < 6 * evidence.standard_error + 1e-3).all()


def test_a_plate_that_subsamples_data_of_its_own():
    data = torch.randn(10)

    def model():
        with pyro.plate("data", 10, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

    def guide():
        with pyro.plate("data", 10, subsample_size=4) as index:
            pyro.sample("z", dist.Normal(data[index] / 2, 0.8))

    exact = dist.Normal(0.0, math.sqrt(2.0)).log_prob(data)
    for estimator in (adaptive_importance_sampling, annealed_importance_sampling):
        options = {"num_temperatures": 30} if estimator is annealed_importance_sampling else {}
        evidence = estimator(model, guide, **options)
        assert evidence.log_evidence.shape == (10,)
        assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error).all()
