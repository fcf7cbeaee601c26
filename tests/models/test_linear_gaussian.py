"""Linear Gaussian models against closed forms: on real data, a linear VAE is probabilistic PCA (Lucas et al. 2019)."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from truths import LinearGaussian, linear_vae, linear_vae_log_evidence

from pyro_vae import fit, importance_sampling
from pyro_vae.distributions import ConditionalMultivariateNormal
from pyro_vae.networks import MLP


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    return datasets.load_digits().data[:600].astype(np.float32) / 16


def test_linear_vae_on_digits_reaches_probabilistic_pca(digits, device):
    """Exact log p(x) within 0.01 nats of PCA(4).score, whose maximum likelihood is in closed form; and the evidence of
    every row by importance sampling within 5 standard errors of the exact one."""
    from sklearn.decomposition import PCA

    best = PCA(n_components=4).fit(digits.astype(np.float64)).score(digits.astype(np.float64))
    vae = linear_vae(4, 64).to(device)
    vae.likelihood.head.bias.data = torch.tensor(digits.mean(0), device=device)
    fit(
        vae.model, vae.guide, digits, num_epochs=150, batch_size=50, learning_rate=0.05, seed=0,
        loss=TraceMeanField_ELBO(),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 150),
    )  # fmt: skip
    x = torch.tensor(digits, device=device)
    exact = linear_vae_log_evidence(vae, x)
    assert abs(exact.mean().item() - best) < 0.01
    evidence = importance_sampling(vae.model, vae.guide, x, num_particles=1000)
    z = (evidence.log_evidence - exact) / evidence.standard_error
    assert z.abs().max() < 5
    assert z.abs().median() > 0.1  # the error bars are not merely wide
    assert evidence.doubtful.float().mean() < 0.02


def amortized(truth):
    posterior = ConditionalMultivariateNormal(MLP(len(truth.bias), []), truth.latent)

    def guide(x):
        pyro.module("posterior", posterior)
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x))

    return posterior, guide


def test_a_correlated_posterior_is_recovered():
    """Σ is the same for all x: that of q within 1 % of the standard deviations on average, within 5 % for each x."""
    truth = LinearGaussian(3, 5, noise=1.5)
    exact, deviations = truth.covariance.float(), truth.covariance.float().diagonal().sqrt()
    correlation = exact / torch.outer(deviations, deviations)
    assert correlation.tril(-1).abs().max() > 0.3
    posterior, guide = amortized(truth)
    x = truth.sample(500)
    fit(
        truth.model, guide, x, num_epochs=500, batch_size=500, learning_rate=0.03, seed=0, progress=False,
        loss=Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 500),
    )  # fmt: skip
    with torch.no_grad():
        q = posterior(x)
        difference = (q.covariance_matrix - exact) / torch.outer(deviations, deviations)
        assert difference.mean(0).abs().max() < 0.01
        assert difference.abs().max() < 0.05
        assert ((q.mean - truth.posterior(x).mean).abs() / deviations).max() < 0.05


def test_gradients_of_draws_are_those_of_the_closed_form():
    """ELBO = E log p(x|z) − KL(q‖p) of a linear Gaussian model, differentiated as it stands, entry by entry."""
    truth = LinearGaussian(2, 4)
    posterior, guide = amortized(truth)
    x, parameters = truth.sample(5), list(posterior.parameters())
    q = posterior(x)
    covariance = q.covariance_matrix
    residual = x - q.mean @ truth.weight.T - truth.bias
    spread = torch.einsum("ij,njk,ik->n", truth.weight, covariance, truth.weight)
    log_likelihood = -(residual.square().sum(-1) + spread) / (2 * truth.noise**2)
    kl = 0.5 * (covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + q.mean.square().sum(-1) - covariance.logdet())
    exact = torch.cat([g.flatten() for g in torch.autograd.grad((kl - log_likelihood).sum(), parameters)])
    elbo = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
    draws = []
    for _ in range(200):
        loss = elbo.differentiable_loss(truth.model, guide, x)
        draws.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    draws = torch.stack(draws)
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() < 5 * error + 1e-3).all()
    assert exact.abs().median() > 50 * error.median()  # the error bars are not merely wide
