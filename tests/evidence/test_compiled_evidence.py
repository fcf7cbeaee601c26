"""The compiled evidence kernel against Pyro's own run, and its rewritings against float64."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from torch.fx.experimental.proxy_tensor import make_fx
from truths import LinearGaussian, linear_vae, quadrature, small_vae

from pyro_vae import importance_sampling, prior_sampling
from pyro_vae.compiled.rewriting import rewrite
from pyro_vae.evidence.compiled import CompiledLogWeight
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.particles.sampler import ParticleSampler


def images(n, shape=(4, 4)):
    return torch.bernoulli(torch.full((n, *shape), 0.4))


def both(sampler, kernel, num_particles, rows):
    with torch.no_grad(), evaluation_mode():
        torch.manual_seed(1)
        expected = sampler.log_weight(num_particles, rows, check=False)
        torch.manual_seed(1)
        return kernel(num_particles, rows), expected


@pytest.mark.parametrize(("generate_code", "full"), [(False, False), (False, True), (True, True)])
def test_the_kernel_gives_pyros_log_weights_for_all_rows(generate_code, full):
    vae, x = small_vae(full=full), images(10)
    sampler = ParticleSampler(vae.model, vae.guide, (x,))
    kernel = CompiledLogWeight(sampler, generate_code=generate_code)
    for rows in (slice(0, 4), slice(4, 8), slice(0, 4), slice(8, 10)):
        got, expected = both(sampler, kernel, 30, rows)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0 if not generate_code else 2e-5)
        assert len(set(got.flatten().tolist())) > 0.9 * got.numel()


@pytest.mark.parametrize("generate_code", [False, True])
def test_compiled_evidence_meets_quadrature(generate_code):
    torch.manual_seed(0)
    vae, x = small_vae(), images(40)
    vae.eval()
    evidence = importance_sampling(
        vae.model, vae.guide, x, num_particles=3001, chunk_size=999, compile=generate_code or "auto", progress=False
    )
    z = (evidence.log_evidence - quadrature(vae, x)) / evidence.standard_error
    assert z.abs().max() < 4.5
    assert z.square().mean() < 2


def test_weights_that_moved_are_seen():
    truth = linear_vae(2, 3)
    x = torch.randn(6, 3)
    sampler = ParticleSampler(truth.model, truth.guide, (x,))
    kernel = CompiledLogWeight(sampler, generate_code=True)
    for _ in range(3):
        got, expected = both(sampler, kernel, 20, slice(0, 6))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for p in truth.parameters():
                p.add_(0.1 * torch.randn_like(p))


def test_a_hand_written_pair_with_context_and_a_plate_outside():
    def model(x, *, c):
        with pyro.plate("data", x.shape[0], dim=-2):
            z = pyro.sample("z", dist.StudentT(4.0, c, 1.0))
            with pyro.plate("columns", x.shape[1], dim=-1):
                pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    def guide(x, *, c):
        with pyro.plate("data", x.shape[0], dim=-2):
            pyro.sample("z", dist.Normal((x.mean(1, keepdim=True) + 0.3).log(), 0.5))

    x, c = torch.poisson(torch.full((8, 3), 2.0)), torch.linspace(0, 1, 8)[:, None]
    sampler = ParticleSampler(model, guide, (x,), {"c": c})
    kernel = CompiledLogWeight(sampler, generate_code=True)
    for rows in (slice(0, 4), slice(4, 8), slice(0, 4)):
        got, expected = both(sampler, kernel, 50, rows)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_enumerated_latents():
    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + k, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 1.0))

    x = torch.randn(8)
    sampler = ParticleSampler(model, guide, (x,))
    got, expected = both(sampler, CompiledLogWeight(sampler, generate_code=False), 20, slice(0, 8))
    torch.testing.assert_close(got, expected)


def test_data_are_looked_at_before_anything_is_compiled():
    vae, x = small_vae(), images(50)
    x[31, 2, 2] = 0.5
    with pytest.raises(ValueError, match="row 31"):
        importance_sampling(vae.model, vae.guide, x, num_particles=10, compile=True, progress=False)
    x[31, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="row 31"):
        prior_sampling(vae.model, vae.guide, x, num_particles=10, compile=True, progress=False)


def test_a_model_that_decides_by_value_runs_as_it_is():
    truth = LinearGaussian(1, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            assert z.sum().item() < 1e9  # here
            pyro.sample("x", dist.Normal(z @ truth.weight.T + truth.bias, truth.noise).to_event(1), obs=x)

    x = truth.sample(6)
    with pytest.warns(UserWarning, match=r"test_compiled_evidence\.py:\d+: .*# here") as caught:
        evidence = importance_sampling(model, truth.guide, x, num_particles=50, compile=True, progress=False)
    assert len(caught) == 1
    torch.testing.assert_close(evidence.log_evidence, truth.log_evidence(x), atol=1e-4, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importance_sampling(model, truth.guide, x, num_particles=50, progress=False)
    with pytest.raises(ValueError, match="compile: expected True, False or 'auto'"):
        importance_sampling(model, truth.guide, x, compile="maybe")


@pytest.mark.parametrize("shape", [(784,), (4, 4), (1, 28, 28), (101,), (1,)])
def test_bernoulli_sums_by_products_are_no_less_exact(shape):
    logits, x = 4 * torch.randn(50, 3, *shape), images(3, shape)
    logits[0] *= 30  # up to 400: the exponential underflows

    def log_prob(logits, x):
        return [dist.Bernoulli(logits=logits, validate_args=False).to_event(len(shape)).log_prob(x)]

    module = make_fx(log_prob)(logits, x)
    before = module(logits, x)[0]
    rewrite(module)
    assert "binary_cross_entropy_with_logits" not in module.code
    (got,) = module(logits, x)
    (exact,) = log_prob(logits.double(), x.double())
    assert got.shape == exact.shape == (50, 3)
    error, plain = ((t - exact).abs() / (1 + exact.abs()) for t in (got, before))
    assert error.max() < 3 * torch.finfo(torch.float32).eps
    assert error.mean() < 1.5 * plain.mean()


def test_a_cross_entropy_that_is_used_otherwise_is_left_alone():
    def each(logits, x):
        return [dist.Bernoulli(logits=logits, validate_args=False).log_prob(x)]

    logits, x = torch.randn(5, 7), images(5, (7,))
    module = make_fx(each)(logits, x)
    rewrite(module)
    torch.testing.assert_close(module(logits, x)[0], each(logits, x)[0])
    assert "binary_cross_entropy_with_logits" in module.code
