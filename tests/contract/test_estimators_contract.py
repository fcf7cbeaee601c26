"""Every estimator of log p(x) goes through the same laws. A new one costs one line here."""

import inspect
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from truths import LinearGaussian

from pyro_vae import (
    adaptive_importance_sampling,
    annealed_importance_sampling,
    evidence,
    importance_sampling,
    prior_sampling,
)

ESTIMATORS = {
    "prior": partial(prior_sampling, num_particles=2000),
    "importance": partial(importance_sampling, num_particles=500),
    "defensive": partial(importance_sampling, num_particles=500, defensive=0.2),
    "adaptive": partial(adaptive_importance_sampling, num_particles=300),
    "annealed": partial(annealed_importance_sampling, num_particles=32, num_temperatures=30),
}
estimators = pytest.mark.parametrize("estimate", ESTIMATORS.values(), ids=ESTIMATORS)


def pair(size=2):
    truth = LinearGaussian(size, 4)
    return truth, truth.sample(40), lambda x: truth.guide(x, widen=1.5)


def test_every_estimator_is_listed():
    functions = {f for name in evidence.__all__ if inspect.isfunction(f := getattr(evidence, name))}
    estimating = {f for f in functions if inspect.signature(f).return_annotation == "Evidence"}
    assert estimating == {estimate.func for estimate in ESTIMATORS.values()}


@estimators
def test_a_lower_bound_of_the_exact_value(estimate):
    truth, x, guide = pair()
    found = estimate(truth.model, guide, x)
    error = found.log_evidence - truth.log_evidence(x)
    assert (error.abs() < 6 * found.standard_error + 1e-3).all()
    assert error.mean() < 4 * found.mean[2] + 1e-3
    assert found.bound == "lower bound on log p(x) in expectation"
    assert found.log_evidence.dtype == torch.float64


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
    found = estimate(truth.model, guide, x, plate=None)
    error = (found.log_evidence - truth.log_evidence(x).sum()).abs()
    assert found.log_evidence.shape == (1,)
    assert error < 6 * found.standard_error + 1e-2


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


@estimators
def test_a_row_that_is_not_finite_spreads_to_no_other(estimate):
    """Row 3 has a likelihood that is NaN wherever z > 0, row 5 one that is always zero."""
    x = torch.randn(8)
    bad, never = torch.arange(8) == 3, torch.arange(8) == 5

    def model(x, bad, never):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            trap = torch.where(bad & (z > 0), math.nan, torch.where(never, -math.inf, 0.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("trap", trap)

    def guide(x, bad, never):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    found = estimate(model, guide, x, bad, never)
    good = ~(bad | never)
    exact = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)
    assert ((found.log_evidence - exact).abs() < 5 * found.standard_error)[good].all()
    assert found.doubtful[~good].all()
    assert not torch.isfinite(found.log_evidence[5])
    assert "rows" in repr(found)
    assert "5" in repr(found).splitlines()[-1]
