"""fit: keyword arguments, batches of a DataLoader, and what is no tensor, are what SVI is given by hand."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.utils.data import DataLoader, Dataset
from truths import linear_vae

from pyro_vae import fit
from pyro_vae.training.data import Batches

N = 60
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 3, generator=GENERATOR) + 2.0
Y = X @ torch.tensor([1.0, -2.0, 0.5]) + 0.1 * torch.randn(N, generator=GENERATOR)


class Regression(nn.Module):
    """y ~ N(w·x + offset of its kind, noise²), with everything by keyword."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def model(self, *, x, y=None, noise=1.0, kinds=None, offsets=None):
        pyro.module("regression", self)
        loc = self.linear(x).squeeze(-1)
        if kinds is not None:
            loc = loc + torch.stack([offsets[k] for k in kinds])
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, noise), obs=y)

    def guide(self, **_):
        pass


def made():
    pyro.clear_param_store()
    torch.manual_seed(1)
    return Regression()


def by_hand(steps, batches, num_epochs, **shared):
    """The weights after gradient steps on the mean loss of these batches."""
    net = made()
    optim = torch.optim.SGD(net.parameters(), lr=0.05)
    losses = []
    for _ in range(num_epochs):
        total = 0.0
        for batch in batches():
            optim.zero_grad()
            loss = Trace_ELBO().differentiable_loss(net.model, net.guide, **batch, **shared) / len(batch["x"])
            loss.backward()
            optim.step()
            total += loss.item() * len(batch["x"])
        losses.append(total / N)
    return list(net.parameters()), losses


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def assert_same(net, result, expected):
    parameters, losses = expected
    assert result.loss == pytest.approx(losses, rel=1e-5)
    for a, b in zip(net.parameters(), parameters, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("numpy", [False, True])
def test_a_dict_is_keyword_arguments_shuffled_together(compile, numpy):
    """The same rows of each tensor, in the order of torch's generator; what all share comes by functools.partial."""
    torch.manual_seed(3)
    orders = [torch.randperm(N) for _ in range(4)]
    epochs = iter(orders)
    expected = by_hand(4, lambda: ({"x": X[r], "y": Y[r]} for r in next(epochs).split(25)), 4, noise=0.5)
    net = made()
    data = {"x": X.numpy(), "y": Y.numpy()} if numpy else {"x": X, "y": Y}
    result = fit(
        partial(net.model, noise=0.5), partial(net.guide, noise=0.5), data,
        num_epochs=4, batch_size=25, optimizer=sgd, seed=3, compile=compile,
    )  # fmt: skip
    assert result.num_steps == 12
    assert_same(net, result, expected)


class Kinds(Dataset):
    """Rows with a tensor, a number and a string."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"x": X[i], "y": Y[i], "kinds": "ab"[i % 2]}


@pytest.mark.parametrize("compile", [False, True])
def test_a_loader_of_dicts_with_strings(compile):
    offsets = {"a": torch.tensor(1.0), "b": torch.tensor(-1.0)}

    def batches():
        for rows in torch.arange(N).split(20):
            yield {"x": X[rows], "y": Y[rows], "kinds": ["ab"[i % 2] for i in rows.tolist()]}

    expected = by_hand(3, batches, 5, offsets=offsets)
    net = made()
    model, guide = partial(net.model, offsets=offsets), net.guide
    result = fit(
        model, guide, DataLoader(Kinds(), batch_size=20), num_epochs=5, optimizer=sgd, compile=compile,
    )  # fmt: skip
    assert_same(net, result, expected)


def objects(batch):
    """An object of its own for each batch, numpy arrays, and numbers that move."""
    rows = torch.tensor(batch)
    return X[rows].numpy(), Span(rows.float().mean().item() / N), rows.tolist()


class Span:
    def __init__(self, value):
        self.value = value


@pytest.mark.filterwarnings(
    "ignore:CompiledELBO. Pyro runs as it is"
)  # where no object takes another's place in memory
@pytest.mark.parametrize("compile", [False, True])
def test_a_loader_of_tuples_with_objects_and_lists(compile):
    """Positional arguments of any kind; each batch has its own, also where steps are recorded."""
    weight = torch.zeros(3, requires_grad=True)

    def model(x, span, rows):
        pyro.param("weight", weight)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(weight + span.value + 0.01 * rows[0], 1.0).to_event(1), obs=x)

    def guide(x, span, rows):
        pass

    result = fit(
        model, guide, DataLoader(range(N), batch_size=20, collate_fn=objects), num_epochs=30, optimizer=sgd,
        compile=compile,
    )  # fmt: skip
    w, losses = torch.zeros(3), []
    for _ in range(30):
        total = 0.0
        for rows in torch.arange(N).split(20):
            residual = X[rows] - w - rows.float().mean() / N - 0.01 * rows[0]
            total += (0.5 * residual.square() + 0.5 * np.log(2 * np.pi)).sum().item()
            w = w + 0.05 * residual.mean(0)
        losses.append(total / N)
    assert result.loss == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(weight.detach(), w)


def test_a_vae_by_keyword_is_the_same(tmp_path):
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    runs = []
    for data in (x, {"x": x}):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = linear_vae(2, 4)
        result = fit(vae.model, vae.guide, data, num_epochs=3, batch_size=20, validation_data=data, patience=2, seed=0)
        runs.append((result.loss, result.validation_loss, *(p.tolist() for p in vae.parameters())))
    assert runs[0] == runs[1]


def test_it_goes_on_from_a_checkpoint(tmp_path):
    data, path = {"x": X, "y": Y}, tmp_path / "fit.pt"
    options = {"batch_size": 25, "seed": 0, "learning_rate": 0.01}
    whole = made()
    expected = fit(whole.model, whole.guide, data, num_epochs=4, **options)
    half = made()
    fit(half.model, half.guide, data, num_epochs=2, checkpoint=path, **options)
    again = made()
    result = fit(again.model, again.guide, data, num_epochs=4, checkpoint=path, **options)
    assert result.loss == expected.loss
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_rows_of_a_dict_are_checked_by_site():
    net, y = made(), Y.clone()
    y[41] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 60 rows are NaN or infinite, the first at row 41"):
        fit(net.model, net.guide, {"x": X, "y": y}, num_epochs=1, batch_size=10)

    def counts(x, k):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Poisson(net.linear(x).squeeze(-1).exp()), obs=k)

    k = torch.arange(N).float()
    k[50] = -1
    with pytest.raises(ValueError, match=r"site 'k': 1 of 60 rows lie outside .* first at row 50"):
        fit(counts, lambda x, k: None, {"x": X, "k": k}, num_epochs=1, batch_size=10)


def test_a_support_of_each_row_is_left_to_pyro():
    """x ~ Uniform(0, 5 softplus(w)): bounds that the batch has, which say nothing of other rows."""
    net = nn.Linear(3, 1)

    def model(x, y):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Uniform(0.0, 5 + net(x).exp().squeeze(-1)), obs=y)

    fit(model, lambda x, y: None, (X, torch.rand(N)), num_epochs=2, batch_size=20)
    with pytest.raises(ValueError, match="support"):
        fit(model, lambda x, y: None, (X, -torch.ones(N)), num_epochs=2, batch_size=20)


def test_an_autoguide_with_keyword_data_and_shared_arguments():
    """m ~ N(0, 10²), x ~ N(m, s²) with s shared by all: the posterior is known."""

    def model(*, x, s):
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pyro.plate("data", N, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(m, s), obs=x)

    model = partial(model, s=2.0)
    guide = AutoNormal(model)
    fit(
        model, guide, {"x": X[:, 0]}, num_epochs=400, batch_size=20, learning_rate=0.03, seed=0,
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.99),
        loss=Trace_ELBO(num_particles=10, vectorize_particles=True),
    )  # fmt: skip
    precision = N / 4 + 0.01
    assert guide.median()["m"].item() == pytest.approx(X[:, 0].sum().item() / 4 / precision, abs=0.03)
    assert guide._get_loc_and_scale("m")[1].item() == pytest.approx(precision**-0.5, rel=0.15)


def test_batches_of_a_dict_keep_their_rows_together():
    data = {"a": torch.arange(10), "b": torch.arange(10) * 2}
    seen = []
    for batch in Batches(data, 4).shuffled():
        assert batch.args == ()
        assert torch.equal(batch.kwargs["b"], 2 * batch.kwargs["a"])
        assert torch.equal(batch.kwargs["a"], batch.rows)
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(10))
    assert seen != list(range(10))


def test_svi_takes_the_same_pair_and_arguments():
    """What fit has trained, SVI goes on with, by the same names."""
    net = made()
    fit(net.model, net.guide, {"x": X, "y": Y}, num_epochs=2)
    before = net.linear.weight.detach().clone()
    SVI(net.model, net.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x=X, y=Y)
    assert not torch.equal(net.linear.weight, before)
    assert pyro.param("regression$$$linear.weight") is net.linear.weight
