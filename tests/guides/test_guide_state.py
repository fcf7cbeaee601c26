"""What a guide keeps, shares and leaves alone: weights, names, copies, modes, random states."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from test_guide_errors import model, rows, shared
from torch import nn

from pyro_vae import importance_sampling
from pyro_vae.guides import AmortizedFlow, AmortizedNormal
from pyro_vae.networks import MLP


def test_two_guides_do_not_meet_in_the_parameter_store():
    """Each trains its own weights, under a name of its own; a name that another's weight has is refused."""
    x = torch.zeros(3, 1)
    first, second = (AmortizedNormal(model, MLP(1, [4])) for _ in range(2))
    for guide in (first, second):
        before = None
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        guide(x)
        before = [p.clone() for p in guide.head.parameters()]
        svi.step(x)
        assert all(not torch.equal(p, b) for p, b in zip(guide.head.parameters(), before, strict=True))
    names = {name.partition("$$$")[0] for name in pyro.get_param_store().keys()}  # noqa: SIM118
    assert names == {"AmortizedNormal", "AmortizedNormal_2"}
    pyro.clear_param_store()
    pyro.param("mine$$$head.head.weight", torch.zeros(1))
    with pytest.raises(ValueError, match=r"guide 'mine': Pyro's parameter store already holds .*Try another name"):
        AmortizedNormal(model, MLP(1, [4]), name="mine")(x)


def test_looking_changes_no_random_state():
    x = torch.zeros(3, 1)
    guide = AmortizedFlow(model, MLP(1, [4]))
    guide(x)
    state = torch.get_rng_state()
    guide.get_posterior(x)
    guide.median(x)
    guide.quantiles([0.1, 0.9], x)
    guide.sample_posterior(x, num_samples=3, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["get_posterior", "median", "sample_posterior"])
def test_any_call_may_be_the_first(method):
    """Also with an autoguide outside, which knows nothing before a call of its own."""
    x = torch.zeros(3, 1)
    guide = AmortizedNormal(shared, MLP(1, [4]), given=["centre"])
    getattr(guide, method)(x)
    assert guide.median(x).keys() == {"centre", "z"}
    assert all(p.requires_grad and p.is_leaf for p in guide.outside.parameters())


def test_what_is_observed_outside_of_the_plate_is_a_constant():
    """A factor for all data stops the guide's look before its latents, and not the guide's own walk."""

    def with_factor(x):
        model(x)
        pyro.factor("all", torch.tensor(0.3))

    x = torch.randn(8, 1)
    guide = AmortizedNormal(with_factor, MLP(1, [4]))
    with_it = importance_sampling(with_factor, guide, x, num_particles=200, seed=0, progress=False)
    without = importance_sampling(model, guide, x, num_particles=200, seed=0, progress=False)
    assert torch.equal(with_it.log_evidence, without.log_evidence)


def test_a_support_that_is_a_parameter():
    bound = nn.Parameter(torch.tensor(0.5))

    def bounded(x):
        b = pyro.param("bound", bound)
        rows(x, lambda: pyro.sample("z", dist.Uniform(-b, b)))

    guide = AmortizedNormal(bounded, MLP(1, [4]))
    svi = SVI(bounded, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step(torch.zeros(3, 1))
    assert not guide.centre.requires_grad


def test_a_function_with_parameters_of_pyros_trains_as_a_network():
    def network(x):
        return (x @ pyro.param("weight", torch.ones(1, 4))).tanh()

    guide = AmortizedNormal(model, network)
    guide(torch.zeros(3, 1))  # a first call asks the network once more
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):  # the head starts with weights of the mean alone
        svi.step(torch.randn(8, 1))
    assert not torch.equal(pyro.param("weight"), torch.ones(1, 4))


class Bounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.bound = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        pyro.module("bounded", self)
        rows(x, lambda: pyro.sample("z", dist.Uniform(-self.bound.exp(), self.bound.exp())))


def test_a_copy_is_a_guide_of_the_same_model():
    """Supports follow the model's parameters; of a model that is copied with it, those of the copy."""
    x, module = torch.zeros(3, 1), Bounded()
    guide = AmortizedNormal(module, MLP(1, [4]))
    guide(x)
    alone, (own, together) = copy.deepcopy(guide), copy.deepcopy((module, guide))
    assert alone.model is module
    assert together.model is own
    assert own is not module
    assert not {id(p) for p in alone.parameters()} & {id(p) for p in guide.parameters()}


def test_quantiles_under_a_bijection_that_falls():
    class Below(dist.TorchDistribution):
        """z < 2."""

        arg_constraints = {}  # noqa: RUF012
        support = constraints.less_than(2.0)
        has_rsample = True

        def __init__(self, batch_shape=()):
            super().__init__(torch.Size(batch_shape), validate_args=False)

        def expand(self, batch_shape, _instance=None):
            return Below(batch_shape)

        def rsample(self, sample_shape=()):
            return 2 - torch.empty(torch.Size(sample_shape) + self.batch_shape).exponential_()

        def log_prob(self, value):
            return value - 2

    def below(x):
        rows(x, lambda: pyro.sample("z", Below()))

    x = torch.zeros(2, 1)
    guide = AmortizedNormal(below, MLP(1, [4]))
    levels = [0.9, 0.1, 0.5]
    found = guide.quantiles(levels, x)["z"]
    draws = guide.sample_posterior(x, num_samples=5000, seed=0)["z"]
    for level, quantile in zip(levels, found, strict=True):
        assert ((draws <= quantile).double().mean(0) - level).abs().max() < 0.03


def test_what_is_asked_of_it_runs_in_evaluation_mode():
    network = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    guide = AmortizedFlow(model, network)
    x = torch.randn(8, 1)
    guide(x)
    before = network[1].num_batches_tracked.item()
    u = torch.zeros(8, 1)
    assert torch.equal(guide.get_posterior(x).log_prob(u), guide.get_posterior(x).log_prob(u))
    assert torch.equal(guide.median(x)["z"], guide.median(x)["z"])
    assert network[1].num_batches_tracked.item() == before
    assert network.training
