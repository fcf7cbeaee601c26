"""What must not be baked into a recording."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    Trace_ELBO,
)
from same_as_pyro import X, gradients, vae_pair
from torch import nn
from truths import small_vae

from pyro_vae import VAE, CompiledELBO
from pyro_vae.distributions import ConditionalBernoulli, StandardNormal

# -- what must not be baked in ----------------------------------------------------------------------------------------

Y = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))


def scaled_pair(read):
    def model(x, *beta):
        with poutine.scale(scale=read(*beta)), pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("other", len(x)):
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x, *beta):
        loc = pyro.param("loc", lambda: torch.zeros(len(x)))
        with poutine.scale(scale=read(*beta)), pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.5))

    return model, guide


def assert_follows(pair, change, args=lambda i: (), recordings=None, steps=12):
    compiled = CompiledELBO(Trace_ELBO(), backend="eager", cache_size=20)
    for i in range(steps):
        change(i)
        got, expected = (gradients(e, *pair, Y, *args(i)) for e in (compiled, Trace_ELBO()))
        assert got[0] == pytest.approx(expected[0], rel=1e-6)
        torch.testing.assert_close(got[1], expected[1])
    assert len(compiled.plans) == recordings
    return compiled


def test_a_float_argument_is_an_input():
    assert_follows(scaled_pair(lambda beta: beta), lambda i: None, lambda i: (0.1 + 0.1 * i,), recordings=1)


def test_a_tensor_in_a_closure_is_an_input():
    beta = torch.tensor(1.0)
    assert_follows(scaled_pair(lambda: beta), lambda i: beta.fill_(0.1 + 0.1 * i), recordings=1)


def test_a_number_in_a_closure_makes_a_new_recording():
    beta = 0.1

    def change(i):
        nonlocal beta
        beta = 0.1 + 0.1 * (i // 4)

    assert_follows(scaled_pair(lambda: beta), change, recordings=3)


BETA = 0.5


def test_a_global_number_makes_a_new_recording(monkeypatch):
    def change(i):
        monkeypatch.setattr("test_recordings.BETA", 0.1 + 0.1 * (i // 6))

    assert_follows(scaled_pair(lambda: BETA), change, recordings=2)


def test_an_attribute_makes_a_new_recording():
    class Pair(nn.Module):
        beta = 1.0

        def __init__(self):
            super().__init__()
            self.model, self.guide = scaled_pair(lambda: self.beta)

    pair = Pair()
    pair.beta = 0.2
    assert_follows((pair.model, pair.guide), lambda i: setattr(pair, "beta", 0.2 + 0.1 * (i // 6)), recordings=2)


def test_a_number_that_always_changes_is_given_up_on_by_name():
    box = {"beta": 0.1}
    pair, compiled = scaled_pair(lambda: box["beta"]), CompiledELBO(Trace_ELBO(), backend="eager")

    def anneal():
        for i in range(15):
            box["beta"] = 0.1 + 0.01 * i
            assert gradients(compiled, *pair, Y)[0] == pytest.approx(gradients(Trace_ELBO(), *pair, Y)[0], rel=1e-6)

    with pytest.warns(UserWarning, match="'beta' of a dict is another in each call") as caught:
        anneal()
    assert len(caught) == 1


def test_shapes_and_modes_have_recordings_of_their_own_and_few_are_kept():
    torch.manual_seed(0)
    vae = VAE(
        StandardNormal(2),
        ConditionalBernoulli(nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5)), (4, 4), features=8),
        small_vae().posterior,
    )
    compiled, elbo = CompiledELBO(Trace_ELBO(), backend="eager", cache_size=3), Trace_ELBO()
    for epoch in range(3):
        for rows, train in ((6, True), (6, False), (4, True)):
            vae.train(train)
            got, expected = (gradients(e, vae.model, vae.guide, X[:rows]) for e in (compiled, elbo))
            assert got[0] == pytest.approx(expected[0], rel=1e-6)
        assert len(compiled.plans) == (1 if epoch == 0 else 3)  # the first call of each shape is Pyro's
    for rows in (1, 2, 3, 5):
        compiled.loss_and_grads(vae.model, vae.guide, X[:rows])
    assert len(compiled.plans) == 3


def test_batch_norm_keeps_its_statistics_moving():
    def pair():
        torch.manual_seed(1)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        loc_scale = encoder

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=z.sum(-1)[:, None, None].expand_as(x)).to_event(2), obs=x)

        def guide(x):
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                loc, raw = loc_scale(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

        return encoder, model, guide

    statistics = []
    for elbo in (Trace_ELBO(), CompiledELBO(Trace_ELBO(), backend="eager")):
        pyro.clear_param_store()
        encoder, *functions = pair()
        for _ in range(6):
            gradients(elbo, *functions, X)
        statistics.append((encoder[2].running_mean.clone(), encoder[2].num_batches_tracked.item()))
    torch.testing.assert_close(statistics[0][0], statistics[1][0])
    assert statistics[0][1] == statistics[1][1] == 6


def test_new_parameters_are_seen():
    vae = small_vae(full=False)
    compiled = CompiledELBO(Trace_ELBO(), backend="eager")
    for _ in range(3):
        gradients(compiled, vae.model, vae.guide, X)
    vae.likelihood.head.weight = nn.Parameter(0.5 * vae.likelihood.head.weight.detach())
    pyro.clear_param_store()
    for _ in range(3):
        got, expected = (gradients(e, vae.model, vae.guide, X) for e in (compiled, Trace_ELBO()))
        assert got[0] == pytest.approx(expected[0], rel=1e-6)
        torch.testing.assert_close(got[1], expected[1])


def test_frozen_parameters_are_seen():
    vae = small_vae(full=False)
    weight, compiled = vae.posterior.head.weight, CompiledELBO(Trace_ELBO(), backend="eager")
    for i in range(12):
        weight.requires_grad_(i % 6 < 3)
        vae.zero_grad()
        compiled.loss_and_grads(vae.model, vae.guide, X)
        assert (weight.grad is not None) == (i % 6 < 3)
        assert vae.likelihood.head.weight.grad is not None


def test_handlers_around_the_call_are_obeyed():
    pair, elbo = vae_pair(small_vae), Trace_ELBO()
    compiled = CompiledELBO(elbo, backend="eager")
    for i in range(8):
        with poutine.scale(scale=1.0 + i):
            losses = [gradients(e, *pair, X)[0] for e in (compiled, elbo)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        assert gradients(compiled, *pair, X)[0] == pytest.approx(losses[1] / (1 + i), rel=1e-5)


@pytest.mark.parametrize("module", ["torch_nets", "pyro_models", "mathematics", "pyro_vae_models"])
def test_a_users_module_whose_name_begins_like_a_librarys_is_watched(module):
    scope = {"BETA": 1.0, "pyro": pyro, "dist": dist, "torch": torch, "__name__": module}
    exec(
        "def model(x):\n"
        "    with pyro.plate('data', len(x)):\n"
        "        z = pyro.sample('z', dist.Normal(0.0, 1.0))\n"
        "        pyro.sample('x', dist.Normal(BETA * z.unsqueeze(-1), 1.0).expand([len(x), 3]).to_event(1), obs=x)\n",
        scope,
    )
    guide = scaled_pair(lambda: 1.0)[1]
    assert_follows((scope["model"], guide), lambda i: scope.update(BETA=1.0 + i // 4), recordings=3)


def test_the_value_of_a_tensor_from_outside_is_watched():
    factor = torch.tensor(0.5)
    pair, compiled = scaled_pair(lambda: factor.item()), CompiledELBO(Trace_ELBO(), backend="eager")
    for i in range(12):
        factor.fill_(0.5 if i < 6 else 0.7)
        assert gradients(compiled, *pair, Y)[0] == pytest.approx(gradients(Trace_ELBO(), *pair, Y)[0], rel=1e-6)
    assert len(compiled.plans) == 2
    assert not compiled.reasons
