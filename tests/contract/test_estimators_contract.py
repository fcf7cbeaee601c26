"""Every estimator of log p(x) goes through the same laws. A new one costs one line here."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from truths import LinearGaussian

from pyro_vae import (
    adaptive_importance_sampling,
    annealed_importance_sampling,
    importance_sampling,
    prior_sampling,
)

ESTIMATORS = {
    "prior": lambda *a, **k: prior_sampling(*a, num_particles=2000, progress=False, **k),
    "importance": lambda *a, **k: importance_sampling(*a, num_particles=500, progress=False, **k),
    "defensive": lambda *a, **k: importance_sampling(*a, num_particles=500, defensive=0.2, progress=False, **k),
    "adaptive": lambda *a, **k: adaptive_importance_sampling(*a, num_particles=300, progress=False, **k),
    "annealed": lambda *a, **k: annealed_importance_sampling(
        *a, num_particles=32, num_temperatures=30, progress=False, **k
    ),
}
estimators = pytest.mark.parametrize("estimate", ESTIMATORS.values(), ids=ESTIMATORS)


def pair(size=2):
    truth = LinearGaussian(size, 4)
    return truth, truth.sample(40), lambda x: truth.guide(x, widen=1.5)


@estimators
def test_a_lower_bound_of_the_exact_value(estimate):
    truth, x, guide = pair()
    evidence = estimate(truth.model, guide, x)
    error = evidence.log_evidence - truth.log_evidence(x)
    assert (error.abs() < 6 * evidence.standard_error + 1e-3).all()
    assert error.mean() < 4 * evidence.mean[2] + 1e-3
    assert evidence.bound == "lower bound on log p(x) in expectation"
    assert evidence.log_evidence.dtype == torch.float64


@estimators
def test_rows_in_any_chunks_and_any_order(estimate):
    truth, x, guide = pair()
    first = estimate(truth.model, guide, x, chunk_size=300)
    second = estimate(truth.model, guide, x.flip(0), chunk_size=10**6)
    error = (first.standard_error.square() + second.standard_error.flip(0).square()).sqrt()
    assert ((first.log_evidence - second.log_evidence.flip(0)).abs() < 6 * error + 1e-3).all()


@estimators
def test_a_seed_repeats(estimate):
    truth, x, guide = pair()
    found = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        found.append(estimate(truth.model, guide, x[:6]).log_evidence)
    assert torch.equal(*found)


@estimators
def test_all_data_as_one_point(estimate):
    """plate=None: the joint evidence of independent rows is the sum of theirs."""
    truth, x, guide = pair(1)
    x = x[:3]
    evidence = estimate(truth.model, guide, x, plate=None)
    error = (evidence.log_evidence - truth.log_evidence(x).sum()).abs()
    assert evidence.log_evidence.shape == (1,)
    assert error < 6 * evidence.standard_error + 1e-2


@estimators
def test_nothing_is_left_behind(estimate):
    """No gradient, mode, attribute or parameter of the pair's."""
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    truth, x, _ = pair()

    def guide(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(network(x), 1.0).to_event(1))

    before = {name: value.clone() for name, value in network.state_dict().items()}
    estimate(truth.model, guide, x)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


@estimators
def test_what_is_no_pair_is_refused(estimate):
    truth, x, guide = pair()
    with pytest.raises(TypeError, match="model: expected a function, got Tensor"):
        estimate(x, guide, x)
    with pytest.raises(ValueError, match="no plate 'rows' in model and guide"):
        estimate(truth.model, guide, x, plate="rows")
