"""Latents outside of the plate of data points: posteriors of all, and log p(x_n|θ) with the others integrated out.

Eight schools (Rubin 1981), with numbers by quadrature over tau; mu and theta are Gaussian given it.
"""

import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from trees import GROUPS, dims, elpd, flat, groups, sampled, trained, with_draws

from pyro_vae import from_pyro, from_pyro_svi

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * raw)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def pooled(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("school", len(sigma)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def log_marginal(tau, keep):
    """log p(y_keep|tau), with mu ~ N(0, 25) and theta integrated out, and mean and variance of mu given them."""
    y, spread = Y[keep].double(), (tau[:, None] ** 2 + SIGMA[keep].double() ** 2)
    precision = 1 / 25 + (1 / spread).sum(1)
    mean = (y / spread).sum(1) / precision
    log_p = -0.5 * ((y**2 / spread).sum(1) - mean**2 * precision + spread.log().sum(1) + (25 * precision).log())
    return log_p - 0.5 * len(y) * np.log(2 * np.pi), mean, 1 / precision


def quadrature(keep=slice(None)):
    """log p(y_keep), E tau and E mu."""
    u = torch.linspace(-10.0, 8.0, 20001).double()  # log tau
    tau = u.exp()
    log_p, mean, _ = log_marginal(tau, keep)
    log_p = log_p + dist.HalfCauchy(torch.tensor(5.0).double()).log_prob(tau) + u
    total = log_p.logsumexp(0) + (u[1] - u[0]).log()
    weight = log_p.softmax(0)
    return total.item(), (weight * tau).sum().item(), (weight * mean).sum().item()


def left_out():
    """Σ_n log p(y_n | y_{-n}), exactly."""
    whole = quadrature()[0]
    return sum(whole - quadrature([i for i in range(8) if i != n])[0] for n in range(8))


def integrated(tree):
    """log p(y_n|mu, tau) in closed form."""
    mu, tau = (flat(tree, "posterior", name)[:, None] for name in ("mu", "tau"))
    return dist.Normal(mu, (tau.square() + SIGMA.square()).sqrt()).log_prob(Y)


# -- eight schools ----------------------------------------------------------------------------------------------------


def exact_draws(count):
    """Of all latents, given the data: tau by its distribution function, mu given tau, theta given both."""
    u = torch.linspace(-10.0, 8.0, 20001).double()
    log_p, mean, variance = log_marginal(u.exp(), slice(None))
    log_p = log_p + dist.HalfCauchy(torch.tensor(5.0).double()).log_prob(u.exp()) + u
    index = torch.multinomial(log_p.softmax(0), count, replacement=True)
    tau = u[index].exp()
    mu = dist.Normal(mean[index], variance[index].sqrt()).sample()
    precision = 1 / tau[:, None] ** 2 + 1 / SIGMA**2
    theta = dist.Normal((mu[:, None] / tau[:, None] ** 2 + Y / SIGMA**2) / precision, precision.rsqrt()).sample()
    return {"mu": mu, "tau": tau, "raw": (theta - mu[:, None]) / tau[:, None]}


def test_eight_schools_by_nuts():
    tree = from_pyro(sampled(schools, SIGMA, Y, num_samples=120, warmup_steps=60))
    _, tau, mu = quadrature()
    assert (round(mu, 1), round(tau, 1)) == (4.4, 3.6)
    for name, exact in (("mu", mu), ("tau", tau)):
        value = flat(tree, "posterior", name)
        ess = float(az.ess(tree["posterior"][name].values))
        assert value.mean().item() == pytest.approx(exact, abs=4 * value.std().item() / ess**0.5)
    assert dims(tree, "posterior")["theta"] == "chain draw school"


def test_leave_one_out_of_eight_schools():
    """It is that of exact refits, at exact draws, and compares the hierarchical model with the pooled one."""
    pyro.set_rng_seed(0)
    mean, variance = (t.item() for t in log_marginal(torch.zeros(1).double(), slice(None))[1:])
    draws = {name: value.float() for name, value in exact_draws(600).items()}
    trees = {
        "schools": from_pyro(with_draws(draws, schools, SIGMA, Y)),
        "pooled": from_pyro(with_draws({"mu": mean + variance**0.5 * torch.randn(600)}, pooled, SIGMA, Y)),
    }
    tree = trees["schools"]
    assert elpd(tree)[0] == pytest.approx(left_out(), abs=0.1)
    assert elpd(tree)[1] == pytest.approx(0.4, abs=0.2)  # of mu and tau; theta is integrated out
    error = tree["sample_stats"]["log_likelihood_error"].values
    difference = (flat(tree, "log_likelihood", "y") - integrated(tree)).numpy()
    assert (np.sqrt((difference**2).mean(0)) < 1.5 * error).all()
    assert (error < 0.05).all()
    with warnings.catch_warnings(action="ignore"):
        compared = az.compare(trees)
    assert compared.index[0] == "pooled"  # by a quarter of a nat


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_eight_schools_by_svi(make):
    """The guide draws each latent by itself, or all of them together."""
    tree = from_pyro_svi(schools, trained(schools, make, SIGMA, Y, steps=400), SIGMA, Y, seed=0)
    assert groups(tree) == GROUPS | {"constant_data"}
    assert dims(tree, "posterior") == {
        "mu": "chain draw", "raw": "chain draw school", "tau": "chain draw", "theta": "chain draw school",
    }  # fmt: skip
    assert dims(tree, "log_likelihood") == {"y": "chain draw school"}
    assert tree["posterior"].attrs["data_plate"] == "school"
    evidence, tau, mu = quadrature()
    stats = tree["sample_stats"]
    assert abs(stats["log_evidence"].item() - evidence) < 5 * stats["log_evidence_error"].item()
    weights = torch.tensor(stats["log_weights"].values[0]).softmax(0)
    for name, exact in (("mu", mu), ("tau", tau)):
        value = flat(tree, "posterior", name)
        mean = (weights * value).sum()
        error = (weights * (value - mean)).square().sum().sqrt()
        assert abs(mean - exact) < 5 * error
    error = stats["log_likelihood_error"].values
    difference = (flat(tree, "log_likelihood", "y") - integrated(tree)).numpy()
    assert (np.sqrt((difference**2).mean(0)) < 1.5 * error).all()
    assert elpd(tree)[0] == pytest.approx(left_out(), abs=0.3)  # the guide is none of the posterior
    raw, theta = flat(tree, "posterior", "raw"), flat(tree, "posterior", "theta")
    mu, tau = (flat(tree, "posterior", name)[:, None] for name in ("mu", "tau"))
    torch.testing.assert_close(theta, mu + tau * raw)
    torch.testing.assert_close(
        flat(tree, "sample_stats", "log_p_y_given_latents"), dist.Normal(theta, SIGMA).log_prob(Y)
    )


def test_globals_alone():
    """Without latents of data points log p(y_n|θ) is exact, and so is what weights say of the evidence."""
    guide = trained(pooled, AutoNormal, SIGMA, Y, steps=150, learning_rate=0.1)
    tree = from_pyro_svi(pooled, guide, SIGMA, Y, num_samples=500)
    mu = flat(tree, "posterior", "mu")[:, None]
    expected = dist.Normal(mu, SIGMA).log_prob(Y)
    torch.testing.assert_close(flat(tree, "log_likelihood", "y").float(), expected)
    torch.testing.assert_close(flat(tree, "sample_stats", "log_p_y_given_latents"), expected)
    assert "log_likelihood_error" not in dims(tree, "sample_stats")
    exact = log_marginal(torch.zeros(1).double(), slice(None))[0].item()
    stats = tree["sample_stats"]
    assert abs(stats["log_evidence"].item() - exact) < 5 * stats["log_evidence_error"].item()


def test_priors_are_priors():
    """Draws of the prior have latents of the prior outside too, not those of the guide, which are near its start."""
    tree = from_pyro_svi(schools, AutoNormal(schools), SIGMA, Y, num_samples=2000)
    assert flat(tree, "posterior", "mu").std() < 1
    assert flat(tree, "prior", "mu").std().item() == pytest.approx(5.0, abs=5 * 5 / np.sqrt(4000))
    mu, tau, raw, theta = (flat(tree, "prior", name) for name in ("mu", "tau", "raw", "theta"))
    torch.testing.assert_close(theta, mu[:, None] + tau[:, None] * raw)
    residual = (flat(tree, "prior_predictive", "y") - theta) / SIGMA
    assert residual.std().item() == pytest.approx(1.0, abs=5 / np.sqrt(32000))


def test_new_data_have_the_globals_of_the_posterior():
    given = {"num_samples": 1000, "predictions": (torch.full((30,), 0.01), None)}
    tree = from_pyro_svi(schools, AutoNormal(schools), SIGMA, Y, **given)
    assert flat(tree, "posterior", "mu").std() < 1  # the guide is where it starts, and its globals are not the prior's
    assert dims(tree, "predictions") == {"y": "chain draw school"}
    mu, tau = (flat(tree, "posterior", name)[:, None] for name in ("mu", "tau"))
    scaled = (flat(tree, "predictions", "y") - mu) / (tau.square() + 1e-4).sqrt()
    assert scaled.std().item() == pytest.approx(1.0, abs=5 / np.sqrt(2 * 30000))


def test_reparametrised_schools():
    def centred(sigma, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(sigma)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    model = poutine.reparam(centred, {"theta": LocScaleReparam(0.0)})
    tree = from_pyro_svi(model, trained(model, AutoDiagonalNormal, SIGMA, Y, steps=100), SIGMA, Y, num_samples=300)
    assert set(dims(tree, "posterior")) == {"mu", "tau", "theta", "theta_decentered"}
    for group in ("observed_data", "log_likelihood", "posterior_predictive"):
        assert list(dims(tree, group)) == ["y"]
    error = tree["sample_stats"]["log_likelihood_error"].values
    difference = (flat(tree, "log_likelihood", "y") - integrated(tree)).numpy()
    assert (np.sqrt((difference**2).mean(0)) < 1.5 * error).all()


# -- which plate ------------------------------------------------------------------------------------------------------


def grid(x):
    with pyro.plate("rows", 4, dim=-2):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def flat_grid(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def test_the_plate_is_found():
    x = torch.randn(4, 3)
    tree = from_pyro_svi(grid, AutoNormal(grid), x, num_samples=5)  # the plate that the latents are in
    assert tree["log_likelihood"].attrs["data_plate"] == "rows"
    assert dims(tree, "log_likelihood") == {"x": "chain draw rows"}
    with pytest.warns(UserWarning, match=r"plates \['rows', 'columns'\]; data points are those of 'rows'. Try plate=…"):
        tree = from_pyro_svi(flat_grid, AutoNormal(flat_grid), x, num_samples=5)
    assert dims(tree, "log_likelihood") == {"x": "chain draw rows"}
    tree = from_pyro_svi(flat_grid, AutoNormal(flat_grid), x, num_samples=5, plate="columns")
    assert dims(tree, "log_likelihood") == {"x": "chain draw columns"}


def test_without_a_plate_all_data_are_one_point():
    def model(x):
        m = pyro.sample("m", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(m, 1.0).to_event(1), obs=x)

    tree = from_pyro_svi(model, AutoNormal(model), torch.randn(3), num_samples=5)
    assert tree["posterior"].attrs["data_plate"] == "none"
    assert dims(tree, "posterior") == {"m": "chain draw m_dim_0"}
    assert groups(tree) == GROUPS - {"log_likelihood"}


def test_seeds():
    trees = [from_pyro_svi(pooled, AutoNormal(pooled), SIGMA, Y, num_samples=5, seed=3) for _ in range(2)]
    np.testing.assert_array_equal(*(tree["posterior_predictive"]["y"].values for tree in trees))
