"""VAE: stock Pyro trains it, two of them never meet, and Pyro's handlers and tools work on its functions."""

import copy
import math

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from torch import nn
from truths import LinearGaussian, linear_vae, small_vae

from pyro_vae import VAE, fit, importance_sampling
from pyro_vae.distributions import ConditionalBernoulli, ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP, ConvDecoder, ConvEncoder


def binary(n, shape=(4, 4)):
    return torch.bernoulli(torch.full((n, *shape), 0.5))


ELBOS = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "RenyiELBO": lambda: RenyiELBO(num_particles=3),
    "vectorized": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "ReweightedWakeSleep": ReweightedWakeSleep,
}


def moved(vae, before):
    return [not torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True)]


@pytest.mark.parametrize("elbo", ELBOS)
def test_stock_pyro_moves_every_parameter(elbo, device):
    vae, x = small_vae().to(device), binary(20).to(device)
    before = [p.clone() for p in vae.parameters()]
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), ELBOS[elbo]())
    for _ in range(3):
        svi.step(x)
    assert all(moved(vae, before))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_elbo():
    vae, x = small_vae(), binary(20)
    before = [p.clone() for p in vae.parameters()]
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), JitTrace_ELBO())
    svi.step(x)
    svi.step(x)
    assert all(moved(vae, before))


def test_training_without_the_parameter_store():
    vae, x = small_vae(), binary(20)
    before = [p.clone() for p in vae.parameters()]
    optim = torch.optim.Adam(vae.parameters(), lr=0.01)
    for _ in range(2):
        optim.zero_grad()
        Trace_ELBO().differentiable_loss(vae.model, vae.guide, x).backward()
        optim.step()
    assert all(moved(vae, before))


# -- two in one process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["built anew", "copied"])
def test_two_vaes_never_touch_each_other(second):
    """Trained in turns by SVI, both learn, exactly as each would alone."""
    x = binary(50)

    def alone(vae):
        pyro.clear_param_store()
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
        pyro.set_rng_seed(3)
        return [svi.step(x) for _ in range(30)]

    one = small_vae()
    two = small_vae() if second == "built anew" else copy.deepcopy(one)
    start = [copy.deepcopy(vae.state_dict()) for vae in (one, two)]
    expected = [alone(vae) for vae in (one, two)]
    for vae, state in zip((one, two), start, strict=True):
        vae.load_state_dict(state)
    pyro.clear_param_store()
    for vae, losses in zip((one, two), expected, strict=True):  # the store stays as the first left it
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
        pyro.set_rng_seed(3)
        assert [svi.step(x) for _ in range(30)] == pytest.approx(losses, rel=1e-6)
        assert losses[-1] < losses[0]
    weights = {id(p) for p in one.parameters()}
    assert not weights & {id(p) for p in two.parameters()}
    store = pyro.get_param_store()
    assert {name.split("$$$")[0] for name in store} == {"vae", "vae_2"}
    assert all(store[f"vae_2$$$likelihood.{n}"] is p for n, p in two.likelihood.named_parameters())


def test_two_vaes_in_turns_step_by_step():
    x, vaes = binary(20), [small_vae(), small_vae()]
    svis = [SVI(v.model, v.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()) for v in vaes]
    for _ in range(3):
        for vae, other, svi in zip(vaes, vaes[::-1], svis, strict=True):
            before, still = [p.clone() for p in vae.parameters()], [p.clone() for p in other.parameters()]
            svi.step(x)
            assert all(moved(vae, before))
            assert not any(moved(other, still))


def test_weights_in_the_store_that_are_nobodys_are_refused():
    x, first = binary(20), small_vae()
    SVI(first.model, first.guide, pyro.optim.Adam({}), Trace_ELBO()).step(x)
    state = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)  # as after loading a file
    for name in list(state["params"]):
        pyro.get_param_store()._params[name] = state["params"][name].detach().clone().requires_grad_()
    with pytest.raises(ValueError, match=r"already holds 'vae\$\$\$.*Try another name=….*load_state_dict"):
        small_vae().guide(x)
    small_vae(name="other").guide(x)


def test_frozen_parameters_stay_frozen():
    vae, x = small_vae(), binary(20)
    vae.likelihood.requires_grad_(False)
    before = [p.clone() for p in vae.parameters()]
    SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
    changed = dict(zip([n for n, _ in vae.named_parameters()], moved(vae, before), strict=True))
    assert all(change == name.startswith("posterior") for name, change in changed.items())
    assert not any(p.requires_grad for p in vae.likelihood.parameters())


# -- Pyro's handlers and tools ----------------------------------------------------------------------------------------


def test_handlers():
    vae, x = small_vae(), binary(5)
    z = torch.zeros(5, 2)
    trace = poutine.trace(poutine.condition(vae.model, {"z": z})).get_trace(x)
    torch.testing.assert_close(trace.nodes["x"]["fn"].log_prob(x), vae.decode(z).log_prob(x))
    assert {"a/z", "a/x"} <= set(poutine.trace(scope(vae.model, prefix="a")).get_trace(x).nodes)
    blocked = poutine.trace(poutine.block(vae.model, hide=["z"])).get_trace(x)
    assert "z" not in blocked.nodes
    masked = poutine.trace(poutine.mask(vae.model, mask=False)).get_trace(x)
    assert masked.log_prob_sum() == 0
    replayed = poutine.trace(poutine.replay(vae.model, poutine.trace(vae.guide).get_trace(x))).get_trace(x)
    assert replayed.log_prob_sum().isfinite()


def test_lift_puts_random_weights_in_place():
    vae, x = small_vae(), binary(5)
    bias = torch.full((16,), 3.0)
    lifted = poutine.lift(vae.model, {"likelihood.head.bias": dist.Delta(bias).to_event(1)})
    z = torch.zeros(5, 2)
    logits = poutine.trace(poutine.condition(lifted, {"z": z})).get_trace(x).nodes["x"]["fn"].base_dist.logits
    expected = vae.decode(z).base_dist.logits - vae.likelihood.head.bias.reshape(4, 4) + 3.0
    torch.testing.assert_close(logits, expected)


def test_predictive_and_render():
    vae, x = small_vae(), binary(5)
    draws = Predictive(vae.model, num_samples=7)(size=3)
    assert draws["x"].shape == (7, 3, 4, 4)
    posterior = Predictive(vae.guide, num_samples=7)(x)["z"]
    assert posterior.shape == (7, 5, 2)
    relations = pyro.infer.inspect.get_model_relations(vae.model, (x,))
    assert set(relations["sample_sample"]["x"]) - {"x"} == {"z"}
    assert relations["observed"] == ["x"]


def test_composes_into_a_larger_model():
    """A VAE's model used inside another, with a further observation of its latent."""
    vae = linear_vae(2, 3)

    def model(x, y):
        pyro.module("vae", vae)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", vae.likelihood(z), obs=x)
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    x, y = torch.randn(20, 3), torch.randn(20)
    result = fit(model, lambda x, y: vae.guide(x), (x, y), num_epochs=50, seed=0)
    assert result.loss[-1] < result.loss[0]


# -- encode, decode, generate, reconstruct ----------------------------------------------------------------------------


def test_evaluation_methods_restore_the_mode_and_take_no_gradients():
    vae, x = small_vae(), binary(5)
    vae.posterior.network = nn.Sequential(vae.posterior.network, nn.Dropout(0.5))
    first, second = vae.encode(x).mean, vae.encode(x).mean
    assert first.equal(second)
    assert not first.requires_grad
    for value in (
        vae.decode(torch.zeros(3, 2)).mean,
        vae.generate(4),
        vae.reconstruct(x),
        vae.reconstruct(x, mean=True),
    ):
        assert not value.requires_grad
    assert all(m.training for m in vae.modules())


def test_generated_data_have_the_moments_of_the_model():
    truth = LinearGaussian(2, 3)
    vae = linear_vae(2, 3, scale=truth.noise)
    vae.likelihood.head.weight.data, vae.likelihood.head.bias.data = truth.weight, truth.bias
    x = vae.generate(50_000)
    covariance = truth.weight @ truth.weight.T + truth.noise**2 * torch.eye(3)
    assert ((x.mean(0) - truth.bias).abs() < 5 * (covariance.diagonal() / 50_000).sqrt()).all()
    scale = covariance.diagonal().sqrt()
    assert ((torch.cov(x.T) - covariance) / (scale[:, None] * scale)).abs().max() < 0.03
    mean = vae.generate(50_000, mean=True)  # without the noise
    assert ((torch.cov(mean.T) - truth.weight @ truth.weight.T) / (scale[:, None] * scale)).abs().max() < 0.03


def test_reconstruction_is_not_the_input():
    """With the exact posterior, x' | x ~ N(W m(x) + b, W Σ Wᵀ + s² I); its mean is that of the mean code."""
    truth = LinearGaussian(2, 3)
    vae = VAE(
        StandardNormal(2),
        lambda z: dist.Normal(z @ truth.weight.T + truth.bias, truth.noise).to_event(1),
        truth.posterior,
    )
    x = truth.sample(1).expand(40_000, 3)
    drawn, mean = vae.reconstruct(x), vae.reconstruct(x[:1], mean=True)
    torch.testing.assert_close(mean, truth.posterior(x[:1]).mean @ truth.weight.T + truth.bias)
    assert not drawn.isclose(x).all(1).any()
    spread = truth.weight @ truth.covariance.float() @ truth.weight.T + truth.noise**2 * torch.eye(3)
    assert ((drawn.mean(0) - mean) / spread.diagonal().sqrt()).abs().max() < 5 / math.sqrt(40_000)
    assert (torch.cov(drawn.T) / spread - 1).diagonal().abs().max() < 0.05


@pytest.mark.parametrize("rows", [1, 2, 4097])
def test_any_number_of_rows(rows):
    vae = small_vae()
    assert vae.generate(rows).shape == vae.reconstruct(binary(rows)).shape == (rows, 4, 4)
    assert vae.encode(binary(rows)).batch_shape == (rows,)


def test_images_stay_images_through_convolutions(device):
    vae = VAE(
        StandardNormal(3),
        ConditionalBernoulli(ConvDecoder(3, [8, 4], (8, 8)), (1, 8, 8)),
        ConditionalNormal(ConvEncoder((1, 8, 8), [4, 8], 16), 3),
    ).to(device)
    x = binary(30, (1, 8, 8)).to(device)
    svi = SVI(
        vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=4, vectorize_particles=True)
    )
    assert math.isfinite(svi.step(x))
    assert importance_sampling(vae.model, vae.guide, x, num_particles=20).log_evidence.shape == (30,)
    assert vae.reconstruct(x).shape == x.shape


def test_conditional_vae_uses_its_context():
    """p(x|z, c): x is the label plus noise, so a context-blind model cannot reach this evidence."""
    vae = VAE(
        StandardNormal(1),
        ConditionalNormal(MLP(1, [16], context_size=3), 2),
        ConditionalNormal(MLP(2, [16], context_size=3), 1),
    )
    labels = torch.randint(3, (500,))
    c = nn.functional.one_hot(labels, 3).float()
    x = torch.stack([labels, -labels], 1) * 4.0 + 0.1 * torch.randn(500, 2)
    fit(vae.model, vae.guide, (x, c), num_epochs=60, learning_rate=0.02, seed=0)
    evidence = importance_sampling(vae.model, vae.guide, x, c, num_particles=200)
    assert evidence.mean[0] > 0.5  # 2 × log N(0; 0, 0.1²) is 1.8 minus entropy; a mixture of three is below −1
    new = torch.eye(3)[[2, 0, 1]]
    assert (vae.generate(None, new) - torch.tensor([[8.0, -8.0], [0.0, 0.0], [4.0, -4.0]])).abs().max() < 1.0
    assert vae.reconstruct(x[:7], c[:7]).shape == (7, 2)


def test_seeds_of_what_a_vae_draws():
    vae, x, state = small_vae(), binary(5), torch.get_rng_state()
    draws = {
        "generate": lambda seed: vae.generate(4, seed=seed),
        "reconstruct": lambda seed: vae.reconstruct(x, seed=seed),
        "similar": lambda seed: vae.similar(x, size=3, seed=seed),
    }
    for draw in draws.values():
        assert draw(1).equal(draw(1))
        assert not draw(1).equal(draw(2))
    assert torch.get_rng_state().equal(state)
