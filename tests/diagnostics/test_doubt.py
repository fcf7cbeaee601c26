"""Rows called out of distribution at the nominal rate, and those that are."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from truths import LinearGaussian

from pyro_vae import importance_sampling
from pyro_vae.diagnostics import doubtful_rows


@pytest.fixture
def pair():
    """A guide that is right in the middle of the data, and never far from it."""
    truth = LinearGaussian(2, 4)

    def guide(x):
        posterior = truth.posterior(x)
        with pyro.plate("data", len(x)):
            loc = 2 * torch.tanh(posterior.mean / 2)
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=1.2 * posterior.scale_tril))

    return truth, guide


def test_data_from_the_model_are_out_of_distribution_at_the_nominal_rate(pair):
    truth, guide = pair
    x = truth.sample(2000)
    found = doubtful_rows(
        truth.model, guide, x, num_particles=30, num_simulated=2000, level=0.05, seed=3, progress=False
    )
    for p_value in (found.p_evidence, found.p_variance, found.p_value):
        for level in (0.05, 0.2, 0.5):
            rate, error = (p_value <= level).double().mean(), (2 * level * (1 - level) / 2000) ** 0.5
            assert abs(rate - level) < 4 * error  # of both, the data and the simulations
    assert found.num_simulated == 2000


def test_shifted_and_rescaled_rows_are_found_and_come_first(pair):
    truth, guide = pair
    x = truth.sample(200)
    x[7] += torch.tensor([6.0, -6.0, 6.0, -6.0])  # off the plane of the model
    x[11] = truth.bias + 5 * truth.weight @ torch.tensor([1.0, 1.0])  # in it, and far out, where the guide is not
    found = doubtful_rows(truth.model, guide, x, num_particles=300, seed=0, progress=False)
    assert set(found.order[:2].tolist()) == {7, 11}
    assert found.out_of_distribution[[7, 11]].all()
    assert found.out_of_distribution.sum() <= 8
    assert found.untrusted[11]
    assert sorted(found.order.tolist()) == list(range(200))
    table = repr(found).splitlines()
    assert {int(line.split()[0]) for line in table[3:5]} == {7, 11}
    assert len(table) == 13
    assert "weights, unlike the model" in repr(found)


def test_a_typical_set_is_two_sided():
    """Data at the mode of the model have the highest log p(x), and no draw of 20 dimensions looks like that."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.1 * z.unsqueeze(-1), torch.ones(20)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.1 * x.sum(-1) / 1.2, 1.2**-0.5))

    x = torch.cat([torch.randn(50, 20), torch.zeros(1, 20)])
    found = doubtful_rows(model, guide, x, num_particles=50, seed=0, progress=False)
    assert found.order[0] == 50
    assert found.p_evidence[50] < 0.005
    assert found.evidence.log_evidence.argmax() == 50


def test_weights_are_those_of_importance_sampling(pair):
    truth, guide = pair
    x = truth.sample(20)
    options = {"num_particles": 2000, "progress": False}
    found = doubtful_rows(truth.model, guide, x, num_simulated=0, seed=0, **options)
    expected = importance_sampling(truth.model, guide, x, seed=1, **options)
    error = torch.hypot(found.evidence.standard_error, expected.standard_error)
    assert ((found.evidence.log_evidence - expected.log_evidence) / error).abs().max() < 4.5
    assert ((found.evidence.log_evidence - truth.log_evidence(x)) / found.evidence.standard_error).abs().max() < 4.5
    assert (found.evidence.pareto_khat - expected.pareto_khat).median().abs() < 0.1
    assert found.p_value.isnan().all()
    assert not found.out_of_distribution.any()
    # log w is a quadratic form of draws of the guide
    assert (found.variance > 0).all()


def test_draws_outside_of_the_support_have_an_infinite_variance():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5))

    found = doubtful_rows(
        model, guide, torch.tensor([0.1, 9.0, 8.0, 9.5, 7.0, 8.5]), num_particles=100, seed=0, progress=False
    )
    assert found.variance[0].isinf()
    assert found.variance[1:].isfinite().all()
    assert (found.p_variance <= 1).all()


def test_what_is_refused(pair):
    truth, guide = pair
    x = truth.sample(5)
    with pytest.raises(ValueError, match="level: expected a probability"):
        doubtful_rows(truth.model, guide, x, level=5)
    with pytest.raises(ValueError, match="num_simulated: expected at least 0"):
        doubtful_rows(truth.model, guide, x, num_simulated=-1)
