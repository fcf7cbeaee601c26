"""Rows that are not independent, whatever their plate says, are refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae import adaptive_importance_sampling, draw_particles, importance_sampling

COUPLED = {
    "cumsum": lambda z: z.cumsum(-1),
    "mean": lambda z: z - z.mean(-1, keepdim=True),
    "norm": lambda z: torch.nn.functional.layer_norm(z, z.shape[-1:]),
    "the row before": lambda z: z.roll(1, -1),
}


def pair(decode):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(decode(z), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    return model, guide


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("size", [3, 12])
@pytest.mark.parametrize("parallel", [True, False])
def test_rows_that_read_each_others_latents(name, size, parallel):
    model, guide = pair(COUPLED[name])
    for tool in (draw_particles, importance_sampling, adaptive_importance_sampling):
        with pytest.raises(ValueError, match=r"plate 'data': in the model, the log-probability of a row depends on"):
            tool(model, guide, torch.randn(size), num_particles=4, parallel=parallel)


def test_a_guide_whose_rows_read_each_others_latents():
    def model(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(first, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(x / 3, 1.0))
            pyro.sample("z", dist.Normal(first.roll(1, -1), 1.0))

    with pytest.raises(ValueError, match="in the guide, the log-probability of a row depends on the latents of other"):
        importance_sampling(model, guide, torch.randn(12), num_particles=4)


def test_reading_all_data_couples_no_rows():
    """q(z_n|x_1, …, x_N), and noise that is shared by all rows of x."""
    x = torch.randn(12)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, x.std()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean() + 0 * x, x.std()))

    found = importance_sampling(model, guide, x, num_particles=4000, seed=0)
    exact = dist.Normal(0.0, (1 + x.std() ** 2).sqrt()).log_prob(x)
    assert ((found.log_evidence - exact) / found.standard_error).abs().max() < 5
