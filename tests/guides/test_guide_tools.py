"""Every tool takes a guide: numbers against the closed forms of a linear-Gaussian model."""

import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, ReweightedWakeSleep, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoCallable, AutoGuideList, AutoNormal
from torch import nn

from pyro_vae import (
    adaptive_importance_sampling,
    annealed_importance_sampling,
    draw_posterior,
    from_pyro_svi,
    importance_sampling,
    latent_usage,
    sandwich,
)

sys.path.append(str(Path(__file__).parents[1] / "contract"))
from guides import CASES, GUIDES, WEIGHT, make

every = pytest.mark.parametrize("guide", GUIDES)


@pytest.fixture(scope="module")
def case():
    return CASES["vector"]()


@every
def test_evidence_and_both_bounds(guide, case):
    guide = make(guide, case)
    for estimate in (
        importance_sampling(case.model, guide, *case.args, num_particles=2000, defensive=0.2, seed=0),
        adaptive_importance_sampling(case.model, guide, *case.args, num_particles=500, seed=0),
        annealed_importance_sampling(case.model, guide, *case.args, num_particles=32, num_temperatures=30, seed=0),
    ):
        error = (estimate.log_evidence - case.log_evidence).abs()
        assert (error < 5 * estimate.standard_error + 1e-4).all(), estimate.method
    both = sandwich(case.model, guide, *case.args, estimator=importance_sampling, num_particles=2000, seed=0)
    assert abs(both.mean[0]) < 5 * both.mean[1] + 0.02


@every
def test_posterior_draws_and_arviz(guide, case):
    guide = make(guide, case)
    covariance = torch.linalg.inv(torch.eye(2) + WEIGHT.T @ WEIGHT / 0.49)
    mean = case.args[0] @ WEIGHT @ covariance / 0.49
    draws = draw_posterior(case.model, guide, *case.args, num_samples=2000, num_particles=4000, seed=0)
    noise = (covariance.diagonal() * (1 / 2000 + 1 / draws.effective_sample_size.float()).unsqueeze(-1)).sqrt()
    assert ((draws["z"].mean(0) - mean).abs() < 5 * noise).all()
    tree = from_pyro_svi(case.model, guide, *case.args, num_samples=200, resample=True)
    z = torch.as_tensor(tree["posterior"]["z"].values)[0]
    assert z.shape == (200, 6, 2)
    assert ((z.mean(0) - mean).abs() < 6 * covariance.diagonal().sqrt() / 50**0.5).all()


@every
def test_usage_and_pyros_own(guide, case):
    guide = make(guide, case)
    usage = latent_usage(case.model, guide, *case.args)
    assert usage.kl.shape == (2,)
    assert (usage.kl > 0).all() or guide.name == "AmortizedFlow"
    drawn = Predictive(case.model, guide=guide, num_samples=5)(*case.args)
    assert drawn["x"].shape == (5, 6, 3)
    for objective in (TraceGraph_ELBO(), ReweightedWakeSleep(num_particles=3, vectorize_particles=False)):
        pyro.clear_param_store()
        objective.loss_and_grads(case.model, guide, *case.args)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.head.parameters())


@every
def test_in_a_list_of_pyros_autoguides(guide):
    """Pyro's list asks what is no autoguide of its own for nothing but draws, unless it is told of a median."""

    def model(x):
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(centre, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    x = torch.zeros(3, 1)
    local = GUIDES[guide](model, nn.Linear(1, 4), outside=None)
    both = AutoGuideList(model)
    both.append(AutoNormal(pyro.poutine.block(model, expose=["centre"])))
    both.append(AutoCallable(model, local, local.median))
    before = SVI(model, both, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x)
    assert before > 0
    assert both.median(x).keys() == {"centre", "z"}
    assert torch.equal(both.median(x)["z"], local.median(x)["z"])
