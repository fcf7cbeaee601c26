"""A refined guide belongs to its rows, whatever selection of them it meets, and is a plain guide for all tools."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from truths import LinearGaussian
from truths.hierarchical import RandomEffects

from pyro_vae import VAE, draw_particles, draw_posterior, from_pyro_svi, importance_sampling, impute
from pyro_vae.compiled import CompiledELBO
from pyro_vae.distributions import ConditionalNormal, ObservedPart, StandardNormal
from pyro_vae.evidence import refine
from pyro_vae.networks import MLP, MaskedInput
from pyro_vae.particles.simulation import simulate


@pytest.fixture
def pair():
    truth = LinearGaussian(3, 4)
    return truth, lambda x: truth.guide(x, widen=1.5), truth.sample(30)


# -- whose rows it is for ---------------------------------------------------------------------------------------------


def test_any_selection_of_its_rows_is_found(pair):
    truth, guide, x = pair
    x = torch.cat([x, x[3:5]])  # twins
    refined = refine(truth.model, guide, x, seed=0, progress=False)
    for rows in (slice(None), [3], [7, 1, 1, 30, 4], slice(20, 32)):
        particles = draw_particles(truth.model, refined, x[rows], num_particles=2)
        assert (particles.log_weight - truth.log_evidence(x[rows])).abs().max() < 1e-3
    evidence = importance_sampling(truth.model, refined, x, num_particles=20, chunk_size=40, progress=False)
    assert (evidence.log_evidence - truth.log_evidence(x)).abs().max() < 1e-3


def test_other_rows_are_refused(pair):
    truth, guide, x = pair
    refined = refine(truth.model, guide, x, seed=0, progress=False)
    for other, reason in (
        (x + 1, "30 of 30 rows are none of them, the first at row 0"),
        (torch.cat([x, x[:1] + 1e-5]), "1 of 31 rows are none of them, the first at row 30"),
        (x.double(), r"argument 0: expected rows of \(4,\), torch.float32, got \(30, 4\), torch.float64"),
        (x[:, :2], r"got \(30, 2\)"),
    ):
        with pytest.raises(ValueError, match=f"RefinedGuide: it belongs to the 30 data points.*{reason}.*Try refine"):
            refined(other)


def test_arguments_without_rows_are_part_of_it(pair):
    x = pair[2][:, 0]

    def model(x, noise, name="a"):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    def own(x, noise, name="a"):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    refined = refine(model, own, x, torch.tensor(0.5), name="b", seed=0, progress=False)
    refined(x[2:4], torch.tensor(0.5), name="b")
    with pytest.raises(ValueError, match="argument 1 has another value"):
        refined(x, torch.tensor(0.6), name="b")
    with pytest.raises(ValueError, match="argument 'name' has another value"):
        refined(x, torch.tensor(0.5), name="c")


def test_rows_that_cannot_be_told_apart_run_together():
    """A guide with parameters for each row: no arguments can be cut, and all rows pass in chunks of particles."""
    x = torch.linspace(-2, 2, 9)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    refined = refine(model, AutoNormal(model), x, seed=0, progress=False)
    assert (refined.loc[:, 0] - x / 2).abs().max() < 1e-3  # started ten standard deviations away
    evidence = importance_sampling(model, refined, x, num_particles=30, chunk_size=50, progress=False)
    assert (evidence.log_evidence - dist.Normal(0.0, 2**0.5).log_prob(x)).abs().max() < 1e-3
    with pytest.raises(ValueError, match="argument 0 has another value"):
        refined(x[:5])


def test_missing_values_are_values_of_rows():
    torch.manual_seed(0)
    likelihood = ObservedPart(ConditionalNormal(MLP(1, []), 3, scale=1.0))
    vae = VAE(StandardNormal(1), likelihood, ConditionalNormal(MaskedInput(MLP(6, [])), 1))
    x = torch.randn(20, 3)
    x[torch.rand(20, 3) < 0.3] = torch.nan
    refined = refine(vae.model, vae.guide, x, seed=0, progress=False)
    evidence = importance_sampling(vae.model, refined, x, num_particles=20, progress=False)
    assert evidence.effective_sample_size.min() > 19.9  # a linear decoder: the posterior is a Gaussian
    complete = impute(vae.model, refined, x, num_draws=3)["x"]
    assert not complete.isnan().any()
    assert torch.equal(complete[0][~x.isnan()], x[~x.isnan()])


# -- what takes it ----------------------------------------------------------------------------------------------------


def test_it_is_a_plain_guide(pair):
    truth, guide, x = pair
    refined = refine(truth.model, guide, x, seed=0, progress=False)
    expected = -truth.log_evidence(x).sum().item()
    assert abs(Trace_ELBO().loss(truth.model, refined, x) - expected) < 1e-3 * abs(expected)
    svi = SVI(truth.model, refined, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert abs(svi.evaluate_loss(x) - expected) < 1e-3 * abs(expected)
    draws = draw_posterior(truth.model, refined, x[:5], num_samples=4000, seed=0, progress=False)
    off = (draws["z"].mean(0) - truth.posterior(x[:5]).mean) / truth.covariance.diagonal().sqrt()
    assert off.abs().max() < 4.5 / 1500**0.5
    again = copy.deepcopy(refined)
    assert (draw_particles(truth.model, again, x[:2], num_particles=2).log_weight).isfinite().all()


def test_its_draws_go_to_arviz(pair):
    truth, guide, x = pair
    refined = refine(truth.model, guide, x, seed=0, progress=False)
    tree = from_pyro_svi(truth.model, refined, x, num_samples=10)
    evidence = torch.as_tensor(tree["sample_stats"]["log_evidence"].values)
    assert (evidence - truth.log_evidence(x)).abs().max() < 1e-3


def test_it_compiles(pair):
    truth, guide, x = pair
    refined = refine(truth.model, guide, x, seed=0, progress=False)
    elbo, expected = CompiledELBO(), -truth.log_evidence(x).sum().item()
    assert all(abs(elbo.loss(truth.model, refined, x) - expected) < 1e-3 * abs(expected) for _ in range(3))
    evidence = importance_sampling(truth.model, refined, x, num_particles=20, compile=True, progress=False)
    assert (evidence.log_evidence - truth.log_evidence(x)).abs().max() < 1e-3


def test_it_is_pickled_with_the_guide_of_what_is_outside():
    effects, x = RandomEffects(), torch.randn(5)
    refined = refine(effects.model, effects.guide, x, seed=0, progress=False)
    again = pickle.loads(pickle.dumps(refined))
    found = []
    for guide in (refined, again):
        pyro.set_rng_seed(0)
        found.append(guide(x))
    assert found[0].keys() == {"m", "z"}
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_both_sides_of_the_evidence_of_simulated_data(pair):
    """A sandwich by hand: simulated rows are refined for themselves."""
    truth, guide, x = pair
    simulation = simulate(truth.model, guide, x, seed=0)
    refined = refine(truth.model, guide, *simulation.args, seed=0, progress=False)
    for exact in (None, simulation.latents):
        evidence = importance_sampling(
            truth.model, refined, *simulation.args, num_particles=10, exact_draw=exact, progress=False
        )
        assert (evidence.log_evidence - truth.log_evidence(*simulation.args)).abs().max() < 2e-3
    with pytest.raises(ValueError, match=r"belongs to the 30 data points.*for simulated data"):
        importance_sampling(truth.model, refined, x + 1, progress=False)
