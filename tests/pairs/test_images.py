"""Latents that are images of auxiliary draws, with and without their log-determinant."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae import (
    importance_sampling,
)

X = torch.linspace(-1.0, 1.0, 6)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def image(f, log_density):
    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x / 2, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(f(u), log_density=log_density(u)))

    return guide


def test_an_image_with_its_log_determinant_is_a_density():
    guide = image(lambda u: u + u**3 / 3, lambda u: -torch.log1p(u**2))
    evidence = importance_sampling(model, guide, X, num_particles=50_000, progress=False)
    exact = dist.Normal(0.0, 2**0.5).log_prob(X)
    assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error).all()


@pytest.mark.parametrize(
    "guide",
    [
        image(lambda u: u + u**3 / 3, torch.zeros_like),
        image(lambda u: 2 * u, torch.zeros_like),
        image(lambda u: 0 * u, torch.zeros_like),
        image(lambda u: u.detach(), torch.zeros_like),
    ],
    ids=["forgotten", "a factor", "a constant", "detached"],
)
def test_an_image_without_its_log_determinant_is_refused(guide):
    with pytest.raises(ValueError, match=r"the Jacobian of these functions gives"):
        importance_sampling(model, guide, X, progress=False)


def test_two_images_of_one_draw_are_refused():
    def sums(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("v", dist.Normal(0.0, 1.0).expand([len(x)]), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u))
            pyro.sample("y", dist.Delta(u))

    with pytest.raises(ValueError, match="of a function that can be inverted"):
        importance_sampling(sums, guide, X, progress=False)
