"""Models of the family whose marginal is known: linear Gaussian ones, with contexts, levels, labels and flows."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence
from truths import LinearGaussian, coupled, exact_vae, set_linear

from pyro_vae import draw_particles, importance_sampling

# -- generated data ---------------------------------------------------------------------------------------------------


def assert_moments(x, mean, covariance):
    """Mean and every covariance of Gaussian rows within five standard errors: √((Σ_ij² + Σ_ii Σ_jj)/n) for these."""
    variance = covariance.diagonal()
    assert ((x.mean(0) - mean).abs() < 5 * (variance / len(x)).sqrt()).all()
    error = ((covariance.square() + variance[:, None] * variance) / len(x)).sqrt()
    assert ((torch.cov(x.T) - covariance).abs() < 5 * error).all()


@pytest.mark.parametrize("mean", [False, True])
def test_new_data_have_every_moment_of_the_model(mean):
    truth = LinearGaussian(2, 4)
    noise = 0.0 if mean else truth.noise**2
    x = exact_vae(truth).generate(50_000, mean=mean)
    assert_moments(x, truth.bias, truth.weight @ truth.weight.T + noise * torch.eye(4))


@pytest.mark.parametrize("mean", [False, True])
def test_similar_data_have_every_moment_of_the_posterior_predictive(mean):
    """x' | x ~ N(W μ(x) + b, W C Wᵀ + s² I), for each of two rows, which alternate among more than are made at once."""
    truth = LinearGaussian(2, 4)
    x, copies, size = truth.sample(2), 5000, 4
    drawn = exact_vae(truth).similar(x.repeat(copies, 1), size=size, mean=mean).unflatten(1, (copies, 2))
    covariance = truth.weight @ truth.covariance.float() @ truth.weight.T
    covariance += 0 if mean else truth.noise**2 * torch.eye(4)
    means = truth.posterior(x).mean @ truth.weight.T + truth.bias
    for row in range(2):
        assert_moments(drawn[:, :, row].flatten(0, 1), means[row], covariance)
    # draws for one row have nothing in common but the row, nor have draws for two rows
    independent = torch.cat([drawn[0], drawn[1]], 1).transpose(0, 1)  # (4, copies, 4)
    correlation = torch.corrcoef(independent.transpose(1, 2).flatten(0, 1)).unflatten(0, (4, 4)).unflatten(2, (4, 4))
    across = correlation.transpose(1, 2)[~torch.eye(4, dtype=torch.bool)]
    assert across.abs().max() < 5 / math.sqrt(copies)


def test_generated_data_follow_their_context():
    truth, slope = LinearGaussian(2, 3), torch.tensor([[1.0, -2.0], [0.5, 0.0], [0.0, 3.0]])
    vae = exact_vae(truth, contexts=2, slope=slope)
    c = torch.randn(30_000, 2)  # more rows than are made at once
    x = vae.generate(None, c)
    assert_moments(x - c @ slope.T, truth.bias, truth.weight @ truth.weight.T + truth.noise**2 * torch.eye(3))


# -- two joints of one coupling ---------------------------------------------------------------------------------------


def autoencoder_loss(squared_error, code, size, scale_f, scale_g):
    """E|x − g(z)|²/2σ_g² + |f(x)|²/2 + const, which is −ELBO where both scales are fixed."""
    k = code.shape[-1]
    constant = size / 2 * math.log(2 * math.pi * scale_g**2) + k / 2 * (scale_f**2 - 1 - math.log(scale_f**2))
    return squared_error / (2 * scale_g**2) + code.square().sum(-1) / 2 + constant


def test_each_draw_of_the_elbo_is_the_loss_of_a_regularised_autoencoder():
    """Whatever f and g are: with KL(q‖p) in closed form, both are functions of one and the same draw z."""
    scale_f, scale_g = 0.4, 0.7
    vae = coupled(scale_f, scale_g, latent=2, size=5, hidden=[8])
    x = torch.randn(20, 5)
    pyro.set_rng_seed(1)
    loss = TraceMeanField_ELBO().loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(1)
    z = vae.encode(x).sample()
    squared_error = (x - vae.decode(z).mean).square().sum(-1)
    expected = autoencoder_loss(squared_error, vae.encode(x).mean, 5, scale_f, scale_g)
    assert loss == pytest.approx(expected.sum().item(), rel=1e-5)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("decoder", ["linear", "curved"])
def test_the_elbo_is_the_loss_of_a_regularised_autoencoder(decoder, elbo):
    """The mean over z in closed form, |x − g(f(x))|² + σ_f² |W|², where g is linear; by quadrature where it is not."""
    scale_f, scale_g, size = 0.4, 0.7, 5
    latent, hidden = (3, []) if decoder == "linear" else (1, [8])
    vae = coupled(scale_f, scale_g, latent=latent, size=size, hidden=hidden)
    x = torch.randn(1, size)
    code = vae.encode(x).mean
    if decoder == "linear":
        weight = vae.likelihood.head.weight.detach()
        squared_error = (x - vae.decode(code).mean).square().sum(-1) + scale_f**2 * weight.square().sum()
    else:
        eps = torch.linspace(-7, 7, 401).unsqueeze(-1)
        density = dist.Normal(0.0, 1.0).log_prob(eps[:, 0]).exp() * 14 / 400
        squared_error = (density * (x - vae.decode(code + scale_f * eps).mean).square().sum(-1)).sum()[None]
    exact = autoencoder_loss(squared_error, code, size, scale_f, scale_g).item()
    loss = elbo(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    losses = torch.tensor([loss.loss(vae.model, vae.guide, x) for _ in range(40)])
    error = losses.std().item() / math.sqrt(len(losses))
    assert error < 0.02  # nats, of some ten
    assert abs(losses.mean().item() - exact) < 5 * error


def test_the_divergence_of_the_joints_is_the_loss_less_the_entropy_of_the_data():
    """KL(n_f‖n_g) of two Normals of (x, z). Where the scales are those of the exact posterior it is zero."""
    weight, bias, scale_g = torch.tensor([[1.1, 0.0], [0.0, 0.6], [0.0, -0.8]]), torch.tensor([0.5, -1.0, 0.0]), 0.6
    data = dist.MultivariateNormal(bias, weight @ weight.T + scale_g**2 * torch.eye(3))
    for scale_f, tilt, zero in ((0.7, 0.3, False), (None, 0.0, True)):
        q = torch.linalg.inv(weight.T @ weight / scale_g**2 + torch.eye(2))
        gain = q @ weight.T / scale_g**2 + tilt
        scale_f = q.diagonal().sqrt() if scale_f is None else torch.full((2,), scale_f)
        vae = coupled(scale_f, scale_g, latent=2, size=3)
        set_linear(vae.likelihood, weight, bias)
        set_linear(vae.posterior, gain, -gain @ bias)
        v = data.covariance_matrix
        joint_f = torch.cat([torch.cat([v, v @ gain.T], 1), torch.cat([gain @ v, gain @ v @ gain.T], 1)])
        joint_f[3:, 3:] += torch.diag(scale_f**2)
        joint_g = torch.cat([torch.cat([v, weight], 1), torch.cat([weight.T, torch.eye(2)], 1)])
        mean = torch.cat([bias, torch.zeros(2)])
        n_f, n_g = (dist.MultivariateNormal(mean, joint) for joint in (joint_f, joint_g))
        exact = kl_divergence(n_f, n_g).item()
        x = data.sample((20_000,))
        # log p(x, z) − log q(z|x) and log p_data(x) of the same rows: their difference has mean KL(n_f‖n_g)
        with torch.no_grad():
            log_weight = draw_particles(vae.model, vae.guide, x, num_particles=1).log_weight[0]
        difference = data.log_prob(x) - log_weight
        error = difference.std().item() / math.sqrt(len(x))
        assert abs(difference.mean().item() - exact) < 5 * error + 1e-5
        assert (abs(exact) < 1e-5) == zero
        assert (error < 1e-6) == zero  # equal joints: not only in the mean


# -- contexts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widen", [1.0, 1.3])
def test_evidence_given_a_context(widen):
    """log p(x|c) = log N(x; A c + b, W Wᵀ + s² I), for the context that is given and for a wrong one alike."""
    truth, slope = LinearGaussian(2, 4), torch.randn(4, 3)
    vae = exact_vae(truth, contexts=3, slope=slope, widen=widen)
    c = torch.randn(30, 3)
    x = truth.sample(30) + c @ slope.T
    for context in (c, c.flip(0)):
        exact = truth.log_evidence(x - context @ slope.T)
        found = importance_sampling(vae.model, vae.guide, x, context, num_particles=2000)
        if widen == 1:
            torch.testing.assert_close(found.log_evidence, exact, atol=1e-4, rtol=1e-5)
            assert found.standard_error.max() < 1e-5
        else:
            z = (found.log_evidence - exact) / found.standard_error
            assert z.abs().max() < 5
            assert z.square().mean() > 0.2  # error bars that are not far too large
    wrong = importance_sampling(vae.model, vae.guide, x, c.flip(0), num_particles=100).log_evidence
    assert wrong.mean() < truth.log_evidence(x - c @ slope.T).mean() - 1
