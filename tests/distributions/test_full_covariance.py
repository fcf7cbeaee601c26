"""The full covariance, its draws and densities against float64, and divergences of Gaussians."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence
from truths import LinearGaussian, linear_vae

from pyro_vae import VAE, fit
from pyro_vae.distributions import (
    ConditionalMultivariateNormal,
    ConditionalNormal,
    MultivariateNormal,
    StandardNormal,
)
from pyro_vae.networks import MLP


def randomize(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)


def test_scale_tril_is_diag_tau_times_unit_lower():
    q = ConditionalMultivariateNormal(MLP(3, [8]), 4)
    assert q(torch.randn(2, 3)).scale_tril.allclose(torch.eye(4))  # off-diagonal starts at zero, scales at one
    randomize(q)
    x = torch.randn(2, 3)
    _, raw, lower = q.head(q.network(x)).split([4, 4, 6], 1)
    tau = nn.functional.softplus(raw + math.log(math.expm1(1 - 1e-5))) + 1e-5
    expected = torch.zeros(2, 4, 4)
    index = 0
    for i in range(4):
        for j in range(i):
            expected[:, i, j] = tau[:, i] * lower[:, index] / 2  # √d
            index += 1
        expected[:, i, i] = tau[:, i]
    torch.testing.assert_close(q(x).scale_tril, expected)


def float32_error(q, z):
    """Against float64 on the very same draw."""
    exact = dist.MultivariateNormal(q.loc.double(), scale_tril=q.scale_tril.double()).log_prob(z.double())
    return (q.log_prob(z).double() - exact).abs().max().item()


def test_full_covariance_is_sound_in_float32_at_start_and_after_training(device):
    data = LinearGaussian(64, 80, noise=4.0, device=device)
    x = data.sample(2000)
    x = (x - x.mean(0)) / x.std(0)
    vae = linear_vae(64, 80).to(device)
    q = vae.encode(x)
    assert float32_error(q, q.rsample()) < 1e-3
    fit(vae.model, vae.guide, x, num_epochs=30, learning_rate=3e-3, loss=TraceMeanField_ELBO(), seed=0)
    q = vae.encode(x)
    off_diagonal = (q.scale_tril / q.scale_tril.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).tril(-1).abs().max()
    assert off_diagonal > 0.1  # it did learn correlations
    assert float32_error(q, q.rsample()) < 1e-3
    assert float32_error(q.expand((3, 2000)), q.expand((3, 2000)).rsample()) < 1e-3


def test_full_covariance_is_sound_for_any_head_of_order_one():
    """Where entries in units of τ alone would give an error of millions of nats; see the next test."""
    q = ConditionalMultivariateNormal(MLP(64, []), 64)
    for p in q.parameters():
        nn.init.normal_(p, std=1 / 8)
    q = q(torch.randn(500, 64))
    assert float32_error(q, q.rsample()) < 1e-3


def test_a_draw_of_an_ill_conditioned_triangle_is_scored_from_its_noise():
    """Off-diagonals as large as the diagonal lose millions of nats in a solve at d = 64: the noise loses none."""
    tril = torch.eye(64) + torch.randn(20, 64, 64).tril(-1)
    loc = torch.randn(20, 64)
    q = MultivariateNormal(loc, 0.1 * tril)
    z = q.rsample()
    eps = torch.linalg.solve_triangular(0.1 * tril.double(), (z.double() - loc).unsqueeze(-1), upper=False)
    assert (eps.square().sum((-2, -1)) > 1e4).any()  # a solve does fail here, even in float64: z was rounded
    expected = -0.5 * q._draw[1].double().square().sum(-1) - 32 * math.log(2 * math.pi) - 64 * math.log(0.1)
    torch.testing.assert_close(q.log_prob(z).double(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("expanded", [False, True])
def test_own_draws_have_the_partial_gradients_of_the_solve(expanded):
    tril = (torch.eye(4) + 0.3 * torch.randn(5, 4, 4).tril(-1)).double().requires_grad_()
    loc = torch.randn(5, 4).double().requires_grad_()
    q, truth = MultivariateNormal(loc, tril), dist.MultivariateNormal(loc, scale_tril=tril)
    if expanded:
        q, truth = q.expand((3, 5)), truth.expand((3, 5))
    z = q.rsample()
    weight = torch.randn(q.batch_shape).double()
    for value in (z, z.detach().clone().requires_grad_()):
        inputs = [value, loc, tril]
        got = torch.autograd.grad((q.log_prob(value) * weight).sum(), inputs, retain_graph=True)
        expected = torch.autograd.grad((truth.log_prob(value) * weight).sum(), inputs, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        z += 1.0  # no longer its draw
    torch.testing.assert_close(q.log_prob(z), truth.log_prob(z))


def gaussians():
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for batch in ((), (5,)):
        tril = 0.4 * random(*batch, 6, 6).tril(-1) + torch.diag_embed(random(*batch, 6).exp())
        yield dist.Normal(random(*batch, 6), random(*batch, 6).exp()).to_event(1)
        yield dist.MultivariateNormal(random(*batch, 6), scale_tril=tril)
        yield MultivariateNormal(random(*batch, 6), tril)
        yield MultivariateNormal(random(*batch, 6), tril, (2, 3))
        yield dist.Normal(random(*batch, 2, 3), random(*batch, 2, 3).exp()).to_event(2)


def dense(p):
    """(mean, covariance) of any of these, (*batch, 6) and (*batch, 6, 6)."""
    mean = p.mean.reshape(*p.batch_shape, 6)
    full = isinstance(p, dist.MultivariateNormal)
    return mean, p.covariance_matrix if full else torch.diag_embed(p.variance.reshape(*p.batch_shape, 6))


def test_kl_of_any_two_gaussians():
    pairs = 0
    for p in gaussians():
        for q in gaussians():
            if p.event_shape != q.event_shape:
                continue
            (m1, s1), (m2, s2) = dense(p), dense(q)
            inverse = torch.linalg.inv(s2)
            delta = (m2 - m1).unsqueeze(-1)
            expected = 0.5 * (
                torch.logdet(s2)
                - torch.logdet(s1)
                - 6
                + (inverse @ s1).diagonal(dim1=-2, dim2=-1).sum(-1)
                + (delta.mT @ inverse @ delta)[..., 0, 0]
            )
            torch.testing.assert_close(kl_divergence(p, q), expected)
            assert (kl_divergence(p, q) >= 0).all()
            pairs += 1
    assert pairs == 52


def test_kl_agrees_with_sampling():
    p, q = list(gaussians())[3], list(gaussians())[4]
    z = p.rsample((100_000,))
    difference = p.log_prob(z) - q.log_prob(z)
    error = difference.std() / math.sqrt(len(z))
    assert (difference.mean() - kl_divergence(p, q)).abs() < 5 * error


@pytest.mark.parametrize("shape", [(3,), (3, 2)], ids=str)
@pytest.mark.parametrize("family", [ConditionalNormal, ConditionalMultivariateNormal])
def test_mean_field_elbo_uses_the_closed_form(family, shape, monkeypatch):
    """Its value is E log p(x|z) − KL, with no noise from log q(z) − log p(z); and log q is never asked for."""
    vae = VAE(StandardNormal(shape), ConditionalNormal(MLP(shape, []), 4, scale=1.0), family(MLP(4, [8]), shape))
    randomize(vae)
    x = torch.randn(7, 4)
    pyro.set_rng_seed(1)
    loss = TraceMeanField_ELBO().loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(1)
    z = vae.guide(x)
    expected = vae.decode(z).log_prob(x).sum() - kl_divergence(vae.encode(x), vae.prior()).sum()
    assert loss == pytest.approx(-expected.item(), rel=1e-5)
    losses = torch.tensor([Trace_ELBO().loss(vae.model, vae.guide, x) for _ in range(200)])
    exact = torch.tensor([TraceMeanField_ELBO().loss(vae.model, vae.guide, x) for _ in range(200)])
    assert (losses.mean() - exact.mean()).abs() < 5 * (losses.var() / 200 + exact.var() / 200).sqrt()
