"""Fits that go wrong, and what they say."""

import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    Trace_ELBO,
)
from states import same, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from truths import LinearGaussian, linear_vae, small_vae

from pyro_vae import fit

# -- when it goes wrong -----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_step_site_and_row():
    vae = linear_vae(2, 4)
    x = LinearGaussian(2, 4).sample(30)
    x[17] = 1e30  # finite itself, but not its square
    before = weights(vae)
    with pytest.raises(
        ValueError, match=r"before step \d+: loss (inf|nan), from the .* of site '[zx]'.*row 17 of the data"
    ):
        fit(vae.model, vae.guide, x, num_epochs=1, batch_size=30, seed=0)
    assert same(before, weights(vae))


def test_the_last_finite_weights_stay():
    vae = linear_vae(2, 4)
    x = LinearGaussian(2, 4).sample(300)
    with pytest.raises(ValueError, match=r"fit stopped before step \d+: .*Try a lower learning_rate"):
        fit(
            vae.model, vae.guide, x, num_epochs=300, batch_size=20, seed=0,
            optimizer=lambda p: torch.optim.SGD(p, lr=1e3),
        )  # fmt: skip
    assert all(p.isfinite().all() for p in vae.parameters())
    assert all(p.grad is None for p in vae.parameters())


def test_a_gradient_that_is_not_finite_stops_too():
    weight = nn.Parameter(torch.zeros(()))

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return dist.Normal(self.weight.sqrt(), torch.ones_like(x))  # value 0, gradient infinite

    root = Root()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", root(x), obs=x)

    with pytest.raises(ValueError, match=r"loss [\d.]+, but a gradient of norm inf"):
        fit(model, lambda x: None, torch.ones(5), num_epochs=1)
    assert weight == 0


def test_two_modules_under_one_name_are_refused():
    """Pyro trains the first and leaves the second as it is, silently."""

    def pair():
        net = nn.Linear(3, 3)

        def model(x):
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(net(x), 1.0).to_event(1), obs=x)

        return model, lambda x: None

    x = torch.randn(10, 3)
    fit(*pair(), x, num_epochs=1)
    with pytest.raises(ValueError, match=r"holds another tensor under 'net\$\$\$(weight|bias)'.*clear_param_store"):
        fit(*pair(), x, num_epochs=1)
    pyro.clear_param_store()
    fit(*pair(), x, num_epochs=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": torch.zeros(0, 4)}, ValueError, "data is empty: expected at least one row"),
        ({"data": ()}, ValueError, "data is empty"),
        ({"data": (torch.zeros(3, 4), torch.zeros(2, 1))}, ValueError, r"as many rows in each tensor.*\[3, 2\]"),
        ({"data": [[1.0, 2.0]]}, TypeError, r"data\[0\]: expected a tensor, a numpy array.*got list"),
        ({"data": torch.zeros(())}, ValueError, r"data\[0\]: expected rows, got a scalar"),
        ({"data": torch.full((5, 4), math.nan)}, ValueError, "5 of 5 rows are NaN or infinite, the first at row 0"),
        ({"validation_data": torch.full((5, 4), math.inf)}, ValueError, "5 of 5 rows are NaN or infinite"),
        ({"num_epochs": 0}, ValueError, "num_epochs: expected at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"patience": 3}, ValueError, "patience needs validation_data"),
        ({"patience": 0, "validation_data": torch.randn(3, 4)}, ValueError, "patience: expected at least 1, got 0"),
        ({"clip_norm": -1.0}, ValueError, "clip_norm: expected a positive norm, got -1.0"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm: expected a positive norm, got 0.0"),
        ({"validation_data": torch.randn(3, 5)}, ValueError, r"validation_data: .*got rows of shape \(5,\)"),
        ({"device": "gpu"}, ValueError, "device: expected 'auto' or a device of torch, got 'gpu'"),
        ({"data": None}, TypeError, "got NoneType. Try a tensor of rows"),
        ({"data": {"y": torch.zeros(3, 4)}}, TypeError, "data is a dict: .*with the keyword arguments 'y'"),
        (
            {"data": {"x": torch.zeros(3, 4), "k": 3}},
            TypeError,
            r"data\['k'\]: .*got int. Try functools.partial",
        ),
        ({"data": {"x": torch.zeros(3, 4), "c": torch.zeros(2)}}, ValueError, r"of the dict, got \[3, 2\].*partial"),
        ({"data": (torch.zeros(3, 4), "name")}, TypeError, r"data\[1\]: .*got str. Try functools.partial\(model"),
        ({"data": {}}, ValueError, "data is empty"),
        ({"data": DataLoader(range(2), batch_size=4, drop_last=True)}, ValueError, "got one that yields none"),
        ({"data": DataLoader(["a"])}, TypeError, "with at least one tensor of rows in a tuple or dict, got str"),
        ({"data": TensorDataset(torch.zeros(3, 4))}, TypeError, "got TensorDataset. Try a DataLoader of it"),
        ({"data": pd.DataFrame({"a": [1.0]})}, TypeError, r'got DataFrame. Try data.to_numpy\(dtype="float32"\)'),
        ({"data": np.array([["a"]])}, TypeError, "expected an array of numbers, got one of dtype <U1"),
        ({"data": np.zeros((3, 4), int)}, TypeError, r"data\[0\] is of dtype int64, .* convert each batch"),
        ({"data": torch.randn(4)}, ValueError, r"4 rows, each a number.*x.reshape\(1, 4\)"),
        ({"loss": Trace_ELBO}, TypeError, r"loss: expected a pyro.infer.ELBO.*Try loss=pyro.infer.Trace_ELBO\(\)"),
        (
            {"optimizer": pyro.optim.Adam({})},
            TypeError,
            "a callable that makes a torch optimizer.*got a pyro.*PyroOptim",
        ),
        ({"optimizer": torch.optim.Adam([torch.zeros(1)])}, TypeError, r"got a torch.optim.adam.Adam. Try .*lambda"),
        ({"optimizer": list}, TypeError, "got one that makes a builtins.list"),
    ],
)
def test_bad_arguments(change, error, message):
    vae = linear_vae(2, 4)
    before = weights(vae)
    arguments = {"data": torch.randn(10, 4), "num_epochs": 1} | change
    with pytest.raises(error, match=message):
        fit(vae.model, vae.guide, arguments.pop("data"), **arguments)
    assert same(before, weights(vae))


def test_values_outside_the_support_are_found_before_training():
    vae = small_vae()
    x = torch.bernoulli(torch.full((300, 4, 4), 0.5))
    x[250] = 0.5
    before = weights(vae)
    with pytest.raises(ValueError, match=r"site 'x': 1 of 300 rows.*first at row 250, with values from 0.5 to 0.5"):
        fit(vae.model, vae.guide, x, num_epochs=1, batch_size=10)
    assert same(before, weights(vae))


def test_nothing_to_train():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match="nothing to train"):
        fit(model, lambda x: None, torch.randn(5), num_epochs=1)
