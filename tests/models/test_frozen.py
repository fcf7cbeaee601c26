"""A trained VAE as a part of other models: files, copies, and its decoder as a prior under NUTS."""

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from truths import LinearGaussian, exact_vae, small_vae

from pyro_vae import VAE, fit
from pyro_vae.distributions import ConditionalNormal, VampPrior
from pyro_vae.networks import MLP


def binary(n):
    return torch.bernoulli(torch.full((n, 4, 4), 0.5))


def by_torch(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"torch.save": by_torch, "pickle": lambda v: pickle.loads(pickle.dumps(v)), "deepcopy": copy.deepcopy}


def step(vae, x):
    return SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("trained", ["svi", "fit", "as modules of Pyro"])
def test_a_trained_vae_is_saved_and_learns_on(trained, copied):
    vae, x = small_vae(), binary(20)
    if trained == "as modules of Pyro":
        to_pyro_module_(vae)
    if trained == "fit":
        fit(vae.model, vae.guide, x, num_epochs=2, progress=False)
    step(vae, x)
    saved = COPIES[copied](vae)
    assert all(torch.equal(a, b) for a, b in zip(vae.state_dict().values(), saved.state_dict().values(), strict=True))
    losses = []
    for one in (vae, saved):
        before = [p.clone() for p in one.parameters()]
        pyro.set_rng_seed(3)
        losses.append([step(one, x) for _ in range(3)])
        assert not any(torch.equal(a, b) for a, b in zip(before, one.parameters(), strict=True))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    likelihood = COPIES[copied](vae.likelihood)  # a part alone
    assert torch.equal(likelihood.head.weight, vae.likelihood.head.weight)


def test_a_saved_vamp_prior_keeps_its_posterior():
    posterior = ConditionalNormal(MLP(4, [8]), 2)
    vae = VAE(VampPrior(posterior, torch.rand(3, 4)), ConditionalNormal(MLP(2, [8]), 4), posterior)
    step(vae, torch.randn(5, 4))
    saved = by_torch(vae)
    with torch.no_grad():
        saved.posterior.head.bias += 1.0
    z = torch.randn(6, 2)
    assert not torch.allclose(saved.prior().log_prob(z), vae.prior().log_prob(z))


def test_saving_in_the_middle_of_training_changes_nothing():
    x, losses = binary(20), []
    for saves in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = small_vae()
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        for _ in range(5):
            losses.append(svi.step(x))
            if saves:
                by_torch(vae)
    assert losses[:5] == losses[5:]


# -- frozen -----------------------------------------------------------------------------------------------------------


def test_a_frozen_vae_touches_nothing():
    vae, x = small_vae(), binary(20)
    vae.likelihood.network = nn.Sequential(vae.likelihood.network, nn.Dropout(0.5))
    step(vae, x)
    before = copy.deepcopy(vae.state_dict())
    pyro.clear_param_store()
    frozen = vae.frozen()
    z = torch.randn(5, 2, requires_grad=True)
    first, second = (frozen.likelihood_given(z).mean for _ in range(2))
    assert first.equal(second)  # no dropout
    assert frozen.train().likelihood_given(z).mean.equal(first)
    first.sum().backward()
    assert z.grad.abs().min() > 0
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    names = {f"likelihood.{n}": dist.Normal(0.0, 1.0) for n, _ in vae.likelihood.named_parameters()}
    with pytest.warns(UserWarning, match="did not find params"):
        trace = poutine.trace(poutine.lift(frozen.model, names)).get_trace(x)
    assert trace.stochastic_nodes == ["data", "z"]
    frozen.guide(x)
    frozen.reconstruct(x)
    assert not len(pyro.get_param_store())
    step(vae, x)  # the first one learns on, and the copy does not follow
    assert all(torch.equal(a, b) for a, b in zip(before.values(), frozen.state_dict().values(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before.values(), vae.state_dict().values(), strict=True))
    assert vae.training


def test_modules_of_pyro_freeze_unless_they_are_random():
    vae, x = small_vae(), binary(5)
    to_pyro_module_(vae)
    frozen = vae.frozen()
    frozen.model(x)
    frozen.guide(x)
    assert not len(pyro.get_param_store())
    vae.likelihood.head.bias = PyroSample(dist.Normal(0.0, 1.0).expand([16]).to_event(1))
    with pytest.raises(ValueError, match=r"frozen: expected weights that are fixed, got a PyroSample, 'bias'"):
        vae.frozen()


# -- a decoder as a prior ---------------------------------------------------------------------------------------------


class HalfObserved:
    """z ~ N(0, I), f = W z + b from a decoder, y ~ N(f at some places, s²): f | y is Gaussian."""

    noise = 0.4

    def __init__(self, decoder, places):
        self.decoder, self.places = decoder, places

    def __call__(self, y):
        z = pyro.sample("z", self.decoder.prior())
        f = self.decoder.likelihood_given(z).mean
        pyro.sample("y", dist.Normal(f[self.places], self.noise).to_event(1), obs=y)


def test_nuts_over_a_decoder_in_several_chains(monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 3)  # else Pyro runs them one after the other
    truth, places = LinearGaussian(2, 8), torch.tensor([0, 2, 3, 6])
    vae = exact_vae(truth)
    step(vae, truth.sample(10))  # in Pyro's store, as after training
    weight, bias = (t.detach().double() for t in (vae.likelihood.head.weight, vae.likelihood.head.bias))
    y = torch.randn(4)
    seen = weight[places]
    covariance = torch.linalg.inv(seen.T @ seen / HalfObserved.noise**2 + torch.eye(2))
    z_mean = covariance @ seen.T @ (y.double() - bias[places]) / HalfObserved.noise**2
    mean, scale = weight @ z_mean + bias, (weight @ covariance @ weight.T).diagonal().sqrt()

    model = HalfObserved(vae.frozen(), places)
    kernel = NUTS(model)
    mcmc = MCMC(kernel, num_samples=300, warmup_steps=150, num_chains=2, mp_context="spawn", disable_progbar=True)
    mcmc.run(y)
    diagnostics = mcmc.diagnostics()["z"]
    assert (diagnostics["r_hat"] < 1.02).all()
    z = mcmc.get_samples()["z"].double()
    f = z @ weight.T + bias
    n = diagnostics["n_eff"].min()
    assert ((f.mean(0) - mean) / (scale / n.sqrt())).abs().max() < 5
    assert ((f.std(0) / scale - 1) * (2 * n).sqrt()).abs().max() < 5
    assert {name.split(".")[0] for name in pyro.get_param_store()} == {"vae$$$likelihood", "vae$$$posterior"}
