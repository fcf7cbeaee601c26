"""Latent usage against closed forms."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import kl_divergence
from truths import LinearGaussian, coupled, exact_vae, set_linear

from pyro_vae import importance_sampling, latent_usage
from pyro_vae.distributions import (
    ConditionalFlow,
    ConditionalNormal,
)
from pyro_vae.networks import MLP

# -- what latent dimensions are used for ------------------------------------------------------------------------------


def three_dimensions():
    """W with orthogonal columns, the last of them zero: the posterior is diagonal, and one dimension says nothing."""
    truth = LinearGaussian(3, 5)
    truth.weight = torch.linalg.qr(truth.weight).Q * torch.tensor([2.0, 0.5, 0.0])
    covariance = 1 / (1 + truth.weight.square().sum(0) / truth.noise**2)
    truth.covariance = torch.diag(covariance).double()
    return truth, covariance


def test_usage_of_a_diagonal_posterior_in_closed_form():
    """KL_d = ½ E(c + m² − 1 − log c) over rows and A_d = Var(m), with m and c the posterior's mean and variance."""
    truth, covariance = three_dimensions()
    x = truth.sample(500)
    m = truth.posterior(x).mean
    for vae in (exact_vae(truth), coupled(covariance.sqrt(), truth.noise, latent=3, size=5)):
        if isinstance(vae.posterior, ConditionalNormal):
            gain = covariance[:, None] * truth.weight.T / truth.noise**2
            set_linear(vae.likelihood, truth.weight, truth.bias)
            set_linear(vae.posterior, gain, -gain @ truth.bias)
        usage = latent_usage(vae.model, vae.guide, x)
        kl = 0.5 * (covariance + m.square() - 1 - covariance.log()).mean(0)
        torch.testing.assert_close(usage.kl, kl, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(usage.variance_of_means, m.var(0), rtol=1e-4, atol=1e-5)
        assert usage.active.tolist() == [True, True, False]
        assert usage.kl[2].abs() < 1e-5
        assert "collapsed [2]" in repr(usage)
        # over many rows, m has the variance 1 − c of p(z) that the posterior explains: 500 rows, 5 standard errors
        assert ((m.var(0) - (1 - covariance)).abs() <= 5 * math.sqrt(2 / 499) * (1 - covariance) + 1e-6).all()
        threshold = (usage.variance_of_means[0] + usage.variance_of_means[1]).item() / 2
        assert latent_usage(vae.model, vae.guide, x, threshold=threshold).active.tolist() == [True, False, False]


def test_usage_of_a_correlated_posterior_is_that_of_its_marginals():
    truth = LinearGaussian(2, 3)
    x = truth.sample(200)
    vae = exact_vae(truth)
    usage = latent_usage(vae.model, vae.guide, x)
    m, c = truth.posterior(x).mean, truth.covariance.float().diagonal()
    torch.testing.assert_close(usage.kl, 0.5 * (c + m.square() - 1 - c.log()).mean(0), rtol=1e-4, atol=1e-5)
    whole = kl_divergence(truth.posterior(x), dist.MultivariateNormal(torch.zeros(2), torch.eye(2))).mean()
    assert usage.kl.sum() < whole - 0.01  # what the correlation costs is no dimension's


def test_usage_of_a_flow_is_estimated_from_draws():
    """A flow whose maps are affine is Gaussian, but does not say so: no KL, and means from draws, less their noise."""
    truth, covariance = three_dimensions()
    x = truth.sample(400)
    gain = covariance[:, None] * truth.weight.T / truth.noise**2
    base = ConditionalNormal(MLP(5, []), 3, scale=2 * covariance.sqrt())
    shift = torch.tensor([0.5, -1.0, 2.0])
    affine = dist.transforms.AffineTransform(shift, 0.5, event_dim=1)
    set_linear(base, 2 * gain, -2 * (gain @ truth.bias + shift))
    vae = exact_vae(truth)
    vae.posterior = ConditionalFlow(base, [affine])
    found = importance_sampling(vae.model, vae.guide, x, num_particles=20)
    torch.testing.assert_close(found.log_evidence.float(), truth.log_evidence(x).float(), atol=1e-3, rtol=1e-4)
    m = truth.posterior(x).mean
    for num_particles in (4, 100):
        usage = latent_usage(vae.model, vae.guide, x, num_particles=num_particles)
        assert usage.kl.isnan().all()
        # of the variance of m + e over rows, e ~ N(0, c/K): twice the covariance with e, and the spread of e² itself
        noise = covariance / num_particles
        error = (4 * m.var(0) * noise / 400 + 2 * noise.square() / 400).sqrt()
        assert ((usage.variance_of_means - m.var(0)).abs() < 5 * error + 1e-6).all()
    assert usage.active.tolist() == [True, True, False]


def test_usage_of_a_latent_number():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    x = torch.randn(50)
    usage = latent_usage(model, guide, x)
    expected = 0.5 * (0.5 + (x / 2).square() - 1 - math.log(0.5)).mean()
    torch.testing.assert_close(usage.kl, expected.reshape(1))
    torch.testing.assert_close(usage.variance_of_means, (x / 2).var().reshape(1))
