"""One particle at a time, where a pair does not run for many: the same numbers in the same shapes."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from truths.linear_gaussian import LinearGaussian

from pyro_vae import (
    adaptive_importance_sampling,
    annealed_importance_sampling,
    draw_particles,
    importance_sampling,
    impute,
    prior_sampling,
    simulate,
)

LEFT = {
    "softmax(z, 1)": lambda z: torch.softmax(z, 1),
    "z[:, 0]": lambda z: z[:, :1].expand(*z.shape),
    "a branch": lambda z: z if z.sum() > 0 else -2 * z,
    "the largest of all": lambda z: z / z.abs().max(),
    "item": lambda z: z * float(z.sum().tanh()),
}


def pair(decode):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z), 0.7).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8).to_event(1))

    return model, guide


def one_trace_at_a_time(model, guide, x, latents):
    """log w of each particle, (K,), by traces of plain Pyro."""
    values = []
    for k in range(len(latents["z"])):
        set_z = {"z": latents["z"][k]}
        q, p = (poutine.trace(poutine.condition(f, set_z)).get_trace(x) for f in (guide, model))
        values.append(p.log_prob_sum() - q.log_prob_sum())
    return torch.stack(values)


@pytest.mark.parametrize("name", LEFT)
def test_weights_are_those_of_single_traces(name):
    model, guide = pair(LEFT[name])
    plate = "data" if name in ("softmax(z, 1)", "z[:, 0]") else None  # the others go over all rows
    options = {"num_particles": 6, "plate": plate}
    x = torch.randn(7, 2)
    with pytest.warns(UserWarning, match=r"particles run one at a time, .* ms each, not all at once: .*parallel=False"):
        particles = draw_particles(model, guide, x, seed=1, **options)
    assert particles.log_weight.shape == (6, 7 if plate else 1)
    latents = {"z": particles.latents["z"].reshape(6, 7, 2)}
    expected = one_trace_at_a_time(model, guide, x, latents)
    torch.testing.assert_close(particles.log_weight.sum(1), expected)
    with pytest.raises(ValueError, match="the model"):
        draw_particles(model, guide, x, parallel=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_particles(model, guide, x, parallel=False, **options)


def test_a_branch_that_all_particles_may_take_is_found():
    for seed in range(20):
        with pytest.raises(ValueError, match="another log-probability for one particle alone"):
            draw_particles(*pair(LEFT["a branch"]), torch.randn(6, 2), num_particles=2, parallel=True, seed=seed)


def test_serial_evidence_is_exact_where_the_truth_is_known():
    torch.manual_seed(0)
    truth = LinearGaussian(2, 3)
    x = truth.sample(6)
    exact = truth.log_evidence(x)

    def guide(x):
        truth.guide(x, 1.3)

    runs = {
        importance_sampling: {"num_particles": 700},
        prior_sampling: {"num_particles": 1500},
        adaptive_importance_sampling: {"num_particles": 100},
        annealed_importance_sampling: {"num_particles": 8, "num_temperatures": 4, "num_leapfrog": 3},
    }
    for estimator, options in runs.items():
        evidence = estimator(
            truth.model, lambda x: truth.guide(x, 1.3), x, parallel=False, seed=3, progress=False, **options
        )
        z = (evidence.log_evidence - exact) / evidence.standard_error.clamp(min=1e-5)
        assert z.abs().max() < 4.5, (estimator.__name__, z)


def test_enumerated_sites_are_summed_out_for_each_particle():
    weights, means = torch.tensor([0.3, 0.5, 0.2]), torch.tensor([-2.0, 0.0, 3.0])

    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(weights))
            z = pyro.sample("z", dist.Normal(means[y], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.2))

    x = torch.linspace(-3, 4, 6)
    components = dist.Normal(means, 2**0.5).log_prob(x[:, None]) + weights.log()
    found = importance_sampling(model, guide, x, num_particles=500, parallel=False, seed=0, progress=False)
    z = (found.log_evidence - components.logsumexp(1)) / found.standard_error
    assert z.abs().max() < 4.5

    @config_enumerate
    def with_y(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("z", dist.Normal(0.5 * (means[y] + x), 1.0))

    found = importance_sampling(model, with_y, x, num_particles=500, parallel=False, seed=0, progress=False)
    assert ((found.log_evidence - components.logsumexp(1)) / found.standard_error).abs().max() < 4.5


@pytest.mark.parametrize("plate", [None, "data"])
def test_sites_that_come_and_go_with_values(plate):
    """One observation with none, one or two causes, each of which has a strength: log p(x) by enumeration."""

    def causes(*strengths):
        count = pyro.sample("count", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        return sum([pyro.sample(f"z_{i}", strengths[int(count)]) for i in range(int(count))], torch.zeros(1))

    def model(x):
        with pyro.plate("data", 1):
            total = causes(*[dist.Normal(1.0, 1.0)] * 3)
            pyro.sample("x", dist.Normal(total, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", 1):
            causes(None, dist.Normal(1.5, 0.6), dist.Normal(0.87, 1.0))  # near the posterior of each count

    x = torch.tensor([1.7])
    counts = torch.arange(3.0)
    terms = dist.Normal(counts, (counts + 0.25).sqrt()).log_prob(x) + torch.tensor([0.2, 0.5, 0.3]).log()
    found = importance_sampling(
        model, guide, x, num_particles=1000, plate=plate, parallel=False, seed=1, progress=False
    )
    assert (found.log_evidence - terms.logsumexp(0)).abs() < 4.5 * found.standard_error
    particles = draw_particles(model, guide, x, num_particles=50, plate=plate, parallel=False, seed=0)
    count, second = particles.latents["count"].flatten(), particles.latents["z_1"].flatten()
    assert torch.equal(second.isnan(), count < 2)  # NaN where there is no such site

    def without_the_second(x):
        poutine.block(guide, hide=["z_1"])(x)

    with pytest.raises(ValueError, match=r"different latent sites: \['z_1'\] only in the model"):
        importance_sampling(model, without_the_second, x, num_particles=200, plate=plate, parallel=False, seed=0)


@pytest.mark.parametrize("parallel", [True, False])
def test_a_sequential_plate_of_data_points(parallel):
    x = torch.tensor([0.3, -1.0, 2.0, 0.5])

    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z_{i}", dist.Normal(x[i] / 2, 0.5**0.5))

    particles = draw_particles(model, guide, x, num_particles=5, parallel=parallel)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    torch.testing.assert_close(particles.log_weight, exact.expand(5, 4))  # the exact posterior
    assert particles.latents["z_2"].shape == (5, 1)
    evidence = importance_sampling(model, guide, x, num_particles=50, parallel=parallel, progress=False)
    torch.testing.assert_close(evidence.log_evidence, exact.double(), atol=1e-6, rtol=0)
    for tool in (adaptive_importance_sampling, annealed_importance_sampling):  # no dimension has the data points
        with pytest.raises(ValueError, match="plate 'data' is a Python loop"):
            tool(model, guide, x, parallel=parallel, progress=False)


def test_a_markov_chain_one_particle_at_a_time():
    """A chain of four steps that reads z[-1] from the left, against the joint Gaussian of its observations."""

    def chain(x, observe):
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in pyro.markov(range(4)):
                # the guide draws from p(z_t|z_{t-1}, x_t)
                fn = dist.Normal(0.8 * z, 1.0) if observe else dist.Normal((0.8 * z + 4 * x[:, t]) / 5, 0.2**0.5)
                z = pyro.sample(f"z_{t}", fn)
                if observe:
                    row = torch.stack([z, z], 1)[:, 0]  # counts from the left
                    pyro.sample(f"x_{t}", dist.Normal(row, 0.5), obs=x[:, t])

    x = torch.randn(3, 4)
    power = torch.tensor([[0.8 ** (i - j) if i >= j else 0.0 for j in range(4)] for i in range(4)])
    exact = dist.MultivariateNormal(torch.zeros(4), power @ power.T + 0.25 * torch.eye(4)).log_prob(x)
    found = importance_sampling(
        lambda x: chain(x, True),
        lambda x: chain(x, False),
        x,
        num_particles=500,
        parallel=False,
        seed=0,
        progress=False,
    )
    assert ((found.log_evidence - exact) / found.standard_error).abs().max() < 4.5


def test_simulation_and_imputation_one_at_a_time():
    model, guide = pair(LEFT["z[:, 0]"])
    simulated = simulate(model, guide, torch.zeros(2000, 2), parallel=False, seed=0)
    noise = simulated.args[0] - simulated.latents["z"][:, :1]
    assert abs(noise.std().item() - 0.7) < 0.03
    with pytest.raises(ValueError, match="takes NaN as missing"):
        impute(model, guide, torch.zeros(3, 2), parallel=False)


def test_what_parallel_may_be():
    model, guide = pair(lambda z: z)
    with pytest.raises(ValueError, match=r"parallel: expected True, False or 'auto', got 'yes'"):
        draw_particles(model, guide, torch.zeros(3, 2), num_particles=2, parallel="yes")


def test_seeds_repeat_draws_and_disturb_none():
    model, guide = pair(lambda z: z)
    x, state = torch.zeros(3, 2), torch.get_rng_state()
    first, again, other = (draw_particles(model, guide, x, num_particles=4, seed=s).log_weight for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    for seed in (-1, 1.5, True, 2**32):
        with pytest.raises(ValueError, match="seed: expected a whole number"):
            draw_particles(model, guide, x, num_particles=4, seed=seed)
