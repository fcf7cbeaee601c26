"""Whatever requires a gradient and the loss reaches, trains, wherever the pair keeps it."""

import copy
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_vae import ImportanceWeightedELBO, fit
from pyro_vae.pairs.parameters import graph_leaves, participants

unregistered = pytest.mark.filterwarnings("ignore:fit. trains .* not registered with Pyro:UserWarning")
X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) + 3.0


class WithList(nn.Module):
    """Weights in a `ParameterList`, in a `ParameterDict`, and of a child that is never called."""

    def __init__(self):
        super().__init__()
        self.shifts = nn.ParameterList([torch.zeros(3), torch.zeros(3)])
        self.scales = nn.ParameterDict({"x": torch.zeros(3)})
        self.child = nn.Linear(3, 2, bias=False)
        self.spread = nn.Parameter(torch.zeros(2))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z @ self.child.weight + self.shifts[0] + self.shifts[1]
            pyro.sample("x", dist.Normal(loc, self.scales["x"].exp()).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc = (x - self.shifts[0]) @ self.child.weight.T
            pyro.sample("z", dist.Normal(loc, self.spread.exp()).to_event(1))


class Constrained(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.ones(3), dist.constraints.positive)
        self.loc = nn.Parameter(torch.zeros(3))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.loc + z.unsqueeze(-1), self.scale).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - self.loc).mean(-1), 0.5))


def in_a_closure():
    weight = torch.zeros(3, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(weight, 1.0).to_event(1), obs=x)

    return model, lambda x: None, [weight]


def of_a_module(module):
    return module.model, module.guide, list(module.parameters())


PAIRS = {
    "lists and children": lambda: of_a_module(WithList()),
    "PyroModule": lambda: of_a_module(Constrained()),
    "a closure": in_a_closure,
}
ELBOS = [Trace_ELBO(), TraceMeanField_ELBO(), ImportanceWeightedELBO(3)]


@unregistered
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("elbo", ELBOS, ids=lambda elbo: type(elbo).__name__)
@pytest.mark.parametrize("name", PAIRS)
def test_every_parameter_moves(name, elbo, compile, request):
    if type(elbo) is not Trace_ELBO or name != "a closure":  # one has generated code
        request.getfixturevalue("by_operation")
    model, guide, parameters = PAIRS[name]()
    before = [p.detach().clone() for p in parameters]
    fit(model, guide, X, num_epochs=2, batch_size=20, loss=copy.copy(elbo), learning_rate=0.1, compile=compile, seed=0)
    for p, old in zip(parameters, before, strict=True):
        assert not torch.isclose(p, old).any()


def two_nets(register):
    encoder, decoder = nn.Linear(3, 2), nn.Linear(1, 3)

    def model(x):
        if "decoder" in register:
            pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        if "encoder" in register:
            pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return model, guide, {"encoder": encoder, "decoder": decoder}


@pytest.mark.parametrize("register", [(), ("encoder",), ("decoder",), ("encoder", "decoder")])
def test_what_is_named_is_what_svi_does_not_train(register):
    """fit trains all; those that SVI leaves as they are, it says."""
    model, guide, nets = two_nets(register)
    before = {name: copy.deepcopy(net) for name, net in nets.items()}
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(X)
    left = {name for name, net in nets.items() if torch.equal(net.weight, before[name].weight)}
    assert left == nets.keys() - set(register)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, guide, X, num_epochs=2, batch_size=20, learning_rate=0.1, seed=0)
    assert len(caught) == (1 if left else 0)
    if left:
        message = str(caught[0].message)
        assert caught[0].filename == __file__
        assert f"trains {2 * len(left)} of 4 parameters that are not registered with Pyro: 'weight' of " in message
        assert 'Try pyro.module("net", net)' in message
    assert not any(torch.equal(net.weight, before[name].weight) for name, net in nets.items())


def test_a_pyro_module_that_is_called_is_registered():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = PyroParam(torch.zeros(3))
            self.scale = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.loc, self.scale.exp()).to_event(1), obs=x)

    for local in (False, True):
        with pyro.settings.context(module_local_params=local):
            fit(Model(), lambda x: None, X, num_epochs=1, seed=0)
        pyro.clear_param_store()


def test_sparse_gradients_are_refused():
    """torch has no norm of them, and its Adam takes none."""
    net, index = nn.Embedding(40, 3, sparse=True), torch.arange(40)

    def model(i, x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(i), 1.0).to_event(1), obs=x)

    before = net.weight.detach().clone()
    with pytest.raises(ValueError, match=r"got sparse ones of 'net\$\$\$weight'.*Try nn.Embedding\(…, sparse=False\)"):
        fit(model, lambda i, x: None, (index, X), num_epochs=2, batch_size=20)
    assert torch.equal(net.weight, before)
    assert net.weight.grad is None
    net.sparse = False
    fit(model, lambda i, x: None, (index, X), num_epochs=500, batch_size=20, learning_rate=0.05, seed=0)
    torch.testing.assert_close(net.weight.detach(), X, atol=0.05, rtol=0)


def test_what_trains_are_the_leaves_of_the_loss():
    """The same tensors that a backward pass of the ELBO gives a gradient to."""
    pair = WithList()
    found = participants(pair.model, pair.guide, (X,), {})
    Trace_ELBO().differentiable_loss(pair.model, pair.guide, X).backward()
    assert {id(p) for p in found.parameters.values()} == {id(p) for p in pair.parameters() if p.grad is not None}
    assert set(found.parameters) == {name for name, _ in pair.named_parameters()}


def test_parameters_that_the_loss_does_not_reach_are_named():
    class Unused(WithList):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(2, 2)

        def guide(self, x):
            pyro.module("pair", self)
            super().guide(x)

    pair = Unused()
    with pytest.warns(UserWarning, match=r"does not reach 2 of 7 parameters.*'pair\$\$\$spare.weight'") as caught:
        fit(pair.model, pair.guide, X, num_epochs=2, seed=0)
    assert len(caught) == 1


def test_an_objective_that_sees_no_parameter_says_so():
    """RenyiELBO differentiates only where a parameter passes through `pyro.param`; nothing would move, silently."""
    pair = Constrained()
    with pytest.warns(UserWarning, match=r"does not reach 2 of 2 parameters.*'scale_unconstrained', 'loc'"):
        fit(pair.model, pair.guide, X, num_epochs=1, loss=RenyiELBO(num_particles=3), seed=0)


@unregistered
def test_frozen_parameters_stay():
    pair = WithList()
    pair.child.weight.requires_grad_(False)
    before = pair.child.weight.clone()
    fit(pair.model, pair.guide, X, num_epochs=2, learning_rate=0.1, seed=0)
    assert torch.equal(pair.child.weight, before)


def test_leaves_of_a_graph():
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    assert {id(t) for t in graph_leaves((a * b).sum(), (b + 1).sum())} == {id(a), id(b)}
    assert graph_leaves(c)[0] is c
    assert graph_leaves(torch.ones(2)) == []


@unregistered
def test_a_fit_of_modules_in_training_mode_leaves_them_there():
    """The looks run in evaluation mode: batch norm counts the steps, and nothing else."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([len(x), 3]).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))

    pair = Normed()
    fit(pair.model, pair.guide, X, num_epochs=3, batch_size=20, compile=False, seed=0)
    assert pair.encoder[1].num_batches_tracked == 6
    assert all(module.training for module in pair.modules())


@unregistered
def test_looking_before_training_is_no_step():
    """A model that counts its own runs, as for a warm-up, has counted the steps."""

    class Warming(nn.Module):
        def __init__(self):
            super().__init__()
            self.runs, self.loc = 0, nn.Parameter(torch.zeros(()))

        def model(self, x):
            self.runs += 1
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(self.loc, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((x + self.loc) / 2, 0.7))

    pair = Warming()
    result = fit(pair.model, pair.guide, X[:, 0], num_epochs=3, batch_size=20, compile=False, seed=0)
    assert pair.runs == result.num_steps == 6
