"""Low-rank covariances against full ones."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence
from truths import inverse_positive, set_linear

from pyro_vae import VAE, latent_usage
from pyro_vae.distributions import (
    ConditionalLowRankMultivariateNormal,
    ConditionalMultivariateNormal,
    ConditionalNormal,
    StandardNormal,
)
from pyro_vae.networks import MLP

# -- low rank ---------------------------------------------------------------------------------------------------------


def low_rank_and_full(d=4, rank=2):
    """Two posteriors with the same mean and covariance for every x, one as factor and diagonal, one as triangle."""
    low, full = (
        ConditionalLowRankMultivariateNormal(MLP(3, []), d, rank=rank),
        ConditionalMultivariateNormal(MLP(3, []), d),
    )
    gain, bias, scale, factor = torch.randn(d, 3), torch.randn(d), torch.rand(d) + 0.3, 0.7 * torch.randn(d, rank)
    set_linear(full, gain, bias, torch.linalg.cholesky(factor @ factor.T + torch.diag(scale**2)))
    with torch.no_grad():
        low.head.weight[:d] = gain
        low.head.bias.copy_(torch.cat([bias, inverse_positive(scale), factor.flatten()]))
    return low, full


def test_divergences_of_low_rank_and_full_gaussians_in_both_directions():
    low, full = low_rank_and_full()
    x, y = torch.randn(2, 5, 3)
    a, b, c = low(x), full(x), full(y)
    torch.testing.assert_close(a.covariance_matrix, b.covariance_matrix)
    plain_b, plain_c = (dist.MultivariateNormal(q.loc, q.covariance_matrix) for q in (b, c))
    exact = kl_divergence(plain_b, plain_c)
    assert exact.min() > 0.1
    for p, q in ((a, c), (b, low(y)), (a, low(y)), (a, plain_c), (plain_b, low(y)), (b, c)):
        torch.testing.assert_close(kl_divergence(p, q), exact, rtol=1e-3, atol=1e-4)
    for p in (a, b):
        assert kl_divergence(p, {a: b, b: a}[p]).abs().max() < 1e-4


def test_the_elbo_of_a_low_rank_posterior_is_that_of_the_full_one():
    """Where x does not depend on z, TraceMeanField_ELBO has no noise: log p(x) − KL(q‖p), the same for both."""
    low, full = low_rank_and_full()
    x = torch.randn(6, 3)
    likelihood = ConditionalNormal(MLP(4, []), 3, scale=0.8)
    set_linear(likelihood, torch.zeros(3, 4), torch.ones(3))
    covariance, m = full(x).covariance_matrix, full(x).mean
    kl = 0.5 * (covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + m.square().sum(-1) - 4 - covariance.logdet())
    exact = (dist.Normal(1.0, 0.8).log_prob(x).sum(-1) - kl).sum().item()
    for q in (low, full):
        vae = VAE(StandardNormal(4), likelihood, q)
        assert -TraceMeanField_ELBO().loss(vae.model, vae.guide, x) == pytest.approx(exact, rel=1e-5)
        c = covariance.diagonal(dim1=-2, dim2=-1)
        usage = latent_usage(vae.model, vae.guide, x)
        torch.testing.assert_close(usage.kl, 0.5 * (c + m.square() - 1 - c.log()).mean(0), rtol=1e-4, atol=1e-5)
    # where x does depend on it, so do both: E log p(x|z) = log N(x; W m + b, s²) − tr(W Σ Wᵀ)/2s²
    weight = torch.randn(3, 4)
    set_linear(likelihood, weight, torch.ones(3))
    spread = torch.einsum("ij,njk,ik->n", weight, covariance, weight) / (2 * 0.8**2)
    exact = (dist.Normal(m @ weight.T + 1, 0.8).log_prob(x).sum(-1) - spread - kl).sum().item()
    for q in (low, full):
        vae = VAE(StandardNormal(4), likelihood, q)
        loss = TraceMeanField_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
        elbos = torch.tensor([-loss.loss(vae.model, vae.guide, x) for _ in range(40)])
        error = elbos.std().item() / math.sqrt(40)
        assert abs(elbos.mean().item() - exact) < 5 * error
        assert error < 0.02 * abs(exact)
