"""fit: the same steps as by hand, exact epochs, and nothing lost when it goes wrong."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from states import weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from truths import LinearGaussian, linear_vae, linear_vae_log_evidence, small_vae

from pyro_vae import BetaELBO, FitResult, fit

# -- what a step is ---------------------------------------------------------------------------------------------------


def test_a_step_is_the_gradient_of_the_loss_per_data_point():
    """Two epochs of plain gradient descent in one batch, done by hand from Pyro's ELBO."""
    x = LinearGaussian(2, 4).sample(30)
    vae, hand = linear_vae(2, 4), linear_vae(2, 4, name="hand")
    hand.load_state_dict(vae.state_dict())
    result = fit(
        vae.model, vae.guide, x, num_epochs=2, batch_size=30, seed=0,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loss=TraceMeanField_ELBO(),
    )  # fmt: skip
    torch.manual_seed(0)
    optim = torch.optim.SGD(hand.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        rows = torch.randperm(30)
        optim.zero_grad()
        loss = TraceMeanField_ELBO().differentiable_loss(hand.model, hand.guide, x[rows]) / 30
        loss.backward()
        optim.step()
        losses.append(loss.item())
    assert result.loss == pytest.approx(losses, rel=1e-6)
    for a, b in zip(vae.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_ragged_batches_are_weighted_by_their_rows():
    """With frozen steps, an epoch's loss over batches of 7 and a last one of 2 is the loss over all 30 rows."""
    truth = LinearGaussian(2, 4)
    x = truth.sample(30)
    vae = linear_vae(2, 4)
    result = fit(
        vae.model, vae.guide, x, num_epochs=200, batch_size=7, seed=0, optimizer=lambda p: torch.optim.SGD(p, lr=0.0)
    )
    assert result.num_steps == 200 * 5
    elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True).loss(vae.model, vae.guide, x) / 30
    error = np.std(result.loss) / math.sqrt(200)
    assert abs(np.mean(result.loss) - elbo) < 6 * error


@pytest.mark.parametrize(
    "elbo",
    [
        None,
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        RenyiELBO(num_particles=4),
        Trace_ELBO(num_particles=4, vectorize_particles=True),
    ],
    ids=lambda elbo: type(elbo).__name__,
)
def test_learns_with_any_elbo(elbo, device):
    """A linear VAE comes close to its exact maximum likelihood; the loss bounds it."""
    truth = LinearGaussian(2, 5, device=device)
    x = truth.sample(400)
    vae = linear_vae(2, 5, scale=1.0).to(device)
    result = fit(vae.model, vae.guide, x, num_epochs=45, batch_size=64, learning_rate=0.03, loss=elbo, seed=0)
    exact = linear_vae_log_evidence(vae, x).mean()
    assert exact > truth.log_evidence(x).mean() - 0.1
    assert -np.mean(result.loss[-10:]) < exact + 0.05
    assert -np.mean(result.loss[-10:]) > exact - 0.3


def test_reweighted_wake_sleep():
    x = LinearGaussian(2, 5).sample(200)
    vae = linear_vae(2, 5, scale=1.0)
    before = weights(vae)
    result = fit(vae.model, vae.guide, x, num_epochs=5, loss=ReweightedWakeSleep(num_particles=4), seed=0)
    assert result.loss[-1] < result.loss[0]
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(vae), strict=True))


def test_the_elbo_object_is_left_alone():
    """Pyro's ELBOs keep the plate nesting of the first model they see."""
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True)
    vae = small_vae()
    fit(vae.model, vae.guide, torch.zeros(5, 4, 4), num_epochs=1, loss=elbo)
    assert elbo.max_plate_nesting == math.inf


# -- any pair ---------------------------------------------------------------------------------------------------------


def test_a_model_of_pyro_params_and_a_global_latent():
    """m ~ N(0, 10²), x ~ N(m, 1), mini-batches scaled up to all rows: the posterior of m is known."""
    x = torch.randn(200) + 3.0

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 200, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        pyro.sample("m", dist.Normal(loc, scale))

    result = fit(
        model, guide, x, num_epochs=600, batch_size=50, learning_rate=0.05, seed=0,
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.995),
        loss=Trace_ELBO(num_particles=10, vectorize_particles=True),
    )  # fmt: skip
    precision = 200 + 0.01
    assert pyro.param("loc").item() == pytest.approx(x.sum().item() / precision, abs=0.02)
    assert pyro.param("scale").item() == pytest.approx(precision**-0.5, rel=0.15)
    covariance = torch.eye(200) + 100.0
    exact = dist.MultivariateNormal(torch.zeros(200), covariance).log_prob(x).item() / 200
    assert -np.mean(result.loss[-50:]) == pytest.approx(exact, abs=0.02)  # per data point, though batches are scaled


def test_autoguide_and_pyro_module():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

        def forward(self, x):
            m = pyro.sample("m", dist.Normal(0.0, 10.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(m, self.scale), obs=x)

    x = 0.3 * torch.randn(300) + 2.0
    model = Model()
    guide = AutoNormal(model)
    fit(model, guide, x, num_epochs=300, batch_size=300, learning_rate=0.03, seed=0)
    assert guide.median()["m"].item() == pytest.approx(x.mean().item(), abs=0.05)
    assert model.scale.item() == pytest.approx(x.std().item(), rel=0.1)


def test_enumerated_mixture():
    @config_enumerate
    def model(x):
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(locs[k], 0.5), obs=x)

    def guide(x):
        pass

    x = torch.cat([torch.randn(200) * 0.5 - 3, torch.randn(200) * 0.5 + 3])
    result = fit(
        model,
        guide,
        x,
        num_epochs=80,
        batch_size=400,
        learning_rate=0.1,
        loss=TraceEnum_ELBO(max_plate_nesting=1),
        seed=0,
    )
    assert pyro.param("locs").tolist() == pytest.approx([x[:200].mean().item(), x[200:].mean().item()], abs=0.05)
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(pyro.param("locs"), 0.5))
    assert result.loss[-1] == pytest.approx(-mixture.log_prob(x).mean().item(), abs=0.01)


# -- data -------------------------------------------------------------------------------------------------------------


def test_kinds_of_data_agree(tmp_path):
    x = LinearGaussian(2, 4).sample(50)
    mapped = np.memmap(tmp_path / "x.bin", np.float32, "w+", shape=(50, 4))
    mapped[:] = x.numpy()
    kinds = {"tensor": x, "tuple": (x,), "array": x.double().numpy(), "memory map": mapped}
    losses = {}
    for name, data in kinds.items():
        torch.manual_seed(1)
        vae = linear_vae(2, 4)
        losses[name] = fit(vae.model, vae.guide, data, num_epochs=3, batch_size=20, seed=0).loss
    assert all(loss == pytest.approx(losses["tensor"], rel=1e-6) for loss in losses.values())


def test_data_loader():
    x = LinearGaussian(2, 4).sample(50)
    vae = linear_vae(2, 4)
    result = fit(vae.model, vae.guide, DataLoader(TensorDataset(x), batch_size=20, shuffle=True), num_epochs=10)
    assert result.num_steps == 30
    assert result.loss[-1] < result.loss[0]


# -- options ----------------------------------------------------------------------------------------------------------


def test_clipping_bounds_the_step():
    x = 100 * LinearGaussian(2, 4).sample(50)
    vae = linear_vae(2, 4)
    before = weights(vae)
    fit(
        vae.model, vae.guide, x, num_epochs=1, batch_size=50, clip_norm=0.5, seed=0,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
    )  # fmt: skip
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, weights(vae), strict=True)]).norm()
    assert moved.item() == pytest.approx(0.5, rel=1e-4)


def test_validation_is_in_evaluation_mode():
    vae = small_vae()
    norm = nn.BatchNorm1d(16)
    vae.posterior.network = nn.Sequential(vae.posterior.network, norm)
    x = torch.bernoulli(torch.full((20, 4, 4), 0.5))
    fit(vae.model, vae.guide, x, num_epochs=1, batch_size=20, validation_data=1 - x)
    assert norm.num_batches_tracked == 1
    assert vae.posterior.network.training


def test_schedules():
    x, rates = LinearGaussian(2, 4).sample(20), []

    def optimizer(p):
        rates.append(torch.optim.SGD(p, lr=1.0e-3))
        return rates[-1]

    vae = linear_vae(2, 4)
    fit(
        vae.model, vae.guide, x, num_epochs=3, optimizer=optimizer,
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
    )  # fmt: skip
    assert rates[0].param_groups[0]["lr"] == pytest.approx(1e-3 / 8)
    fit(
        vae.model, vae.guide, x, num_epochs=4, optimizer=optimizer, validation_data=x,
        scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.1, patience=0, threshold=1e6),
    )  # fmt: skip
    assert rates[1].param_groups[0]["lr"] < 1e-3


def test_device_auto():
    vae = linear_vae(2, 4)
    fit(vae.model, vae.guide, LinearGaussian(2, 4).sample(20), num_epochs=1, device="auto")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert {p.device.type for p in vae.parameters()} == {vae.prior.loc.device.type} == {expected}


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    vae = linear_vae(2, 4)
    with pytest.raises(ValueError, match=r'got .cuda., and this torch has no CUDA device. Try device="auto"'):
        fit(vae.model, vae.guide, torch.randn(5, 4), num_epochs=1, device="cuda")


def test_an_objective_with_a_capacity_is_no_bound():
    vae = linear_vae(2, 4)
    with pytest.warns(UserWarning, match="fit ended at beta = 1 and a capacity: its losses are no bound"):
        fit(vae.model, vae.guide, torch.randn(5, 4), num_epochs=1, loss=BetaELBO(1.0, capacity=3.0))


def test_a_result_is_short_in_print():
    vae, x = linear_vae(2, 4), torch.randn(5, 4)
    result = fit(vae.model, vae.guide, x, num_epochs=3, validation_data=x)
    expected = f"FitResult(3 epochs, 3 steps, last loss {result.loss[-1]:.3f}, best validation loss "
    assert str(result) == repr(result) == f"{expected}{min(result.validation_loss):.3f} at [{result.best_epoch}])"
    assert repr(FitResult()) == "FitResult(0 epochs, 0 steps)"
