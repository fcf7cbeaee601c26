"""Simulated data are draws from the model, or are refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae import sandwich, simulate


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.flatten(1).mean(-1), 1.0))


@pytest.mark.parametrize("what", ["a mean", "the step before"])
def test_models_that_read_what_they_observe(what):
    """x ~ N(z + a function of x itself): the model has no such draw by calling it once."""

    def model(x):
        read = x.mean(-1, keepdim=True) if what == "a mean" else torch.cat([torch.zeros(len(x), 1), x[:, :-1]], -1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None] + 0.5 * read + 0 * x, 1.0).to_event(1), obs=x)

    x = torch.randn(20, 3)
    for tool in (simulate, sandwich):
        with pytest.raises(ValueError, match=r"site .x.: its distribution depends on an argument that"):
            tool(model, guide, x)


def test_what_only_its_shape_is_read_of_is_simulated():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, x.shape[-1]), 0.1).to_event(1), obs=x)

    found = simulate(model, guide, torch.zeros(500, 3), seed=0)
    noise = found.args[0] - found.latents["z"][:, None]
    assert abs(noise.std().item() - 0.1) < 0.01
