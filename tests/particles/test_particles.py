"""Particles of any pair: plates at any depth, inner plates, subsampling, scales, masks, auxiliary sites."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from truths import LinearGaussian, exact_log_evidence, exact_pair, small_vae

from pyro_vae import draw_particles, importance_sampling
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.particles.sampler import ParticleSampler


@pytest.mark.parametrize(
    ("pair", "rows"),
    [
        (exact_pair(), 11),
        (exact_pair(size=110, subsample=11), 11),  # a mini-batch, scaled up to 110
        (exact_pair(subsample=4, lookup=True), 11),  # every point once, though each pass sees four at random
        (exact_pair(subsample=2, lookup=True), 11),
        (exact_pair(), 1),
        (exact_pair(), 2),
    ],
)
def test_weights_are_unscaled_whatever_the_plate_does(pair, rows, device):
    x = torch.randn(rows, device=device)
    particles = draw_particles(*pair, x, num_particles=3)
    assert particles.log_weight.shape == (3, rows)
    torch.testing.assert_close(particles.log_weight, exact_log_evidence(x).expand(3, rows), atol=1e-5, rtol=0)


def test_plate_that_subsamples_data_of_its_own():
    data = torch.randn(10)
    model, guide = exact_pair(size=10, subsample=3, lookup=True)
    evidence = importance_sampling(lambda: model(data), lambda: guide(data), num_particles=7)
    torch.testing.assert_close(evidence.log_evidence.float(), exact_log_evidence(data), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_poutine_scale_is_no_part_of_a_weight(scale):
    x = torch.randn(5)
    model, guide = exact_pair()
    particles = draw_particles(poutine.scale(model, scale), poutine.scale(guide, scale), x, num_particles=2)
    torch.testing.assert_close(particles.log_weight, exact_log_evidence(x).expand(2, 5), atol=1e-5, rtol=0)


def test_mask_is_part_of_a_weight():
    x, mask = torch.randn(5), torch.tensor([True, False, True, True, False])

    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(mask, x / 2, 0.0), torch.where(mask, math.sqrt(0.5), 1.0)))

    expected = torch.where(mask, exact_log_evidence(x), 0.0)
    particles = draw_particles(model, guide, x, mask, num_particles=2)
    torch.testing.assert_close(particles.log_weight, expected.expand(2, 5), atol=1e-5, rtol=0)


def test_data_plate_on_the_left_with_plates_inside_and_two_latents():
    """m_n ~ N(0, 1), w_nj ~ N(m_n, 1), x_nj ~ N(w_nj, 1), so x_n ~ N(0, 2 I + 1 1ᵀ)."""
    x = torch.randn(6, 3)

    def model(x):
        with pyro.plate("rows", len(x), dim=-2):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", 3, dim=-1):
                w = pyro.sample("w", dist.Normal(m, 1.0))
                pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x), dim=-2):
            m = pyro.sample("m", dist.StudentT(5.0, x.mean(-1, keepdim=True) * 0.6, 0.8))
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("w", dist.Normal((m + x) / 2, 0.8))

    particles = draw_particles(model, guide, x, num_particles=5, plate="rows")
    assert {name: tuple(z.shape) for name, z in particles.latents.items()} == {"m": (5, 6), "w": (5, 6, 3)}
    evidence = importance_sampling(model, guide, x, num_particles=20_000, plate="rows")
    exact = dist.MultivariateNormal(torch.zeros(3), 2 * torch.eye(3) + 1).log_prob(x)
    assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error).all()


def test_terms_are_those_of_the_traces(device):
    """Against Pyro's own log_prob at the same latents."""
    vae = small_vae().to(device)
    x = torch.bernoulli(torch.full((6, 4, 4), 0.5, device=device))
    particles = draw_particles(vae.model, vae.guide, x, num_particles=3)
    for k in range(3):
        z = particles.latents["z"][k]
        torch.testing.assert_close(particles.log_prior[k], dist.Normal(0.0, 1.0).log_prob(z).sum(-1))
        torch.testing.assert_close(particles.log_likelihood[k], vae.decode(z).log_prob(x))
        torch.testing.assert_close(particles.log_posterior[k], vae.encode(x).log_prob(z), atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_the_elbo():
    vae = small_vae()
    x = torch.bernoulli(torch.full((6, 4, 4), 0.5))
    pyro.set_rng_seed(1)
    draw_particles(vae.model, vae.guide, x, num_particles=3).log_weight.sum(1).mean().neg().backward()
    got = [p.grad.clone() for p in vae.parameters()]
    vae.zero_grad()
    pyro.set_rng_seed(1)
    elbo = pyro.infer.Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    elbo.differentiable_loss(vae.model, vae.guide, x).backward()
    for a, p in zip(got, vae.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_observed_sites_of_the_guide_are_no_part_of_q():
    x = torch.randn(5)
    model, _ = exact_pair()

    def with_auxiliary(x):
        with pyro.plate("data", len(x)):
            pyro.sample("helper", dist.Normal(0.0, 1.0), obs=x)
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    particles = draw_particles(model, with_auxiliary, x, num_particles=2)
    torch.testing.assert_close(particles.log_weight, exact_log_evidence(x).expand(2, 5), atol=1e-5, rtol=0)


def test_deterministic_sites_may_stand_anywhere():
    model, guide = exact_pair()

    def with_deterministic(x):
        pyro.deterministic("constant", torch.tensor(3.0))
        model(x)

    x = torch.randn(5)
    torch.testing.assert_close(
        draw_particles(with_deterministic, guide, x, num_particles=1).log_weight[0], exact_log_evidence(x)
    )


def test_keyword_arguments_and_arguments_that_are_no_rows():
    def model(scale, *, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale[0]))
            pyro.sample("x", dist.Normal(z, scale[1]), obs=x)

    def guide(scale, *, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    x = torch.randn(40)
    sampler = ParticleSampler(model, guide, (torch.ones(5),), {"x": x})  # five is not the number of rows
    assert len(sampler.chunks(10, 100)[0]) == 4
    evidence = importance_sampling(model, guide, torch.ones(5), x=x, num_particles=4, chunk_size=7)
    torch.testing.assert_close(evidence.log_evidence.float(), exact_log_evidence(x), atol=1e-5, rtol=0)


# -- nothing moves ----------------------------------------------------------------------------------------------------


def test_evaluation_mode_wherever_a_module_is_kept():
    dropout, norm = nn.Dropout(0.5), nn.BatchNorm1d(2)

    def function(x):  # modules in a closure: nobody could list them
        return norm(dropout(x))

    norm.eval()
    norm.train()
    x = torch.randn(100, 2)
    before = norm.running_mean.clone()
    with evaluation_mode():
        torch.testing.assert_close(function(x), x / math.sqrt(1 + 1e-5))
    assert norm.running_mean.equal(before)
    assert dropout.training
    assert norm.training
    frozen = nn.Dropout(0.5).eval()
    with evaluation_mode():
        frozen(x)
    assert not frozen.training


def test_evidence_leaves_modes_weights_and_statistics_alone():
    vae = small_vae()
    vae.posterior.network = nn.Sequential(vae.posterior.network, nn.BatchNorm1d(16), nn.Dropout(0.3))
    state = {name: t.clone() for name, t in vae.state_dict().items()}
    x = torch.bernoulli(torch.full((6, 4, 4), 0.5))
    importance_sampling(vae.model, vae.guide, x, num_particles=10)
    assert all(module.training for module in vae.modules())
    assert all(t.equal(state[name]) for name, t in vae.state_dict().items())


def test_the_first_look_moves_no_random_state():
    vae, x = small_vae(), torch.bernoulli(torch.full((6, 4, 4), 0.5))
    before = torch.get_rng_state()
    ParticleSampler(vae.model, vae.guide, (x,)).chunks(100)
    assert torch.get_rng_state().equal(before)


def test_exact_guide_of_the_linear_gaussian(device):
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        truth = LinearGaussian(4, 6, device=device, dtype=dtype)
        x = truth.sample(50)
        exact = truth.log_evidence(x)
        log_weight = draw_particles(truth.model, truth.guide, x, num_particles=200).log_weight
        assert (log_weight.double() - exact).abs().max() <= tolerance
        evidence = importance_sampling(truth.model, truth.guide, x, num_particles=200)
        assert (evidence.log_evidence - exact).abs().max() <= tolerance
        assert (evidence.effective_sample_size > 199.99).all()
        assert (evidence.pareto_khat == -math.inf).all()
        assert not evidence.doubtful.any()
