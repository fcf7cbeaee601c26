"""Every estimator of evidence against exact truths: benchmarks/evidence_truths.py in small, and its parts."""

import math

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from evidence_truths import ESTIMATORS, TRUTHS, run
from truths import LinearGaussian, small_vae

from pyro_vae import (
    adaptive_importance_sampling,
    annealed_importance_sampling,
    importance_sampling,
    sandwich,
    simulate,
)
from pyro_vae.evidence.adaptive import fit_gaussians
from pyro_vae.evidence.density import LatentDensity
from pyro_vae.evidence.log_weights import LogWeightSummary
from pyro_vae.evidence.proposals import from_guide, from_prior, mixture_weights
from pyro_vae.particles.sampler import ParticleSampler

DISCRETE = ("Bernoulli mixture", "Bernoulli mixture, enumerated")
CONTINUOUS = [name for name in TRUTHS if name not in DISCRETE]


@pytest.mark.parametrize("name", TRUTHS)
def test_battery_of_truths(name):
    estimators = ["prior", "importance", "importance, jackknife", "importance, defensive", "adaptive", "annealed"]
    for estimator in estimators if name in CONTINUOUS else estimators[:3]:
        cell = run(TRUTHS[name](), ESTIMATORS[estimator], num_points=4, num_seeds=10)
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
        mean, error = run(TRUTHS[name](), ESTIMATORS[estimator], num_points=40, num_seeds=1, upper=True).bias
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
    options = {"start": start, "schedule": schedule, "num_particles": 64, "num_temperatures": 60}
    evidence = annealed_importance_sampling(truth.model, lambda x: truth.guide(x, 2.0), x, **options)
    z = (evidence.log_evidence - truth.log_evidence(x)) / (evidence.standard_error + 1e-4)
    assert z.abs().max() < 5
    assert evidence.standard_error.max() < 0.2


def test_more_temperatures_are_better():
    truth = LinearGaussian(8, 12, noise=0.3)
    x = truth.sample(10)
    few, many = (
        annealed_importance_sampling(truth.model, truth.guide, x, start="prior", num_particles=8, num_temperatures=t)
        for t in (5, 200)
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
    reference = importance_sampling(bounded, bounded_guide, x, num_particles=100_000, plate="rows")
    for estimator in (adaptive_importance_sampling, annealed_importance_sampling):
        options = {"num_temperatures": 50} if estimator is annealed_importance_sampling else {}
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
        evidence = estimator(model, guide, x, has)
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


# -- options of importance sampling -----------------------------------------------------------------------------------


def test_jackknife_against_leaving_each_weight_out():
    for k, heavy in ((2, 1.0), (37, 0.5), (1000, 1.5)):
        log_weight = heavy * torch.randn(k, 6, dtype=torch.float64) - 700
        summary = LogWeightSummary(k, correction="jackknife")
        for chunk in log_weight.split(33):
            summary.update(chunk)
        value, error, _, _ = summary.result()
        total = log_weight.logsumexp(0) - math.log(k)
        others = ~torch.eye(k, dtype=torch.bool).unsqueeze(-1)
        left = log_weight.expand(k, k, 6).masked_fill(~others, -math.inf).logsumexp(1) - math.log(k - 1)
        torch.testing.assert_close(value, k * total - (k - 1) * left.mean(0), atol=1e-6 * k, rtol=0)
        torch.testing.assert_close(error, ((k - 1) * left.var(0, unbiased=False)).sqrt(), rtol=1e-5, atol=0)


def test_corrections_remove_the_bias():
    """K = 20 weights of a log-normal: the first-order bias is −Var(w)/2K."""
    torch.manual_seed(0)
    log_weight = 0.8 * torch.randn(20, 200_000, dtype=torch.float64) - 0.32  # E w = 1
    bias = {}
    for correction in (None, "delta", "jackknife"):
        summary = LogWeightSummary(20, correction=correction)
        summary.update(log_weight)
        value = summary.result()[0]
        bias[correction] = value.mean().item()
    assert bias[None] == pytest.approx(-(math.exp(0.64) - 1) / 40, rel=0.25)
    assert abs(bias["delta"]) < 0.35 * abs(bias[None])
    assert abs(bias["jackknife"]) < 0.25 * abs(bias[None])


@pytest.mark.parametrize("heavy", [0.5, 2.0, 6.0])
def test_smoothed_weights_are_those_of_arviz(heavy):
    torch.manual_seed(1)
    log_weight = heavy * torch.randn(2000, 5, dtype=torch.float64)
    summary = LogWeightSummary(2000, smooth=True)
    for chunk in log_weight.split(300):
        summary.update(chunk)
    value, _, _, khat = summary.result()
    if not hasattr(az, "psislw") or not az.__version__.startswith("0."):
        pytest.skip("ArviZ 1.x has psislw for log-likelihoods only")
    for i in range(5):
        smoothed, k = az.psislw(log_weight[:, i].numpy(), normalize=False)
        assert khat[i].item() == pytest.approx(float(k), abs=1e-6)
        expected = np.logaddexp.reduce(smoothed) - math.log(2000)
        assert value[i].item() == pytest.approx(expected, abs=1e-6)


def test_a_defensive_mixture_bounds_the_weights():
    """A guide far too narrow, whose weights have infinite variance; a fifth of the prior mends that."""
    truth = LinearGaussian(2, 3, noise=1.5)
    x = truth.sample(50)
    plain, defended = (
        importance_sampling(truth.model, lambda x: truth.guide(x, 0.3), x, num_particles=40_000, defensive=share)
        for share in (0.0, 0.2)
    )
    assert plain.doubtful.float().mean() > 0.9
    assert not defended.doubtful.any()
    z = (defended.log_evidence - truth.log_evidence(x)) / defended.standard_error
    assert 0.5 < z.abs().max() < 5
    with pytest.raises(ValueError, match=r"defensive: expected a share of the particles in \[0, 1\), got 1"):
        importance_sampling(truth.model, truth.guide, x, defensive=1)


@pytest.mark.parametrize("chunk", [1, 7, 50, 101])
def test_mixtures_have_fixed_counts_in_any_chunks(chunk):
    truth = LinearGaussian(2, 3)
    x = truth.sample(4)
    density = LatentDensity(ParticleSampler(truth.model, truth.guide, (x,)))

    def counting(i, proposal):
        def draw(count):
            u = proposal.draw(count)
            return u + 1000 * (i + 1)

        return type(proposal)(draw, lambda u, terms: torch.zeros(u.shape[:2]), needs_guide=True)

    counts = torch.tensor([[101 - 13, 101 - 1, 0, 101], [13, 1, 101, 0]])
    proposals = [counting(i, make(density)) for i, make in enumerate((from_guide, from_prior))]
    seen = []
    density.log_all = lambda u: (seen.append(u), torch.zeros(u.shape[:2]), torch.zeros(u.shape[:2]))[1:] * 2
    weigh = mixture_weights(density, proposals, counts)
    left = 101
    while left:
        weigh(min(chunk, left))
        left -= min(chunk, left)
    kind = torch.cat(seen)[..., 0] > 1500
    assert kind.sum(0).tolist() == counts[1].tolist()


def test_a_single_chain_or_particle_has_no_error_bar():
    """Nothing to estimate a variance from: NaN, and no warning; the exact guide gives the exact value all the same."""
    truth = LinearGaussian(2, 3)
    x = truth.sample(4)
    for estimator, options in (
        (importance_sampling, {}),
        (importance_sampling, {"defensive": 0.5}),
        (annealed_importance_sampling, {"num_temperatures": 1}),
        (annealed_importance_sampling, {"num_temperatures": 2, "schedule": "adaptive", "num_leapfrog": 1}),
    ):
        evidence = estimator(truth.model, truth.guide, x, num_particles=1, **options)
        assert evidence.standard_error.isnan().all()
        torch.testing.assert_close(evidence.log_evidence, truth.log_evidence(x), atol=1e-4, rtol=0)


def test_options_are_checked():
    truth = LinearGaussian(2, 3)
    x = truth.sample(4)
    for options, message in (
        ({"correction": "bootstrap"}, "correction: expected None, 'delta' or 'jackknife', got 'bootstrap'"),
        ({"correction": "delta", "num_particles": 1}, "needs num_particles of at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            importance_sampling(truth.model, truth.guide, x, **options)
    for options, message in (
        ({"start": "posterior"}, "start: expected one of 'guide', 'prior', 'adapted', got 'posterior'"),
        ({"schedule": "cosine"}, "schedule: expected one of 'linear', 'sigmoid', 'adaptive', got 'cosine'"),
        ({"num_temperatures": 0}, "num_temperatures: expected at least 1, got 0"),
        ({"exact_draw": {"w": x}}, r"exact_draw: expected draws of the sites \['z'\], missing \['z'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            annealed_importance_sampling(truth.model, truth.guide, x, **options)


# -- one row and all others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [importance_sampling, adaptive_importance_sampling, annealed_importance_sampling])
def test_a_row_that_is_not_finite_spreads_to_no_other(estimator):
    """Row 3 has a likelihood that is NaN wherever z > 0, row 5 one that is always zero."""
    x = torch.randn(8)
    bad, never = torch.arange(8) == 3, torch.arange(8) == 5

    def model(x, bad, never):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            trap = torch.where(bad & (z > 0), math.nan, torch.where(never, -math.inf, 0.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("trap", trap)

    def guide(x, bad, never):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    evidence = estimator(model, guide, x, bad, never)
    good = ~(bad | never)
    exact = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)
    assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error)[good].all()
    assert evidence.doubtful[~good].all()
    assert not torch.isfinite(evidence.log_evidence[5])
    assert "rows" in repr(evidence)
    assert "5" in repr(evidence).splitlines()[-1]


@pytest.mark.parametrize("estimator", [adaptive_importance_sampling, annealed_importance_sampling])
def test_any_chunk_size_gives_the_same_answer_and_a_seed_repeats(estimator):
    truth = LinearGaussian(2, 3)
    x = truth.sample(9)
    runs = []
    options = {"num_temperatures": 20} if estimator is annealed_importance_sampling else {}
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


# -- both sides -------------------------------------------------------------------------------------------------------


def test_simulated_data_come_from_the_latents():
    truth = LinearGaussian(3, 5)
    simulation = simulate(truth.model, truth.guide, torch.zeros(5000, 5))
    x, z = simulation.args[0], simulation.latents["z"]
    residual = x - z @ truth.weight.T - truth.bias
    assert residual.std().item() == pytest.approx(0.7, rel=0.02)
    assert abs(residual.mean().item()) < 0.02
    assert z.std().item() == pytest.approx(1.0, rel=0.02)
    assert simulation.args[0].shape == (5000, 5)


def test_simulation_of_an_argument_that_is_reshaped_and_one_that_is_hidden():
    vae = small_vae()
    flat = lambda x: vae.model(x.reshape(-1, 4, 4))  # noqa: E731
    guide = lambda x: vae.guide(x.reshape(-1, 4, 4))  # noqa: E731
    simulation = simulate(flat, guide, torch.zeros(50, 16))
    assert simulation.args[0].shape == (50, 16)
    assert 0 < simulation.args[0].mean() < 1
    hidden = lambda x: vae.model(1 - x)  # noqa: E731
    with pytest.raises(ValueError, match=r"site 'x': its observed value is none of the arguments.*exact_draw"):
        simulate(hidden, vae.guide, torch.zeros(50, 4, 4))


def test_a_sandwich_closes_around_the_truth():
    truth = LinearGaussian(3, 5)
    for estimator in (importance_sampling, adaptive_importance_sampling, annealed_importance_sampling):
        result = sandwich(truth.model, lambda x: truth.guide(x, 1.5), torch.zeros(200, 5), estimator=estimator)
        gap, error = result.mean
        assert -4 * error < gap < 0.05 + 4 * error
        assert result.lower.bound.startswith("lower")
        assert result.upper.bound.startswith("upper")
        assert f"mean {gap:.3f}" in repr(result)
    narrow = sandwich(truth.model, lambda x: truth.guide(x, 0.3), torch.zeros(200, 5), estimator=importance_sampling)
    assert narrow.mean[0] > 0.05 > 5 * error
