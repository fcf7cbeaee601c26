"""Pairs and data that are refused, and what is said of them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from truths import exact_pair, small_vae

from pyro_vae import ImportanceWeightedELBO, draw_particles, importance_sampling


def no_plate(x):
    z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def two_plates(x):
    with pyro.plate("rows", len(x), dim=-1), pyro.plate("columns", 2, dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(2, -1))


def global_latent(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def global_guide(x):
    pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


def other_name(x):
    with pyro.plate("data", len(x)):
        pyro.sample("w", dist.Normal(x / 2, 1.0))


def other_dim(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(x[:, None] / 2, 1.0))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            (no_plate, no_plate),
            r"no plate 'data' in model and guide \(their plates: none\).*Try with pyro.plate\('data'",
        ),
        ((two_plates, two_plates), r"their plates: 'rows' \(5\), 'columns' \(2\).*Try plate=… with one of these names"),
        (
            (global_latent, global_guide),
            r"site 'm' of the guide is outside plate 'data' \(its plates: none\).*Try to move",
        ),
        ((exact_pair()[0], other_name), r"\['z'\] only in the model, \['w'\] only in the guide.*same name"),
        ((exact_pair()[0], other_dim), r"plate 'data'.*got dim -1 in the model and -2 in the guide"),
    ],
)
def test_errors_name_the_site(pair, message):
    with pytest.raises(ValueError, match=message):
        draw_particles(*pair, torch.randn(5), num_particles=2)


def test_errors_about_data_name_the_row():
    model, guide = exact_pair()
    x = torch.randn(5000)
    x[4321] = math.nan
    with pytest.raises(ValueError, match=r"argument 0: 1 of \d+ rows are NaN or infinite, the first at row 4321"):
        importance_sampling(model, guide, x, num_particles=2)
    vae, x = small_vae(), torch.rand(7, 4, 4)
    x[:3] = 1.0
    with pytest.raises(ValueError, match=r"site 'x'.*outside the support of Bernoulli.*row 3.*Try \(x > 0.5\)"):
        importance_sampling(vae.model, vae.guide, x, num_particles=2)
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"num_particles: expected at least 1, got {count}"):
            importance_sampling(model, guide, torch.randn(3), num_particles=count)


LEFT = {
    "another number": lambda z, c: torch.softmax(z, 1),
    "the wrong dimension": lambda z, c: z[:, :1].expand(*z.shape),
    "no number": lambda z, c: torch.cat([z, c], -1)[..., :2],
}


@pytest.mark.parametrize("name", LEFT)
def test_dimensions_counted_from_the_left_are_refused(name):
    """Trace_ELBO has no objection to them: there are no particles in it."""
    c = torch.randn(20, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(LEFT[name](z, c[: len(x)]), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    x = torch.randn(20, 2)
    Trace_ELBO().loss(model, guide, x)
    message = r"of the model|the model does not run for two particles at once: .*Try to count dimensions from the right"
    for tool in (
        lambda: draw_particles(model, guide, x, num_particles=5, parallel=True),
        lambda: importance_sampling(model, guide, x, parallel=True),
        lambda: ImportanceWeightedELBO(5).loss(model, guide, x),
    ):
        with pytest.raises(ValueError, match=message):
            tool()


def test_randomness_that_is_no_sample_site_is_drawn_for_each_particle():
    """One draw for all particles, as `torch.randn(2)` gives it, has another law than one for each."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + torch.randn(2), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    x = torch.randn(20, 2)
    with pytest.warns(UserWarning, match="has chance in it that is no sample site, the same for all"):
        particles = draw_particles(model, guide, x, num_particles=400, seed=0)
    z = particles.latents["z"]
    noise = -2 * (particles.log_likelihood.unsqueeze(-1) + 2 * z).sum(1)[:, 0]  # differs from particle to particle
    assert len(noise.unique()) == 400

    def one_for_each(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + torch.randn_like(z), 1.0).to_event(1), obs=x)

    draw_particles(one_for_each, guide, x, num_particles=5, parallel=True)
