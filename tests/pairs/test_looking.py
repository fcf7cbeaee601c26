"""A look changes nothing: guides that set themselves up, objects with state, modes, random states."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoHierarchicalNormalMessenger, AutoNormal, AutoNormalMessenger
from pyro.nn import PyroModule
from torch import nn

from pyro_vae import draw_particles, importance_sampling
from pyro_vae.pairs.pair import Pair

X = torch.linspace(-1.0, 1.0, 10)
EXACT = dist.Normal(0.0, 2**0.5).log_prob(X)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def own_parameters(x):
    """One location for each data point, made on the first run."""
    loc = pyro.param("loc", lambda: torch.zeros(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.5**0.5))


class Easy(EasyGuide):
    def guide(self, x):
        with self.plate("data", len(x)):
            loc = pyro.param("loc", torch.zeros(len(x), 1))
            self.group(".*").sample("u", dist.Normal(loc, 0.5**0.5).to_event(1))


GUIDES = {
    "pyro.param": lambda: own_parameters,
    "AutoNormal": lambda: AutoNormal(model, init_scale=1.0),
    "AutoNormalMessenger": lambda: AutoNormalMessenger(model, init_scale=1.0),
    "AutoHierarchicalNormalMessenger": lambda: AutoHierarchicalNormalMessenger(model, init_scale=1.0),
    "EasyGuide": lambda: Easy(model),
}


def train(guide, steps):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    return [svi.step(X) for _ in range(steps)]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", GUIDES)
def test_guides_that_set_themselves_up_go_on_working(name, trained):
    guide = GUIDES[name]()
    if trained:
        train(guide, 20)
    evidence = importance_sampling(model, guide, X, num_particles=4000, progress=False)
    assert ((evidence.log_evidence - EXACT).abs() < 5 * evidence.standard_error + 1e-3).all()
    shapes = {tuple(p.shape) for p in pyro.get_param_store().values()}
    assert shapes <= {(10,), (10, 1)}
    losses = train(guide, 200)
    assert np.mean(losses[-20:]) < -EXACT.sum() + 1.0


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_is_set_up_by_a_look_as_by_its_first_step(name):
    """The same parameters, and then the same losses under one seed."""
    losses = []
    for look in (False, True):
        pyro.clear_param_store()
        guide = GUIDES[name]()
        if look:
            Pair(model, guide, (X,))
        else:
            guide(X)
        pyro.set_rng_seed(1)
        losses.append(train(guide, 5))
    assert losses[0] == losses[1]


class Counting(nn.Module):
    """A model and guide with state of many kinds, and a batch norm in training mode."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.calls, self.seen, self.by_name, self.last = 0, [], {}, None
        self.register_buffer("total", torch.zeros(1))

    def note(self, x):
        self.calls += 1
        self.seen.append(len(x))
        self.by_name[f"run {self.calls}"] = x
        self.last = x
        self.total += 1
        random.random(), np.random.rand(), torch.rand(1)

    def model(self, x):
        self.note(x)
        model(x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        self.note(x)
        assert not self.training  # which dropout may be told by
        loc, scale = self.encoder(x.unsqueeze(-1)).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()))


def test_a_look_changes_nothing():
    pair = Counting()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    buffers = {name: b.clone() for name, b in pair.named_buffers()}
    Pair(pair.model, pair.guide, (X,)).check_vectorized()
    assert (pair.calls, pair.seen, pair.by_name, pair.last) == (0, [], {}, None)
    for name, b in pair.named_buffers():
        assert torch.equal(b, buffers[name]), name
    assert len(pyro.get_param_store()) == 0
    assert all(module.training for module in pair.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2][1])
    assert torch.is_grad_enabled()


def test_a_look_that_fails_leaves_nothing_either():
    pair = Counting()

    def broken(x):
        pair.guide(x)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Pair(pair.model, broken, (X,))
    assert len(pyro.get_param_store()) == 0
    assert all(module.training for module in pair.modules())


def test_two_names_of_one_tensor_are_known_afterwards():
    """A look gives a tensor a second name and takes it back; an optimizer still finds the first."""
    shared = nn.Linear(1, 2)

    def guide(x):
        pyro.module("second", shared)
        loc, scale = shared(x.unsqueeze(-1)).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()))

    pyro.module("first", shared)
    Pair(model, guide, (X,))
    store = pyro.get_param_store()
    assert {name.partition("$$$")[0] for name in store} == {"first"}
    assert store.param_name(shared.weight) == "first$$$weight"


def test_modules_of_pyro_are_looked_at_too():
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.network = PyroModule[nn.Linear](1, 2)

        def forward(self, x):
            loc, scale = self.network(x.unsqueeze(-1)).unbind(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, scale.exp()))

    guide = Guide()
    particles = draw_particles(model, guide, X, num_particles=3)
    assert particles.log_weight.shape == (3, 10)
    assert len(train(guide, 2)) == 2


def test_roles():
    def many(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            with pyro.plate("days", 3, dim=-2):
                pyro.sample("x", dist.Normal(z + k, 1.0), obs=x.expand(3, len(x)))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u))

    pair = Pair(many, guide, (X, X))
    roles = {name: site.role for name, site in pair.sites.items()}
    assert roles == {
        "u": "auxiliary",
        "z": "latent",
        "twice": "deterministic",
        "k": "enumerated",
        "x": "observed",
        "y": "observed",
    }
    assert pair.sites["x"].plates == ("days", "data")
    assert pair.rows.cut_keys == {0, 1}
    assert pair.rows.num_points == 10
    assert pair.summed == {"k"}
