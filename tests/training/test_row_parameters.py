"""fit: parameters of single rows meet their own rows, and latents of all rows count once."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from states import same, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from truths import small_vae

from pyro_vae import fit

N = 24
X = torch.randn(N, generator=torch.Generator().manual_seed(0))
LOSS = Trace_ELBO(num_particles=10, vectorize_particles=True)


def decay(optim):
    return torch.optim.lr_scheduler.ExponentialLR(optim, 0.99)


def local(x):
    """z_n ~ N(0, 1), x_n ~ N(z_n, 1): the posterior of each row is N(x_n/2, ½)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def of_params(x):
    loc = pyro.param("loc", lambda: torch.randn(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.5**0.5))


def by_index(i, x):
    with pyro.plate("data", N, subsample=i):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def by_index_params(i, x):
    with pyro.plate("data", N, subsample=i):
        loc = pyro.param("loc", lambda: torch.randn(N), event_dim=0)
        pyro.sample("z", dist.Normal(loc, 0.5**0.5))


def sequential(x):
    for n in pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{n}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{n}", dist.Normal(z, 1.0), obs=x[n])


def sequential_params(x):
    for n in pyro.plate("data", len(x)):
        pyro.sample(f"z_{n}", dist.Normal(pyro.param(f"loc_{n}", lambda: torch.randn(())), 0.5**0.5))


GUIDES = {
    "AutoNormal": lambda: AutoNormal(local),
    "AutoDelta": lambda: AutoDelta(local, init_loc_fn=lambda site: torch.randn(site["fn"].batch_shape)),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(local),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(local),
    "pyro.param": lambda: of_params,
}
PAIRS = {name: (lambda make=make: (local, make())) for name, make in GUIDES.items()}
PAIRS["sequential"] = lambda: (sequential, sequential_params)


@pytest.mark.parametrize("name", PAIRS)
def test_mini_batches_are_refused_and_change_nothing(name):
    model, guide = PAIRS[name]()
    for data in (X, DataLoader(TensorDataset(X), batch_size=8)):
        with pytest.raises(
            ValueError, match=r"parameters for each row of a batch \('.*'.*batches of 8 rows.*Try batch_size=24"
        ):
            fit(model, guide, data, num_epochs=1, batch_size=8)
        assert len(pyro.get_param_store()) == 0
    with pytest.raises(ValueError, match="that a DataLoader shuffles"):
        fit(model, guide, DataLoader(TensorDataset(X), batch_size=N, shuffle=True), num_epochs=1)
    fit(model, guide, X, num_epochs=1, loss=LOSS if name == "pyro.param" else None)  # the guide takes all rows still


@pytest.mark.parametrize(("name", "loader"), [*((name, False) for name in GUIDES), ("pyro.param", True)])
def test_all_rows_at_once_meet_their_own_parameters(name, loader):
    """Shuffled, as they were, all would share the mean of the data."""
    guide = GUIDES[name]()
    data = DataLoader(TensorDataset(X), batch_size=N) if loader else X
    fit(local, guide, data, num_epochs=300, learning_rate=0.1, loss=LOSS, scheduler=decay, seed=0)
    found = pyro.param("loc") if name == "pyro.param" else guide.median()["z"]
    torch.testing.assert_close(found.detach(), X / 2, atol=0.1, rtol=0)


def test_validation_rows_have_no_parameters():
    with pytest.raises(ValueError, match="validation_data: expected none where there are parameters for each row"):
        fit(local, AutoNormal(local), X, num_epochs=1, validation_data=X)


def plates(i, x):
    return pyro.plate("data", N, subsample=i)


@pytest.mark.parametrize("name", ["AutoNormal", "pyro.param"])
def test_rows_that_bring_their_index_may_come_in_mini_batches(name):
    """The plate takes the parameters of the rows that are there."""
    guide = AutoNormal(by_index, create_plates=plates) if name == "AutoNormal" else by_index_params
    data, options = (torch.arange(N), X), {"loss": LOSS, "scheduler": decay, "seed": 0}
    fit(by_index, guide, data, num_epochs=250, batch_size=8, learning_rate=0.05, **options)
    found = pyro.param("loc") if guide is by_index_params else guide.median(*data)["z"]
    torch.testing.assert_close(found.detach(), X / 2, atol=0.15, rtol=0)


def test_an_autoguide_whose_plate_draws_other_rows_is_refused():
    """Without create_plates it draws its own rows, whatever the model's index says."""
    with pytest.raises(ValueError, match="of an autoguide: create_plates"):
        fit(by_index, AutoNormal(by_index), (torch.arange(N), X), num_epochs=1, batch_size=8)


def test_a_plate_that_draws_its_own_rows_meets_others():
    """N locations, of which a plate draws B at random for whatever rows the batch holds."""

    def model(x):
        with pyro.plate("data", N, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="parameters for each row of a batch"):
        fit(model, AutoNormal(model), X, num_epochs=1, batch_size=8)


class Amortised(nn.Module):
    """ReLU networks as wide as the batch, and an embedding of as many rows: nothing of it belongs to a place."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
        self.decoder = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
        self.offsets = nn.Embedding(N, 1)

    def model(self, i, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = self.decoder(z.unsqueeze(-1)) + self.offsets(i)
            pyro.sample("x", dist.Normal(loc.squeeze(-1), 1.0), obs=x)

    def guide(self, i, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x.unsqueeze(-1)).squeeze(-1), 1.0))


@pytest.mark.parametrize("batch_size", [2, 3, 8, N])
def test_networks_and_embeddings_are_shuffled(batch_size):
    for seed in range(5):
        pyro.clear_param_store()
        torch.manual_seed(seed)
        pair = Amortised()
        fit(pair.model, pair.guide, (torch.arange(N), X), num_epochs=1, batch_size=batch_size, seed=0)


@pytest.mark.parametrize("x", [torch.zeros(16, 4, 4), torch.ones(16, 4, 4)])
def test_equal_rows_are_no_parameters_of_rows(x):
    vae = small_vae()
    fit(vae.model, vae.guide, x, num_epochs=1, batch_size=4)
    vae = Amortised()
    fit(vae.model, vae.guide, (torch.zeros(N, dtype=torch.long), torch.zeros(N)), num_epochs=1, batch_size=4)


# -- latents of all rows ----------------------------------------------------------------------------------------------


def mean(x, total=None):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x) if total is None else total, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def mean_guide(x, total=None):
    scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.0)), scale))


def trained(model, guide, batch_size):
    pyro.clear_param_store()
    fit(
        model, guide, X, num_epochs=300, batch_size=batch_size, learning_rate=0.03, loss=LOSS, seed=0,
        scheduler=decay,
    )  # fmt: skip
    return pyro.param("scale").item()


def test_a_global_latent_in_mini_batches_is_named():
    """m ~ N(0, 1), x ~ N(m, 1): its sd is 1/√(N + 1), and in batches that count as all data 1/√(B + 1)."""
    exact, wrong = (N + 1) ** -0.5, 9**-0.5
    assert trained(mean, mean_guide, N) == pytest.approx(exact, rel=0.1)
    with pytest.warns(UserWarning, match=r"got 'm' outside of it, .*8 rows.*weighs 3 times too much.*subsample"):
        assert trained(mean, mean_guide, 8) == pytest.approx(wrong, rel=0.1)
    model, guide = (partial(f, total=N) for f in (mean, mean_guide))
    assert trained(model, guide, 8) == pytest.approx(exact, rel=0.1)


def test_a_plate_that_draws_rows_is_trained():
    """Each step sees 5 of the rows of its batch; their mean is that of all."""

    def model(x):
        m = pyro.param("m", torch.zeros(()))
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            pyro.sample("x", dist.Normal(m, 1.0), obs=x[rows])

    decay = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.99)  # noqa: E731
    fit(model, lambda x: None, X, num_epochs=600, learning_rate=0.1, scheduler=decay, seed=0, progress=False)
    assert pyro.param("m").item() == pytest.approx(X.mean().item(), abs=0.05)


@pytest.mark.parametrize("what", ["data", "factor"])
def test_so_are_data_and_factors_outside_of_the_plate(what):
    """y = 10 with precision 1 beside N rows x: the mean is (Σ x + 10) / (N + 1), and y counts once for each batch."""

    def model(x):
        m = pyro.param("m", torch.zeros(()))
        if what == "data":
            pyro.sample("y", dist.Normal(m, 1.0), obs=torch.tensor(10.0))
        else:
            pyro.factor("y", -0.5 * (m - 10.0).square())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def found(batch_size):
        pyro.clear_param_store()
        decay = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.98)  # noqa: E731
        options = {"learning_rate": 0.3, "scheduler": decay, "seed": 0, "progress": False}
        fit(model, lambda x: None, X, num_epochs=300, batch_size=batch_size, **options)
        return pyro.param("m").item()

    assert found(N) == pytest.approx((X.sum().item() + 10) / (N + 1), abs=0.01)
    with pytest.warns(UserWarning, match=r"got 'y' outside of it, .*8 rows.*weighs 3 times too much.*subsample"):
        assert found(N // 3) == pytest.approx((X.sum().item() + 30) / (N + 3), abs=0.05)


def test_poutine_scale_is_taken_for_the_same():
    def model(x):
        with pyro.poutine.scale(scale=len(x) / N):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x):
        with pyro.poutine.scale(scale=len(x) / N):
            mean_guide(x)

    assert trained(model, guide, 8) == pytest.approx((N + 1) ** -0.5, rel=0.1)


def test_a_plate_of_another_name_is_found():
    def model(x, total=None):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("patients", total or len(x), subsample_size=len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    with pytest.warns(UserWarning, match=r"inside of plate 'patients'.*got 'm' outside"):
        fit(model, mean_guide, X, num_epochs=1, batch_size=8)
    pyro.clear_param_store()
    result = fit(partial(model, total=N), mean_guide, X, num_epochs=1, batch_size=8, learning_rate=1e-9, seed=0)
    pyro.clear_param_store()
    whole = fit(model, mean_guide, X, num_epochs=1, learning_rate=1e-9, seed=0)
    assert result.loss[0] == pytest.approx(whole.loss[0], rel=0.5)  # per row, not N/B times that


def test_a_loader_of_mini_batches_is_warned_of_too():
    with pytest.warns(UserWarning, match="got 'm' outside of it, in batches of 8 rows"):
        fit(mean, mean_guide, DataLoader(TensorDataset(X), batch_size=8), num_epochs=1)


def test_rows_without_a_plate_and_a_vae_are_silent():
    net = nn.Linear(1, 1)

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x), 1]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.squeeze(-1), 1.0), obs=x)

    def guide(x):
        pyro.module("net", net)
        pyro.sample("z", dist.Normal(net(x.unsqueeze(-1)), 1.0).to_event(2))

    fit(model, guide, X, num_epochs=1, batch_size=8)
    vae = small_vae()
    fit(vae.model, vae.guide, torch.zeros(16, 4, 4), num_epochs=1, batch_size=4)


def test_what_fit_refuses_svi_does_wrong_silently():
    """AutoNormal and shuffled batches, by hand: the locations of the places come out equal."""
    guide = AutoNormal(local)
    svi = SVI(local, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), LOSS)
    for _ in range(300):
        for rows in torch.randperm(N).split(8):
            svi.step(X[rows])
    assert guide.median()["z"].std() < 0.5 * (X / 2).std()
    before = weights(guide)
    with pytest.raises(ValueError, match="parameters for each row of a batch"):
        fit(local, guide, X, num_epochs=1, batch_size=8)
    assert same(before, weights(guide))


def test_rows_whose_covariate_is_zero():
    """A coefficient of all rows does nothing there; the parameters of single rows are found all the same."""
    x, t = torch.linspace(-2, 2, 6), torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])

    def model(x, t):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m * t, 1.0))
            pyro.sample("x", dist.Normal(z, 0.3), obs=x)

    guide = AutoNormal(model)
    fit(model, guide, (x, t), num_epochs=1000, learning_rate=0.02, seed=0)
    z = guide.median()["z"]
    assert (z - x / 1.09).abs()[t == 0].max() < 0.15  # without the coefficient: N(x/1.09, …)
