"""The Gaussian over globals and locals, its width, and stratified draws, against dense Gaussians and closed forms."""

import math

import pytest
import torch
from joint_densities import F64
from torch.distributions import MultivariateNormal, Normal

from pyro_vae.evidence.structured import Arrow, good_width, stratified


def some_arrow(scaled=False):
    slope = 0.3 * torch.randn(3, 2, 2, **F64) if scaled else None
    square = torch.randn(2, 2, **F64), torch.randn(3, 2, 2, **F64)
    return Arrow(
        torch.randn(2, **F64), square[0], torch.randn(3, 2, **F64), torch.randn(3, 2, 2, **F64), square[1], slope
    )


def test_density_is_that_of_the_dense_gaussian():
    q = some_arrow()
    rows = [torch.cat([q.scale_tril, torch.zeros(2, 6)], 1)]
    for n in range(3):
        row = torch.zeros(2, 8, **F64)
        row[:, :2], row[:, 2 + 2 * n : 4 + 2 * n] = q.slope[n] @ q.scale_tril, q.local_scale_tril[n]
        rows.append(row)
    root = torch.cat(rows)
    dense = MultivariateNormal(torch.cat([q.loc, q.local_loc.flatten()]), root @ root.mT)
    g = q.draw_globals(200_000)
    u = q.draw_locals(g)
    found = q.log_prob_globals(g) + q.log_prob_locals(u, g).sum(-1)
    torch.testing.assert_close(found, dense.log_prob(torch.cat([g, u.flatten(1)], 1)))
    sample = torch.cat([g, u.flatten(1)], 1).T.cov()
    torch.testing.assert_close(sample, root @ root.mT, atol=0.02 * (root @ root.mT).diagonal().max().item(), rtol=0)
    some = q.points(slice(1, 3))
    torch.testing.assert_close(some.log_prob_locals(u[:, 1:], g), q.log_prob_locals(u, g)[:, 1:])
    wide = q.widened(2.0, 3.0)
    torch.testing.assert_close(wide.draw_globals(50_000).std(0), 2 * g.std(0), rtol=0.03, atol=0)
    centre = q.loc.expand(50_000, 2)
    torch.testing.assert_close(wide.draw_locals(centre).std(0), 3 * q.draw_locals(centre).std(0), rtol=0.03, atol=0)


def test_locals_whose_scale_follows_the_globals():
    """E p/q = 1 over draws of q, for a Gaussian p of each point: density and draws agree at each g."""
    q = some_arrow(scaled=True)
    g = (q.loc + torch.tensor([0.7, -0.4], **F64)).expand(100_000, 2)
    u = q.draw_locals(g)
    spread = (q.log_scale_slope @ torch.tensor([0.7, -0.4], **F64)).exp()
    covariance = q.local_scale_tril * spread.square().unsqueeze(-2) @ q.local_scale_tril.mT
    for n in range(3):
        exact = MultivariateNormal(q.given(g[:1])[0, n], covariance[n])
        torch.testing.assert_close(q.log_prob_locals(u, g)[:, n], exact.log_prob(u[:, n]))
        torch.testing.assert_close(u[:, n].T.cov(), covariance[n], rtol=0.05, atol=0.05 * covariance[n].max().item())


@pytest.mark.parametrize("dim", [1, 10, 50, 400])
def test_width_costs_a_tenth_of_the_draws_at_most(dim):
    width = good_width(dim)
    assert 1.0 < width <= 1.05
    u = width * torch.randn(20_000, dim, **F64)
    log_weight = Normal(0.0, 1.0).log_prob(u).sum(1) - Normal(0.0, width).log_prob(u).sum(1)
    assert log_weight.var() < 0.12
    if width < 1.05:
        assert log_weight.var() == pytest.approx(0.1, rel=0.15)
    assert good_width(0) == good_width(1) == 1.05


def test_stratified_draws_are_unbiased_and_more_precise():
    noise = stratified(torch.zeros(1, **F64), 64, 4000, 2)
    torch.testing.assert_close(noise[:32], -noise[32:])

    def f(e):
        return (0.5 * e[..., 0] - 0.3 * e[..., 1]).exp()

    means, plain = f(noise).mean(0), f(torch.randn(64, 4000, 2, **F64)).mean(0)
    exact = math.exp(0.5 * (0.25 + 0.09))
    assert abs(means.mean().item() - exact) < 5 * means.std().item() / math.sqrt(4000)
    assert means.std() < 0.4 * plain.std()
    fourth = noise.pow(4).mean(0)
    assert abs(fourth.mean().item() - 3.0) < 5 * fourth.std().item() / math.sqrt(8000)
