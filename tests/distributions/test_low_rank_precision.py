"""Low-rank Gaussians against float64, from wide to narrow."""

import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from pyro_vae.distributions import ConditionalLowRankMultivariateNormal
from pyro_vae.distributions.gaussians import LowRankMultivariateNormal
from pyro_vae.networks import MLP

DTYPES = [torch.float32, torch.float64]


def low_rank(scale, dtype=torch.float32, d=6, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loc, factor = torch.randn(5, d, generator=generator), torch.randn(5, d, rank, generator=generator)
    return LowRankMultivariateNormal(loc.to(dtype), factor.to(dtype), torch.full((5, d), scale**2, dtype=dtype))


def dense(q):
    """The same in float64, as a full covariance."""
    factor, diag = q.cov_factor.double(), q.cov_diag.double()
    return dist.MultivariateNormal(q.loc.double(), factor @ factor.mT + torch.diag_embed(diag))


@pytest.mark.parametrize("scale", [3.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4])
def test_low_rank_log_prob(scale):
    q = low_rank(scale)
    z = q.rsample((20,))
    # what rounding z alone costs: a residual of order one in units of the scale, moved by eps |z| / scale
    tolerance = 1e-5 + 30 * torch.finfo(torch.float32).eps * 4 / scale
    assert (q.log_prob(z).double() - dense(q).log_prob(z.double())).abs().max() < tolerance
    expanded = q.expand((3, 5))
    torch.testing.assert_close(expanded.log_prob(z[:3]), q.log_prob(z[:3]))
    exact = low_rank(scale, torch.float64)
    z = exact.rsample((20,))
    torch.testing.assert_close(exact.log_prob(z), dense(exact).log_prob(z), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize("apart", [0.0, 1e-3, 1e-2])
def test_low_rank_with_nearly_parallel_columns(scale, apart):
    """Their C is singular in float32: where σ = 1e-3 half of such have no Cholesky factor."""
    column = torch.randn(50, 20, 1)
    factor = torch.cat([column, column + apart * torch.randn(50, 20, 1)], -1)
    q = LowRankMultivariateNormal(torch.zeros(20), factor, torch.tensor(scale**2).expand(20))
    z = q.sample()
    assert (q.log_prob(z).double() - dense(q).log_prob(z.double())).abs().max() < 1e-5 + 2e-5 / scale
    assert (q.entropy().double() - dense(q).entropy()).abs().max() < 1e-3


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-3])
def test_low_rank_gradients(scale):
    q = low_rank(scale)
    z = q.sample()
    single, double = (
        [t.to(dtype).clone().requires_grad_() for t in (z, q.loc, q.cov_factor, q.cov_diag)] for dtype in DTYPES
    )
    got = torch.autograd.grad(LowRankMultivariateNormal(*single[1:]).log_prob(single[0]).sum(), single)
    _, loc, factor, diag = double
    truth = dist.MultivariateNormal(loc, factor @ factor.mT + torch.diag_embed(diag))
    expected = torch.autograd.grad(truth.log_prob(double[0]).sum(), double)
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).abs().max() < 1e-5 / scale * b.abs().max()


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-3, 1e-4])
def test_low_rank_divergences(scale):
    p, normal = low_rank(scale), dist.Normal(torch.zeros(6), 1.0).to_event(1)
    q = LowRankMultivariateNormal(p.loc + 0.3 * scale, p.cov_factor * (1 + scale / 5), 1.5 * p.cov_diag)
    full = dist.MultivariateNormal(torch.zeros(6), torch.eye(6))
    torch_p = dist.LowRankMultivariateNormal(p.loc, p.cov_factor, p.cov_diag)
    exact_p, exact_q, exact_full = (
        dense(p),
        dense(q),
        dist.MultivariateNormal(*(t.double() for t in (full.loc, full.covariance_matrix))),
    )
    pairs = [
        (p, q, exact_p, exact_q),
        (torch_p, q, exact_p, exact_q),
        (p, normal, exact_p, exact_full),
        (p, full, exact_p, exact_full),
        (normal.expand((5,)), p, exact_full, exact_p),
        (full, p, exact_full, exact_p),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an ambiguous pair
        for a, b, exact_a, exact_b in pairs:
            got, exact = kl_divergence(a, b).double(), kl_divergence(exact_a, exact_b)
            torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-3)


def test_low_rank_family_is_sound():
    q = ConditionalLowRankMultivariateNormal(MLP(3, []), 8, rank=2)
    with torch.no_grad():
        q.head.bias[8:16] = math.log(1e-3)  # σ near 2e-3
        q.head.bias[16:].normal_()
    q = q(torch.randn(50, 3))
    z = q.sample()
    assert (q.log_prob(z).double() - dense(q).log_prob(z.double())).abs().max() < 0.02
