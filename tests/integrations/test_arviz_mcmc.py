"""`from_pyro`: what MCMC gives, draw for draw, against closed forms."""

import copy
import math
import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import LocScaleReparam
from test_arviz_globals import exact_draws
from trees import ARVIZ_1, GROUPS, dims, flat, groups, with_draws

from pyro_vae import from_pyro

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def noncentred(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * raw)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def centred(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def run(model, *args, num_samples=30, warmup_steps=50, **kwargs):
    mcmc = MCMC(NUTS(model), num_samples=num_samples, warmup_steps=warmup_steps, disable_progbar=True)
    mcmc.run(*args, **kwargs)
    return mcmc


def regression(predictor, y):
    """A matrix product with a vector of coefficients: wrong under an extra dimension, so each draw is run by itself."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(predictor)):
        pyro.sample("y", dist.Normal(predictor @ beta, scale), obs=y)


@pytest.fixture(scope="module")
def mcmc():
    pyro.set_rng_seed(0)
    predictor = torch.randn(10, 3)
    return run(regression, predictor, predictor.sum(-1) + 0.1 * torch.randn(10), warmup_steps=30)


@pytest.fixture(scope="module")
def schools():
    pyro.set_rng_seed(0)
    return with_draws({name: value.float() for name, value in exact_draws(100).items()}, noncentred, SIGMA, Y)


def test_numbers(mcmc):
    tree = from_pyro(mcmc, dims={"beta": ["coefficient"]})
    assert groups(tree) == GROUPS | {"constant_data"}
    assert dims(tree, "posterior") == {"beta": "chain draw coefficient", "scale": "chain draw"}
    assert dims(tree, "posterior_predictive") == {"y": "chain draw data"}
    assert tree["sample_stats"]["diverging"].dtype == bool
    predictor, y = mcmc._args
    samples = mcmc.get_samples()
    np.testing.assert_array_equal(tree["posterior"]["beta"].values[0], samples["beta"])
    mean = samples["beta"] @ predictor.T
    expected = dist.Normal(mean, samples["scale"][:, None]).log_prob(y)
    torch.testing.assert_close(flat(tree, "log_likelihood", "y"), expected)
    torch.testing.assert_close(flat(tree, "sample_stats", "log_p_y_given_latents"), expected)
    residual = (flat(tree, "posterior_predictive", "y") - mean) / samples["scale"][:, None]
    assert abs(residual.mean()) < 5 / math.sqrt(300)
    assert residual.std().item() == pytest.approx(1.0, abs=0.2)
    np.testing.assert_array_equal(tree["observed_data"]["y"], y)
    assert dims(tree, "constant_data") == {"predictor": "data predictor_dim_0"}
    np.testing.assert_array_equal(tree["constant_data"]["predictor"], predictor)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # thirty draws, so k-hat is uncertain
        assert az.loo(tree) is not None


def test_two_chains(mcmc):
    mcmc = copy.copy(mcmc)
    mcmc._samples = {name: torch.cat([v, v + 1]) for name, v in mcmc._samples.items()}
    mcmc._diagnostics = [{"divergences": [1, 3]}, {"divergences": [0]}]
    tree = from_pyro(mcmc)
    assert dict(tree["posterior"].sizes) == {"chain": 2, "draw": 30, "beta_dim_0": 3}
    assert tree["sample_stats"]["diverging"].values.nonzero()[1].tolist() == [1, 3, 0]
    np.testing.assert_array_equal(tree["posterior"]["beta"].values[1], mcmc._samples["beta"][1])
    assert dict(tree["prior"].sizes) == {"chain": 1, "draw": 30, "beta_dim_0": 3}


def test_deterministic_sites_in_a_plate(schools):
    """Eight schools, not centred: theta is what is asked for."""
    tree = from_pyro(schools, coords={"school": list("ABCDEFGH")})
    assert dims(tree, "posterior") == {
        "mu": "chain draw", "raw": "chain draw school", "tau": "chain draw", "theta": "chain draw school",
    }  # fmt: skip
    mu, tau, raw = (flat(tree, "posterior", name) for name in ("mu", "tau", "raw"))
    theta = mu[:, None] + tau[:, None] * raw
    torch.testing.assert_close(flat(tree, "posterior", "theta"), theta)
    conditional = flat(tree, "sample_stats", "log_p_y_given_latents")
    torch.testing.assert_close(conditional, dist.Normal(theta, SIGMA).log_prob(Y))
    priors = [flat(tree, "prior", name) for name in ("mu", "tau", "raw", "theta")]
    torch.testing.assert_close(priors[3], priors[0][:, None] + priors[1][:, None] * priors[2])
    assert dims(tree, "observed_data") == {"y": "school"}
    assert dims(tree, "constant_data") == {"sigma": "school"}
    assert dims(tree, "log_prior") == {"mu": "chain draw", "raw": "chain draw school", "tau": "chain draw"}
    torch.testing.assert_close(flat(tree, "log_prior", "mu"), dist.Normal(0.0, 5.0).log_prob(mu))
    torch.testing.assert_close(flat(tree, "log_prior", "tau"), dist.HalfCauchy(5.0).log_prob(tau))
    torch.testing.assert_close(flat(tree, "log_prior", "raw"), dist.Normal(0.0, 1.0).log_prob(raw))


def test_reparametrised_latents():
    """They are latents under their own names, and no data."""
    model = poutine.reparam(centred, {"theta": LocScaleReparam(0.0)})
    tree = from_pyro(run(model, SIGMA, Y, num_samples=10, warmup_steps=10))
    assert groups(tree) == GROUPS | {"constant_data"}
    assert dims(tree, "posterior") == {
        "mu": "chain draw", "tau": "chain draw", "theta": "chain draw school",
        "theta_decentered": "chain draw school",
    }  # fmt: skip
    mu, tau, raw = (flat(tree, "posterior", name) for name in ("mu", "tau", "theta_decentered"))
    torch.testing.assert_close(flat(tree, "posterior", "theta"), mu[:, None] + tau[:, None] * raw)
    for group in ("observed_data", "log_likelihood", "posterior_predictive", "prior_predictive"):
        assert list(dims(tree, group)) == ["y"]
    assert dims(tree, "prior").keys() == dims(tree, "posterior").keys()
    assert set(dims(tree, "log_prior")) == {"mu", "tau", "theta_decentered"}
    assert dims(tree, "constant_data") == {"sigma": "school"}


def test_lp_is_the_log_joint_in_unconstrained_coordinates(schools):
    tree = from_pyro(schools)
    mu, tau, raw, theta = (flat(tree, "posterior", name).double() for name in ("mu", "tau", "raw", "theta"))
    joint = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau)
    joint += dist.Normal(0.0, 1.0).log_prob(raw).sum(-1) + dist.Normal(theta, SIGMA).log_prob(Y).sum(-1)
    log_det = tau.log()  # tau = exp(u), d tau / du = tau
    torch.testing.assert_close(flat(tree, "sample_stats", "lp").double(), joint + log_det, atol=1e-3, rtol=1e-5)


def test_a_potential_function():
    """A kernel without a model has draws and lp alone."""
    kernel = NUTS(potential_fn=lambda z: z["a"].square().sum() / 2)
    mcmc = MCMC(kernel, num_samples=20, warmup_steps=20, initial_params={"a": torch.zeros(3)}, disable_progbar=True)
    mcmc.run()
    tree = from_pyro(mcmc)
    assert groups(tree) == {"posterior", "sample_stats"}
    a = flat(tree, "posterior", "a")
    torch.testing.assert_close(flat(tree, "sample_stats", "lp"), -a.square().sum(-1) / 2)


def mixture(x):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(mean[k], 1.0), obs=x)


def test_discrete_latents_are_drawn_given_the_others():
    x = torch.tensor([-2.0, 0.0, 0.5, 2.0])
    tree = from_pyro(with_draws({"mean": 2 * torch.randn(200, 2)}, mixture, x))
    assert dims(tree, "posterior") == {"mean": "chain draw mean_dim_0", "k": "chain draw data"}
    mean, k = flat(tree, "posterior", "mean"), flat(tree, "posterior", "k")
    terms = torch.tensor([0.3, 0.7]).log() + dist.Normal(mean[:, None], 1.0).log_prob(x[:, None])  # (draws, data, k)
    chance = terms.softmax(-1)[..., 1]
    error = (chance * (1 - chance)).sum(0).sqrt()
    assert ((k - chance).sum(0) / error).abs().max() < 4
    torch.testing.assert_close(flat(tree, "log_likelihood", "x"), terms.logsumexp(-1))
    conditional = dist.Normal(mean.gather(1, k), 1.0).log_prob(x)
    torch.testing.assert_close(flat(tree, "sample_stats", "log_p_x_given_latents"), conditional)
    lp = dist.Normal(0.0, 3.0).log_prob(mean).sum(-1) + terms.logsumexp(-1).sum(-1)
    torch.testing.assert_close(flat(tree, "sample_stats", "lp"), lp, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(flat(tree, "log_prior", "k"), torch.tensor([0.3, 0.7]).log()[k])


def test_new_data(mcmc):
    """Predictions are y ~ p(y|θ, new arguments)."""
    new = torch.randn(4, 3)
    for given in ((new, None), {"predictor": new, "y": None}):
        tree = from_pyro(mcmc, predictions=given, coords={"data": list("abcdefghij")})
        assert groups(tree) == GROUPS | {"constant_data", "predictions", "predictions_constant_data"}
        assert dims(tree, "predictions") == {"y": "chain draw data"}
        assert dims(tree, "predictions_constant_data") == {"predictor": "data predictor_dim_0"}
        np.testing.assert_array_equal(tree["predictions_constant_data"]["predictor"], new)
        assert tree["predictions"]["data"].values.tolist() == [0, 1, 2, 3]  # not the labels of the old rows
        mean = flat(tree, "posterior", "beta") @ new.T
        residual = (flat(tree, "predictions", "y") - mean) / flat(tree, "posterior", "scale")[:, None]
        assert abs(residual.mean()) < 5 / math.sqrt(120)
        assert residual.std().item() == pytest.approx(1.0, abs=0.3)


def test_new_groups_have_latents_of_their_own(schools):
    """A latent of each data point is drawn anew for a new one: the spread of theta is tau, not zero."""
    tree = from_pyro(schools, predictions=(torch.full((50,), 0.01), None))
    assert tree["predictions"]["y"].shape == (1, 100, 50)
    mu, tau = (flat(tree, "posterior", name)[:, None] for name in ("mu", "tau"))
    scaled = (flat(tree, "predictions", "y") - mu) / (tau.square() + 1e-4).sqrt()
    assert scaled.std().item() == pytest.approx(1.0, abs=5 / math.sqrt(2 * 5000))


def test_sensitivity_to_the_prior(schools):
    tree = from_pyro(schools)
    with warnings.catch_warnings(action="ignore"):
        found = az.psense(tree) if ARVIZ_1 else az.psens(tree, component="prior")
    assert set(found.data_vars) >= {"mu", "tau", "theta"}
    assert found["mu"].values > found["theta"].values.min()


def test_errors():
    with pytest.raises(TypeError, match=r"expected a pyro.infer.MCMC after run"):
        from_pyro(MCMC(NUTS(regression), num_samples=1))

    def comes_and_goes():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z > 0:
            pyro.deterministic("positive", z)

    mcmc = run(comes_and_goes, warmup_steps=5)
    mcmc._samples = {"z": torch.tensor([[1.0, -1.0]])}
    with pytest.raises(ValueError, match=r"site 'positive' is not in every run of the model"):
        from_pyro(mcmc)
