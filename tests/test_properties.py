"""Properties that hold whatever the data, shapes and seeds are."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from contract.families import ANY_SHAPE, PRIORS, VECTORS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import kl_divergence
from truths import LinearGaussian, small_vae

from pyro_vae import CompiledELBO, adaptive_importance_sampling, draw_particles, fit, importance_sampling
from pyro_vae.checkpoint import load_weights, save_weights
from pyro_vae.evidence.log_weights import LogWeightSummary
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.particles.sampler import ParticleSampler

FEW = settings(derandomize=True, deadline=None, max_examples=6, database=None)
MANY = settings(derandomize=True, deadline=None, max_examples=50, database=None)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def log_weights(draw):
    """(K, N) of any scale, with ties and zeros."""
    generator = torch.Generator().manual_seed(draw(seeds))
    count, points = draw(st.integers(1, 300)), draw(st.integers(1, 4))
    value = torch.randn(count, points, generator=generator, dtype=torch.double) * 10 ** draw(st.floats(-3, 2))
    value += draw(st.floats(-1e4, 1e4))
    if draw(st.booleans()):
        value = value.round()
    return value.masked_fill(torch.rand(value.shape, generator=generator) < draw(st.sampled_from([0, 0.3])), -math.inf)


def summary(value, sizes=None, **options):
    found = LogWeightSummary(len(value), **options)
    for part in value.split(sizes or len(value)):
        found.update(part)
    return found.result()


@MANY
@given(log_weights(), st.data())
def test_summaries_of_weights_know_neither_order_nor_chunks(value, data):
    order = torch.randperm(len(value), generator=torch.Generator().manual_seed(data.draw(seeds)))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(value) - 1), max_size=4))) if len(value) > 1 else []
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, len(value)], strict=True)]
    for x, y in zip(summary(value), summary(value[order], sizes), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, equal_nan=True)


@MANY
@given(log_weights())
def test_the_effective_sample_size_is_between_one_and_the_number_of_draws(value):
    log_evidence, error, ess, _ = summary(value)
    some = ~value.isneginf().all(0)
    assert ((ess >= 1 - 1e-9) & (ess <= len(value) * (1 + 1e-9)))[some].all()
    top, mean = value.max(0).values, value.mean(0)
    assert ((log_evidence <= top + 1e-9) & (log_evidence >= mean - 1e-9))[some].all()
    assert len(value) == 1 or (error[some] >= 0).all()


@MANY
@given(log_weights(), st.floats(-1e3, 1e3))
def test_a_constant_factor_of_all_weights_moves_the_evidence_alone(value, constant):
    moved, still = summary(value + constant), summary(value)
    torch.testing.assert_close(moved[0], still[0] + constant, rtol=1e-9, atol=1e-7)
    for x, y in zip(moved[1:3], still[1:3], strict=True):  # an error is the root of what rounding leaves
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7, equal_nan=True)


def normal_pair(constant=0.0, slope=0.4):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("constant", torch.full((len(x),), constant))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 0.8))

    return model, guide


@FEW
@given(st.floats(-50, 50), seeds, st.integers(2, 30))
def test_a_constant_in_the_log_likelihood_is_added_to_log_p(constant, seed, rows):
    x = torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    options = {"num_particles": 20, "seed": seed % 1000, "progress": False}
    for estimate in (importance_sampling, adaptive_importance_sampling):
        zero, moved = (estimate(*normal_pair(c), x, **options).log_evidence for c in (0.0, constant))
        torch.testing.assert_close(moved, zero + constant, rtol=1e-5, atol=1e-4)


@FEW
@given(seeds, st.integers(2, 25), st.integers(1, 8))
def test_weights_of_rows_know_neither_their_order_nor_their_neighbours(seed, rows, particles):
    generator = torch.Generator().manual_seed(seed)
    truth, order = LinearGaussian(2, 3), torch.randperm(rows, generator=generator)
    x = torch.randn(rows, 3, generator=generator)
    found = draw_particles(truth.model, truth.guide, x, num_particles=particles, seed=0)
    z = {"z": found.latents["z"]}
    for part in (order, order[: rows // 2 + 1]):
        sampler = ParticleSampler(truth.model, truth.guide, (x[part],))
        with torch.no_grad(), evaluation_mode(truth.model, truth.guide):
            values = {"z": z["z"][:, part]}
            trace = sampler.run(truth.model, particles, values=values)
            prior, likelihood = sampler.log_prior_likelihood(trace, particles, None, summed=set())
        torch.testing.assert_close(prior.expand(particles, -1), found.log_prior[:, part], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(likelihood, found.log_likelihood[:, part], rtol=1e-5, atol=1e-5)


@FEW
@given(seeds, st.integers(2, 40), st.integers(1, 60))
def test_chunks_cover_each_particle_of_each_row_once(seed, rows, chunk_size):
    truth = LinearGaussian(2, 3)
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    sampler = ParticleSampler(truth.model, truth.guide, (x,))
    slices, counts = sampler.chunks(17, chunk_size)
    assert sum(counts) == 17
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(rows))
    # the guide is exact: each weight is log p(x)
    options = {"num_particles": 17, "chunk_size": chunk_size, "seed": 0, "progress": False}
    found = importance_sampling(truth.model, truth.guide, x, **options)
    torch.testing.assert_close(found.log_evidence.float(), truth.log_evidence(x).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["normal", "multivariate normal", "low-rank normal", "gamma", "beta", "bernoulli"])
@FEW
@given(seed=seeds, spread=st.floats(0, 5))
def test_kl_divergences_are_not_negative(name, seed, spread):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        part = (ANY_SHAPE | VECTORS)[name](4).double()
        p, q = (part(spread * torch.randn(5, 3, dtype=torch.double)) for _ in range(2))
        kl, own = kl_divergence(p, q), kl_divergence(p, p)
    assert (kl >= -1e-9).all()
    assert (own.abs() < 1e-6).all()


@pytest.mark.parametrize("how", ["plain", "recorded"])
def test_a_fit_goes_on_from_any_epoch(how, tmp_path, monkeypatch, by_operation):
    """To the same bits of all weights."""
    monkeypatch.setattr("pyro_vae.training.resume.SECONDS_BETWEEN", 0.0)
    epochs, x = 5, torch.bernoulli(torch.full((24, 4, 4), 0.4))

    def run(path, stop=None):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = small_vae()

        def decay(epoch):
            if epoch == stop:
                raise KeyboardInterrupt
            return 0.9**epoch

        options = {"num_epochs": epochs, "batch_size": 12, "seed": 3, "progress": False, "compile": how != "plain"}
        if how == "recorded":
            options |= {"loss": CompiledELBO(backend="eager")}
        schedule = lambda optim: torch.optim.lr_scheduler.LambdaLR(optim, decay)  # noqa: E731
        result = fit(vae.model, vae.guide, x, scheduler=schedule, checkpoint=path, **options)
        return result.loss, [p.detach().clone() for p in vae.parameters()]

    loss, weights = run(None)
    for stop in range(1, epochs):
        path = tmp_path / f"{stop}.pt"
        with pytest.warns(UserWarning, match="fit: interrupted"):
            run(path, stop)
        resumed_loss, resumed = run(path)
        assert all(map(torch.equal, resumed, weights))
        # a recording has the loss in more digits, and the first steps after a resumption are not recorded
        assert resumed_loss == (loss if how == "plain" else pytest.approx(loss, rel=1e-7))


FAMILIES = {name: (make, (2, 3)) for name, make in ANY_SHAPE.items()}
FAMILIES |= {name: (make, 5) for name, make in (VECTORS | PRIORS).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_any_family_come_back_to_the_bit(name, tmp_path):
    make, shape = FAMILIES[name]
    first, second = make(shape), make(shape)
    with torch.no_grad():
        for p in first.parameters():
            p.normal_()
    save_weights(first, tmp_path / "w.pt")
    load_weights(second, tmp_path / "w.pt")
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(t, second.state_dict()[n]) for n, t in first.state_dict().items())
    inputs = () if name in PRIORS else (torch.randn(4, 3),)
    draws = []
    for part in (first, second):
        torch.manual_seed(1)
        draws.append(part(*inputs).sample())
    assert torch.equal(*draws)
