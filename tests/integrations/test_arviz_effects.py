"""An effect of each data point, and a mean of all: leave-one-out, evidence and resampled draws against closed forms."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from pyro.infer.autoguide import (
    AutoGaussian,
    AutoHierarchicalNormalMessenger,
    AutoMessenger,
    AutoNormal,
    AutoNormalMessenger,
)
from trees import dims, elpd, flat, trained, with_draws

from pyro_vae import from_pyro, from_pyro_svi


def effects(x):
    """A mean, and an effect of each data point that is much larger than the noise."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 0.3), obs=x)


def exact_evidence(x):
    """x is Gaussian, with covariance 1.09 I + 1."""
    covariance = 1.09 * torch.eye(len(x)).double() + 1
    return dist.MultivariateNormal(torch.zeros(len(x)).double(), covariance).log_prob(x.double()).item()


@pytest.mark.parametrize("make", [AutoNormalMessenger, AutoHierarchicalNormalMessenger, AutoGaussian])
def test_guides_that_draw_in_other_ways(make):
    """With auxiliary sites, with plates or without, in the model's own order: weights mean the evidence.

    Eight schools have those of AutoNormal and of AutoMultivariateNormal.
    """
    x = torch.tensor([-1.0, 0.5, 2.0])
    alone = issubclass(make, AutoMessenger)  # one particle at a time, and so more steps
    guide = trained(effects, make, x, steps=400 if alone else 150, together=not alone, learning_rate=0.05)
    tree = from_pyro_svi(effects, guide, x, seed=0)
    assert dims(tree, "posterior") == {"mean": "chain draw", "z": "chain draw data"}
    assert dims(tree, "observed_data") == {"x": "data"}
    stats = tree["sample_stats"]
    assert abs(stats["log_evidence"].item() - exact_evidence(x)) < 5 * stats["log_evidence_error"].item() + 1e-3
    assert stats["ess"].item() > 50


def exact_left_out(x):
    """Σ_n log p(x_n|x_{-n}): x is Gaussian, with covariance 1.09 I + 1."""
    x, n = x.double(), len(x)
    covariance = 1.09 * torch.eye(n).double() + 1
    precision = torch.linalg.inv(covariance)
    variance = 1 / precision.diagonal()
    mean = x - (precision @ x) * variance
    return dist.Normal(mean, variance.sqrt()).log_prob(x).sum().item()


def exact_draws(x, count):
    """Of the mean given the data, and of the effects given both."""
    precision = 1 + len(x) / 1.09
    mean = dist.Normal(x.sum() / 1.09 / precision, precision**-0.5).sample((count,))
    return {"mean": mean, "z": dist.Normal((x + 0.09 * mean[:, None]) / 1.09, (0.09 / 1.09) ** 0.5).sample()}


def test_integrated_leave_one_out_of_random_effects():
    """It is that of exact refits within its error; the conditional one is far off."""
    pyro.set_rng_seed(0)
    x = torch.randn(60) * 1.09**0.5 + 0.5
    mcmc = with_draws(exact_draws(x, 200), effects, x)
    tree = from_pyro(mcmc)
    assert elpd(tree)[0] == pytest.approx(exact_left_out(x), abs=0.3)
    assert elpd(tree)[1] == pytest.approx(1.0, abs=0.5)
    conditional = from_pyro(mcmc, num_particles=0)
    with warnings.catch_warnings(action="ignore"):
        assert elpd(conditional)[0] > exact_left_out(x) + 10
        assert elpd(conditional)[1] > 30
    guide = trained(effects, AutoNormal, x, steps=300)
    tree = from_pyro_svi(effects, guide, x, num_samples=500)
    assert elpd(tree)[0] == pytest.approx(exact_left_out(x), abs=0.3)


def test_latents_that_are_summed_and_integrated():
    """Discrete and continuous latents of a data point, and a mean of all: against the closed form given it."""
    shares, offsets = torch.tensor([0.3, 0.7]), torch.tensor([-2.0, 2.0])

    @config_enumerate
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            k = pyro.sample("k", dist.Categorical(shares))
            pyro.sample("x", dist.Normal(z + offsets[k], 0.5), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(0.0, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x = torch.tensor([-3.0, 0.0, 1.0, 3.0])
    for tree in (
        from_pyro_svi(model, guide, x, num_samples=100),
        from_pyro(with_draws({"mean": torch.randn(100), "z": torch.randn(100, 4)}, model, x)),
    ):
        mean = flat(tree, "posterior", "mean")[:, None, None]
        terms = shares.log() + dist.Normal(mean + offsets, 1.25**0.5).log_prob(x[:, None])
        difference = (flat(tree, "log_likelihood", "x") - terms.logsumexp(-1)).square().mean(0).sqrt().numpy()
        error = tree["sample_stats"]["log_likelihood_error"].values
        assert (difference < 1.5 * error).all()
        assert (error < 0.2).all()
        z, k = flat(tree, "posterior", "z"), flat(tree, "posterior", "k")
        conditional = dist.Normal(z + offsets[k], 0.5).log_prob(x)
        torch.testing.assert_close(flat(tree, "sample_stats", "log_p_x_given_latents"), conditional)


# -- draws by their weights -------------------------------------------------------------------------------------------


def test_resampled_draws():
    """A guide that is twice too wide: the draws by their weights have the moments of the posterior."""

    def guide(x):
        mean = pyro.sample("mean", dist.Normal(0.3, 1.2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + 0.09 * mean) / 1.09, 2 * (0.09 / 1.09) ** 0.5))

    x = torch.tensor([-1.0, 0.5, 2.0])
    tree = from_pyro_svi(effects, guide, x, num_samples=20000, resample=True, seed=0, predictions=(x,))
    precision = 1 + 3 / 1.09  # of the mean, given x
    mean, z = flat(tree, "posterior", "mean"), flat(tree, "posterior", "z")
    ess = tree["sample_stats"]["ess"].item()
    spread = precision**-0.5
    assert 1000 < ess < 15000
    assert mean.mean().item() == pytest.approx(x.sum().item() / 1.09 / precision, abs=5 * spread / ess**0.5)
    assert mean.std().item() == pytest.approx(spread, rel=5 / (2 * ess) ** 0.5)
    variance = 0.09 / 1.09 + (0.09 / 1.09) ** 2 / precision
    assert z.std(0).numpy() == pytest.approx(variance**0.5, rel=5 / (2 * ess) ** 0.5)
    conditional = flat(tree, "sample_stats", "log_p_x_given_latents")
    torch.testing.assert_close(conditional, dist.Normal(z, 0.3).log_prob(x))
    torch.testing.assert_close(flat(tree, "log_prior", "mean"), dist.Normal(0.0, 1.0).log_prob(mean))
    expected = dist.Normal(mean[:, None], 1.09**0.5).log_prob(x)
    assert np.corrcoef(flat(tree, "log_likelihood", "x")[:, 0], expected[:, 0])[0, 1] > 0.9
    assert np.corrcoef(flat(tree, "predictions", "x").mean(1), mean)[0, 1] > 0.5
    assert "log_weights" not in dims(tree, "sample_stats")
