"""Simulated data, and both bounds on them."""

import pytest
import torch
from truths import LinearGaussian, small_vae

from pyro_vae import (
    adaptive_importance_sampling,
    annealed_importance_sampling,
    importance_sampling,
    sandwich,
    simulate,
)

# -- both sides -------------------------------------------------------------------------------------------------------


def test_simulated_data_come_from_the_latents():
    truth = LinearGaussian(3, 5)
    simulation = simulate(truth.model, truth.guide, torch.zeros(5000, 5))
    x, z = simulation.args[0], simulation.latents["z"]
    residual = x - z @ truth.weight.T - truth.bias
    assert residual.std().item() == pytest.approx(0.7, rel=0.02)
    assert abs(residual.mean().item()) < 0.02
    assert z.std().item() == pytest.approx(1.0, rel=0.02)
    assert simulation.args[0].shape == (5000, 5)


def test_simulation_of_an_argument_that_is_reshaped_and_one_that_is_hidden():
    vae = small_vae()
    flat = lambda x: vae.model(x.reshape(-1, 4, 4))  # noqa: E731
    guide = lambda x: vae.guide(x.reshape(-1, 4, 4))  # noqa: E731
    simulation = simulate(flat, guide, torch.zeros(50, 16))
    assert simulation.args[0].shape == (50, 16)
    assert 0 < simulation.args[0].mean() < 1
    hidden = lambda x: vae.model(1 - x)  # noqa: E731
    with pytest.raises(ValueError, match=r"site 'x': its observed value is none of the arguments.*exact_draw"):
        simulate(hidden, vae.guide, torch.zeros(50, 4, 4))


def test_a_sandwich_closes_around_the_truth():
    truth = LinearGaussian(3, 5)
    guide = lambda x: truth.guide(x, 1.5)  # noqa: E731
    for estimator in (importance_sampling, adaptive_importance_sampling, annealed_importance_sampling):
        options = {"num_temperatures": 25} if estimator is annealed_importance_sampling else {}
        result = sandwich(truth.model, guide, torch.zeros(200, 5), estimator=estimator, **options)
        gap, error = result.mean
        assert -4 * error < gap < 0.05 + 4 * error
        assert result.lower.bound.startswith("lower")
        assert result.upper.bound.startswith("upper")
        assert f"mean {gap:.3f}" in repr(result)
    narrow = sandwich(truth.model, lambda x: truth.guide(x, 0.3), torch.zeros(200, 5), estimator=importance_sampling)
    assert narrow.mean[0] > 0.05 > 5 * error


@pytest.mark.parametrize("estimator", [importance_sampling, adaptive_importance_sampling, annealed_importance_sampling])
def test_one_particle(estimator):
    """With K = 1 the exact draw is the only one: E −log w = E log q(z|x)/p(x, z) over the posterior, in closed form."""
    truth, factor = LinearGaussian(3, 5), 1.3
    guide = lambda x: truth.guide(x, factor)  # noqa: E731
    options = {"num_temperatures": 20} if estimator is annealed_importance_sampling else {}
    result = sandwich(truth.model, guide, torch.zeros(400, 5), estimator=estimator, num_particles=1, **options)
    assert result.lower.num_particles == result.upper.num_particles == 1
    gap, error = result.mean
    assert error < 0.2
    assert gap > -4 * error
    if estimator is importance_sampling:  # KL(q‖p) + KL(p‖q) of Gaussians with one mean and scales that differ
        assert abs(gap - 3 / 2 * (factor**2 + factor**-2 - 2)) < 4 * error
