"""Kinds of models that went wrong once when they were compiled: losses and side effects are those of plain Pyro."""

import argparse
import collections
import copy
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_vae import CompiledELBO

X = torch.linspace(-1, 1, 12).reshape(6, 2)
FACTOR = {"v": 1.0}


def guide(x, *rest):
    loc = pyro.param("loc", torch.zeros(6, 2))
    pyro.sample("z", dist.Normal(loc, 0.5).to_event(2))


def model_of(function, likelihood=dist.Normal):
    def model(x, *rest):
        z = pyro.sample("z", dist.Normal(torch.zeros(6, 2), 1.0).to_event(2))
        pyro.sample("x", likelihood(function(z, *rest), 1.0).to_event(2), obs=x)

    return model


class Scaled(dist.Normal):
    """A distribution of the user's: a library calls its log_prob."""

    def log_prob(self, value):
        return super().log_prob(value) * FACTOR["v"]


class Reversed(torch.autograd.Function):
    sign = 1.0

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * Reversed.sign


class Named:
    def __init__(self):
        self.beta_1 = self.gamma = 1.0

    def dynamic(self, z):
        return z * getattr(self, f"beta_{1}")

    def listed(self, z):
        for name in ("gamma", "beta_1"):
            z = z * getattr(self, name)
        return z


class Subclass(AutoNormal):
    pass


def trial(make):
    """Losses, random numbers afterwards and whatever the case counts, of plain Pyro and of a compiled run."""
    results = []
    for elbo in (Trace_ELBO(), CompiledELBO(backend="eager")):
        pyro.clear_param_store()
        FACTOR["v"], Reversed.sign = 1.0, 1.0
        torch.manual_seed(0)
        model, guide_, change, count = make()
        svi = SVI(model, guide_, pyro.optim.Adam({"lr": 0.02}), loss=elbo)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = []
            for step in range(24):
                arguments = change(step) or ()
                losses.append(svi.step(X, *arguments))
        results.append((torch.tensor(losses), torch.rand(2), count()))
    return results, elbo


def nothing(step):
    pass


def user_distribution():
    return model_of(lambda z: z, Scaled), guide, lambda i: FACTOR.update(v=1.0 + (i > 9)), lambda: 0


def autograd_function():
    def change(step):
        Reversed.sign = 1.0 if step < 9 else -1.0

    def guide(x):
        pyro.sample("z", dist.Normal(Reversed.apply(pyro.param("loc", torch.zeros(6, 2))), 0.5).to_event(2))

    return model_of(lambda z: z), guide, change, lambda: 0


def dynamic_names():
    named = Named()
    return model_of(named.dynamic), guide, lambda i: setattr(named, "beta_1", 1.0 + i // 10), lambda: 0


def names_in_a_tuple():
    named = Named()
    return model_of(named.listed), guide, lambda i: setattr(named, "gamma", 1.0 + i // 10), lambda: 0


def a_bound_method_of_a_dict():
    table = {"k": 1.0}
    get = table.get
    return model_of(lambda z: z * get("k")), guide, lambda i: table.update(k=1.0 + i // 10), lambda: 0


def the_order_of_a_dict():
    table = collections.OrderedDict(a=1.0, b=2.0)

    def last_wins(z):
        for factor in table.values():
            z = factor + z * factor
        return z

    return model_of(last_wins), guide, lambda i: table.move_to_end("a") if i == 9 else None, lambda: 0


def a_negative_zero():
    box = [0.0]
    change = lambda i: box.__setitem__(0, 0.0 if i < 9 else -0.0)  # noqa: E731
    return model_of(lambda z: z * math.copysign(2.0, box[0])), guide, change, lambda: 0


def a_long_list():
    numbers = [1.0] * 3000
    return model_of(lambda z: z * numbers[7]), guide, lambda i: numbers.__setitem__(7, 1.0 + i // 10), lambda: 0


def a_large_array():
    numbers = np.ones(20_000)
    return model_of(lambda z: z * float(numbers[7])), guide, lambda i: numbers.__setitem__(7, 1.0 + i // 10), lambda: 0


def a_namespace():
    state = argparse.Namespace(seen=[], pair=(0, 0))

    def f(z):
        state.seen.append(1)
        state.pair = (len(state.seen), 0)
        return z * (1 + 0.1 * (state.pair[0] // 5))

    return model_of(f), guide, nothing, lambda: len(state.seen)


def a_dict_that_is_filled():
    filled = []

    def change(step):
        filled.append({})
        return (filled[-1],)

    return model_of(lambda z, out: out.setdefault("z", z)), guide, change, lambda: sum(map(len, filled))


def a_lstm():
    network = nn.LSTM(2, 2)

    def f(z):
        pyro.module("lstm", network)
        return network(z[:, None])[0][:, 0]

    return model_of(f), guide, nothing, lambda: 0


def a_sparse_matrix():
    matrix = torch.eye(6).to_sparse()
    return model_of(lambda z: torch.sparse.mm(matrix, z)), guide, nothing, lambda: 0


def a_codebook():
    """A parameter that the model updates itself."""
    code = nn.Parameter(torch.zeros(2))

    def f(z):
        with torch.no_grad():
            code.mul_(0.9).add_(z.mean(0))
        return z + code.detach()

    return model_of(f), guide, nothing, lambda: code.detach().clone()


def an_argument_in_place():
    data = torch.ones(2)

    def f(z, scale):
        scale.mul_(0.99)
        return z * scale

    return model_of(f), guide, lambda step: (data,), lambda: data.clone()


def a_seed_inside():
    def f(z):
        torch.manual_seed(3)
        return z + torch.randn(2)

    return model_of(f), guide, nothing, lambda: 0


def an_optimizer_inside():
    factor = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([factor], lr=0.1)

    def f(z):
        optimizer.zero_grad()
        (factor - z.detach()).square().sum().backward()
        optimizer.step()
        return z * factor.detach()

    return model_of(f), guide, nothing, lambda: factor.detach().clone()


def hooks_of_parameters(kind):
    def make():
        network, fired = nn.Linear(2, 2), []
        hook = lambda p: fired.append(1)  # noqa: E731
        getattr(network.weight, kind)(hook)

        def f(z):
            pyro.module("network", network)
            return network(z)

        return model_of(f), guide, nothing, lambda: len(fired)

    return make


def a_subclass_of_an_autoguide():
    model = model_of(lambda z: z)
    return model, Subclass(model), nothing, lambda: 0


COMPILED = [
    *(user_distribution, autograd_function, dynamic_names, names_in_a_tuple, a_bound_method_of_a_dict),
    *(the_order_of_a_dict, a_negative_zero, a_long_list, a_large_array, a_sparse_matrix, a_codebook),
    *(an_argument_in_place, hooks_of_parameters("register_post_accumulate_grad_hook"), a_subclass_of_an_autoguide),
]
LEFT_TO_PYRO = [
    *(a_namespace, a_dict_that_is_filled, a_lstm, a_seed_inside, an_optimizer_inside),
    hooks_of_parameters("register_hook"),
]


@pytest.mark.parametrize("make", COMPILED + LEFT_TO_PYRO, ids=lambda make: make.__name__)
def test_losses_and_side_effects_are_those_of_pyro(make):
    (expected, found), compiled = trial(make)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert bool(compiled.reasons) == (make in LEFT_TO_PYRO)


def test_the_sign_of_a_gradient_is_audited():
    """Nobody watches this one, and its norm stays as it is."""
    sign = np.ones(200_000)  # too large to be watched

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float(sign[0])

    def guide(x):
        pyro.sample("z", dist.Normal(Hidden.apply(pyro.param("loc", torch.zeros(6, 2))), 0.5).to_event(2))

    model, compiled = model_of(lambda z: z), CompiledELBO(backend="eager")
    for _ in range(5):
        compiled.loss_and_grads(model, guide, X)
    sign[0] = -1.0
    with pytest.warns(UserWarning, match="an audit found that replay 4 of a recording gives a gradient of norm"):
        compiled.loss_and_grads(model, guide, X)


def test_a_copy_of_a_used_objective_and_a_setting_of_the_wrapper():
    model, compiled = model_of(lambda z: z), CompiledELBO(backend="eager")
    for _ in range(3):
        compiled.loss_and_grads(model, guide, X)
    other = copy.deepcopy(compiled)
    other.num_particles = 3
    assert (compiled.num_particles, other.elbo.num_particles) == (1, 3)
    assert len(compiled.plans) == 1
    torch.manual_seed(0)
    value = other.loss_and_grads(model, guide, X)
    torch.manual_seed(0)
    assert value == Trace_ELBO(num_particles=3).loss_and_grads(model, guide, X)
