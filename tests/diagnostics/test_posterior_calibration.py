"""Calibration near the data at hand, of guides that are right or wrong there, and not elsewhere."""

import math

import pyro
import pyro.distributions as dist
import torch
from test_calibration import mixture
from truths.hierarchical import RandomEffects
from truths.one_latent import exact_pair

from pyro_vae.diagnostics import posterior_calibration, simulation_based_calibration
from pyro_vae.diagnostics.ecdf_bands import uniform_p_values


def test_a_guide_that_is_wrong_near_the_data_only():
    """It is right for 96 % of the data that the model draws, and wrong for a third of those that are like these."""
    model, exact = exact_pair()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(x > 2.5, x / 2 + 0.8, x / 2), math.sqrt(0.5)))

    x = 4 + 0.3 * torch.randn(50)
    assert simulation_based_calibration(model, guide, x, seed=0).p_value > 1e-3
    assert posterior_calibration(model, guide, x, seed=0, num_particles=1000).p_value < 1e-6
    found = [posterior_calibration(model, exact, x, num_particles=60, num_simulations=400) for _ in range(5)]
    for name in ("z", "log_likelihood"):  # uniform with few particles too, of which few are effective
        assert uniform_p_values(torch.cat([f.ranks[name] for f in found]), 100) > 1e-3
    assert found[0].group == "posterior_sbc"


def test_posterior_calibration_of_mixtures_and_globals():
    model, guide, _, _, _ = mixture(False)
    x = 1 + torch.randn(40)
    options = {"num_particles": 600, "num_simulations": 200, "seed": 0}
    assert posterior_calibration(model, guide, x, **options).p_value > 0.01
    assert posterior_calibration(model, lambda x: guide(x, 0.5), x, **options).p_value < 1e-3
    truth, x = RandomEffects(), torch.randn(3)
    options = {"num_particles": 1500, "num_simulations": 60, "seed": 0, "plate": None}
    assert posterior_calibration(truth.model, lambda x: truth.guide(x, 1.0), x, **options).p_value > 0.01
    assert posterior_calibration(truth.model, lambda x: truth.guide(x, 2.0), x, **options).p_value < 0.01


def test_no_more_rows_than_simulations():
    """Draws from the posterior take most of the time: they are made for S rows of many, which are taken at random."""
    model, exact = exact_pair()
    x, sizes = torch.linspace(-2.0, 2.0, 2000), []

    def guide(x):
        sizes.append(len(x))
        exact(x)

    found = posterior_calibration(model, guide, x, num_simulations=100, num_particles=200, seed=0)
    assert found.num_simulations == 100
    assert found.p_value > 0.01
    assert max(sizes[1:]) <= 100  # the first look is at all rows
    assert abs(found.truths["z"].mean()) < 4 * math.sqrt((1 / 2 + 1 / 3) / 100)  # not the first rows
