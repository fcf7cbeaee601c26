"""`from_pyro_svi`: what is computed, summed out, integrated out and predicted, against closed forms."""

import math
import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam
from trees import GROUPS, dims, flat, groups
from truths import LinearGaussian

from pyro_vae import from_pyro_svi

NOISE = torch.ones(3)


def model(x, noise=NOISE):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("half", z / 2)
        pyro.deterministic("total", z.sum(-1))
        mean = z.sum(-1, keepdim=True).expand(*z.shape[:-1], 3)
        pyro.sample("x", dist.Normal(mean, noise).to_event(1), obs=x)
    pyro.deterministic("whole", z.prod(-1))


def guide(x, noise=None):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).expand([len(x), 2]).to_event(1))


@pytest.mark.parametrize(("rows", "parallel"), [(6, True), (6, False), (5000, True)])
def test_deterministic_sites(rows, parallel):
    tree = from_pyro_svi(model, guide, torch.randn(rows, 3), num_samples=4, parallel=parallel)
    assert dims(tree, "posterior") == {
        "z": "chain draw data z_dim_0", "half": "chain draw data half_dim_0", "total": "chain draw data",
        "whole": "chain draw whole_dim_0",
    }  # fmt: skip
    for group in ("posterior", "prior"):
        z = flat(tree, group, "z")
        torch.testing.assert_close(flat(tree, group, "half"), z / 2)
        torch.testing.assert_close(flat(tree, group, "total"), z.sum(-1))
        torch.testing.assert_close(flat(tree, group, "whole"), z.prod(-1))
    assert groups(tree) == GROUPS  # `noise` is its default, and was not given


def test_reparametrised_latents():
    def centred(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(3.0, 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z_decentered", dist.Normal(0.0, 1.0).expand([len(x)]))

    tree = from_pyro_svi(poutine.reparam(centred, {"z": LocScaleReparam(0.0)}), guide, torch.randn(5), num_samples=8)
    assert dims(tree, "posterior") == dict.fromkeys(("z", "z_decentered"), "chain draw data")
    for group in ("observed_data", "log_likelihood", "posterior_predictive", "prior_predictive"):
        assert list(dims(tree, group)) == ["x"]
    torch.testing.assert_close(flat(tree, "posterior", "z"), 3 + 2 * flat(tree, "posterior", "z_decentered"))
    assert list(dims(tree, "log_prior")) == ["z_decentered"]


# -- discrete latents -------------------------------------------------------------------------------------------------

SHARES = torch.tensor([0.3, 0.7])
MEANS = torch.tensor([-1.0, 1.0])


@config_enumerate
def mixture(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Categorical(SHARES))
        pyro.sample("x", dist.Normal(z + MEANS[k], 1.0), obs=x)


def mixture_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


@pytest.mark.parametrize("parallel", [True, False])
def test_summed_latents_are_drawn_given_the_others(parallel):
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])
    tree = from_pyro_svi(mixture, mixture_guide, x, num_samples=200, parallel=parallel)
    assert dims(tree, "posterior") == dict.fromkeys(("z", "k"), "chain draw data")
    z, k = flat(tree, "posterior", "z"), flat(tree, "posterior", "k")
    terms = SHARES.log() + dist.Normal(z[..., None] + MEANS, 1.0).log_prob(x[:, None])
    chance = terms.softmax(-1)[..., 1]
    error = (chance * (1 - chance)).sum(0).sqrt()
    assert ((k - chance).sum(0) / error).abs().max() < 4
    torch.testing.assert_close(
        flat(tree, "sample_stats", "log_p_x_given_latents"), dist.Normal(z + MEANS[k], 1.0).log_prob(x)
    )
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + terms.logsumexp(-1)  # without k
    torch.testing.assert_close(flat(tree, "sample_stats", "log_p"), log_p, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flat(tree, "log_prior", "k"), SHARES.log()[k])
    replicated = flat(tree, "posterior_predictive", "x") - z - MEANS[k]
    assert replicated.std().item() == pytest.approx(1.0, abs=5 / math.sqrt(2 * 1000))


# -- integrated log-likelihoods ---------------------------------------------------------------------------------------


def test_leave_one_out_is_that_of_the_marginal():
    """az.loo says Σ log p(x_n), with no effective parameters, and az.compare finds the model that the data are from."""
    pyro.set_rng_seed(0)
    truth, other = LinearGaussian(2, 3), LinearGaussian(1, 3)
    x = truth.sample(60)
    trees = {
        name: from_pyro_svi(m.model, lambda x, m=m: m.guide(x, 1.5), x, num_samples=1000)
        for name, m in (("truth", truth), ("other", other))
    }
    for m, tree in zip((truth, other), trees.values(), strict=True):
        found = az.loo(tree)
        elpd, p_loo = (found.elpd, found.p) if hasattr(found, "elpd") else (found.elpd_loo, found.p_loo)
        error = np.sqrt((tree["sample_stats"]["log_evidence_error"].values ** 2).sum())
        assert elpd == pytest.approx(m.log_evidence(x).sum().item(), abs=5 * error)
        assert abs(p_loo) < 0.1
    with warnings.catch_warnings(action="ignore"):
        assert az.compare(trees).index[0] == "truth"


def test_k_hats_of_leave_one_out_are_those_of_the_weights():
    truth = LinearGaussian(2, 3)
    tree = from_pyro_svi(truth.model, lambda x: truth.guide(x, 0.7), truth.sample(20), num_samples=2000)
    with warnings.catch_warnings(action="ignore"):
        found = az.loo(tree, pointwise=True).pareto_k
    np.testing.assert_allclose(found, tree["sample_stats"]["pareto_khat"], atol=0.1)


def test_resampled_draws_of_each_point():
    """A guide that is too wide: the draws by their weights have the moments of the posterior."""
    truth = LinearGaussian(2, 3)
    x = truth.sample(30)
    tree = from_pyro_svi(truth.model, lambda x: truth.guide(x, 1.5), x, num_samples=4000, resample=True, seed=0)
    z, exact = flat(tree, "posterior", "z"), truth.posterior(x)
    ess = torch.tensor(tree["sample_stats"]["ess"].values)[:, None]
    assert ((z.mean(0) - exact.mean) / (exact.variance / ess).sqrt()).abs().max() < 5
    assert ((z.std(0) / exact.variance.sqrt() - 1).abs() < 5 / (2 * ess).sqrt()).all()
    log_likelihood = dist.Normal(z @ truth.weight.T + truth.bias, truth.noise).to_event(1).log_prob(x)
    torch.testing.assert_close(flat(tree, "sample_stats", "log_p_x_given_latents"), log_likelihood)
    log_p = log_likelihood + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(flat(tree, "sample_stats", "log_p"), log_p)
    between = torch.corrcoef(z[..., 0].T) - torch.eye(30)  # points are independent
    assert between.abs().max() < 5 / 1000**0.5
    assert (z[1:] == z[:-1]).double().mean() < 0.01  # copies of a draw do not stand side by side
    with pytest.raises(ValueError, match=r"resample: 'whole' is computed from several data points"):
        from_pyro_svi(model, guide, torch.randn(4, 3), num_samples=5, resample=True)


# -- arguments --------------------------------------------------------------------------------------------------------


def test_constants_and_new_data():
    x, noise = torch.randn(6, 3), torch.tensor([0.1, 1.0, 10.0])
    given = {"x": torch.zeros(4, 3), "noise": torch.full((3,), 0.01)}
    tree = from_pyro_svi(model, guide, x, noise, num_samples=300, predictions=given)
    assert groups(tree) == GROUPS | {"constant_data", "predictions", "predictions_constant_data"}
    assert dims(tree, "constant_data") == {"noise": "noise_dim_0"}  # not x, which is observed
    assert dims(tree, "predictions_constant_data") == {"noise": "noise_dim_0"}
    np.testing.assert_array_equal(tree["predictions_constant_data"]["noise"], given["noise"])
    new = flat(tree, "predictions", "x")
    assert new.shape == (300, 4, 3)
    assert (new.std(-1) < 0.05).all()  # three features with one mean and little noise
    assert new.mean(-1).var().item() == pytest.approx(2.0, abs=5 * 2 * math.sqrt(2 / 1200))


def test_constants_have_the_names_of_the_parameters():
    def model(data, sizes, settings, *rest, **more):
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, sizes), obs=settings["x"])

    def guide(data, *args, **kwargs):
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Normal(torch.zeros(len(data)), 1.0))

    batch = {"x": torch.randn(3), "year": torch.arange(3)}
    args = torch.arange(3.0), torch.ones(3), batch, torch.ones(2, 2)
    tree = from_pyro_svi(poutine.scale(model, 1.0), guide, *args, num_samples=2, last=torch.zeros(()))
    assert dims(tree, "constant_data") == {
        "data_value": "data", "sizes": "data", "year": "data", "rest_0": "rest_0_dim_0 rest_0_dim_1", "last": "",
    }  # fmt: skip


# -- all data as one point --------------------------------------------------------------------------------------------


def test_all_data_as_one_point():
    tree = from_pyro_svi(model, guide, torch.randn(6, 3), num_samples=5, plate=None)
    assert dims(tree, "posterior") == {
        "z": "chain draw data z_dim_0", "half": "chain draw data half_dim_0", "total": "chain draw data",
        "whole": "chain draw whole_dim_0",
    }  # fmt: skip
    assert dims(tree, "sample_stats")["log_weights"] == "chain draw"
    assert dims(tree, "sample_stats")["log_evidence"] == ""
    assert dims(tree, "observed_data") == {"x": "data x_dim_0"}
    assert dims(tree, "sample_stats")["log_p_x_given_latents"] == "chain draw data"
    log_weights = flat(tree, "sample_stats", "log_weights").double()
    assert tree["sample_stats"]["log_evidence"].item() == pytest.approx(log_weights.logsumexp(0).item() - math.log(5))


@pytest.mark.parametrize("what", [lambda z: z.sum(), lambda z: z.max(), lambda z: z.cumsum(0)])
def test_computed_values_are_those_of_each_draw(what):
    """What goes over all of z mixes no draws: it is computed for one of them at a time."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        pyro.deterministic("d", what(z))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 0.4))

    with pytest.warns(UserWarning, match="one at a time"):
        tree = from_pyro_svi(model, guide, torch.linspace(-1, 2, 7), num_samples=20, seed=0, progress=False)
    z, d = (torch.as_tensor(tree["posterior"][name].values[0]) for name in "zd")
    torch.testing.assert_close(d, torch.stack([what(row) for row in z]))
