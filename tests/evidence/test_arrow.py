"""The fit of a Gaussian with arrow-shaped precision against closed forms, and grids over globals times quadrature."""

import math

import pytest
import torch
from joint_densities import (
    F64,
    EightSchools,
    HierarchicalGaussian,
    RandomEffects,
    integrated_weights,
    joint_weights,
    log_evidence,
    on_grid,
)
from torch.distributions import Normal

from pyro_vae.evidence import arrow
from pyro_vae.evidence.arrow import fit_arrow
from pyro_vae.evidence.structured import good_width

# -- the fit against closed forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "dtype", "spread"),
    [
        ((600, 2, 1), torch.float64, 1.0),
        ((600, 5, 2), torch.float32, 1.0),
        ((2000, 3, 1), torch.float64, 1.0),
        ((2000, 5, 1), torch.float32, 0.3),
        ((600, 3, 1), torch.float64, 10.0),
        ((6, 2, 4), torch.float64, 1.0),
    ],
)
def test_the_posterior_of_a_hierarchical_gaussian_model(sizes, dtype, spread):
    density = HierarchicalGaussian(*sizes, dtype=dtype, spread=spread)
    q = fit_arrow(density)
    assert q.scale_tril.dtype == q.local_scale_tril.dtype == dtype
    assert max(density.errors(q).values()) < 2e-3
    width = good_width(sizes[1] + sizes[0] * sizes[2])
    value, error, ess, khat = log_evidence(joint_weights(density, q.widened(width, width), 1000))
    assert abs(value - density.log_evidence) < 3.5 * error
    assert error < 0.02
    assert ess > 800
    assert khat < 0.5


@pytest.mark.parametrize("sizes", [(300, 0, 2), (300, 3, 0)])
def test_without_globals_or_without_locals(sizes):
    if not sizes[2]:
        sizes = (*sizes[:2], 1)  # a likelihood of the globals alone, made from the locals' marginal

    class Marginal(HierarchicalGaussian):
        dim = 0

        def __init__(self):
            super().__init__(*sizes)
            self.dim, total = 0, 1 / self.inverse[:, :, 0] + self.noise.square()
            self.total = total.sqrt()[:, 0]

        def log_joint(self, g, u):
            assert u.shape[-1] == 0
            mean = torch.einsum("nj,kj->kn", self.design[:, 0], g)
            return Normal(0.0, 1.0).log_prob(g).sum(-1), Normal(mean, self.total).log_prob(self.x[:, 0])

    density = HierarchicalGaussian(*sizes) if sizes[1] == 0 else Marginal()
    q = fit_arrow(density)
    if sizes[1]:
        root = torch.linalg.cholesky(density.cov)
        assert torch.linalg.solve(root, q.loc - density.mean).abs().max() < 1e-3
        torch.testing.assert_close(
            q.scale_tril @ q.scale_tril.mT, density.cov, rtol=1e-3, atol=1e-3 * density.cov.max()
        )
    else:
        assert max(density.errors(q).values()) < 2e-3
    value, error, _, _ = log_evidence(joint_weights(density, q.widened(1.01, 1.01), 1000))
    assert abs(value - density.log_evidence) < 5 * error + 1e-6


# -- the fit against grids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_points", "options"),
    [
        (300, {}),
        (300, {"dtype": torch.float32}),
        (600, {"spread": 0.1}),
        (300, {"binomial": True}),
        (3000, {"binomial": True, "dtype": torch.float32}),
    ],
)
def test_random_effects_of_unknown_scale(num_points, options):
    """C_n does not follow τ in a jointly Gaussian fit, whose log τ is too narrow by a third."""
    density = RandomEffects(num_points, **options)
    q = fit_arrow(density)
    truth, mean, std = on_grid(density, q)
    assert ((q.loc - mean) / std).abs().max() < 0.4
    ratio = (q.scale_tril @ q.scale_tril.mT).diagonal().sqrt() / std
    assert (ratio - 1).abs().max() < 0.1
    if density.num_points <= 600:
        widened = q.widened(good_width(2), good_width(1))
        value, error, _, khat = log_evidence(integrated_weights(density, widened, 300))
        assert abs(value - truth) < 5 * error
        assert error < 0.05
        assert khat < 0.5


@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_eight_schools(spread):
    density = EightSchools(spread=spread)
    q = fit_arrow(density)
    truth, mean, std = on_grid(density, q)
    assert ((q.loc - mean) / std).abs().max() < 0.25
    ratio = (q.scale_tril @ q.scale_tril.mT).diagonal().sqrt() / std
    assert (ratio - 1).abs().max() < 0.35  # log τ has a long left tail
    value, error, _, _ = log_evidence(integrated_weights(density, q.widened(1.3, 1.05), 2000, num_particles=50))
    assert abs(value - truth) < 5 * error
    assert error < 0.05


@pytest.mark.parametrize("seed", [2, 8, 16])
def test_a_start_that_is_far_too_wide(seed):
    """Some draws of exp u there are so large that the mean curvature has the wrong sign."""
    torch.manual_seed(seed)
    density = RandomEffects(600, spread=1.0)
    q = fit_arrow(density)
    _, mean, std = on_grid(density, q)
    assert ((q.loc - mean) / std).abs().max() < 0.4


class Measured(RandomEffects):
    """x_n ~ N(u_n, s_n²), so that u_n given the globals is exactly Gaussian, of the variance 1 / (1/τ² + 1/s_n²)."""

    def __init__(self, num_points):
        self.num_points, self.sigma = num_points, 0.3 + torch.rand(num_points, **F64)
        self.x = Normal(0.5, (0.5 + self.sigma.square()).sqrt()).sample()

    def likelihood(self, u):
        return Normal(u, self.sigma)

    def log_marginal(self, g):
        return Normal(g[:, :1], (g[:, 1:].mul(2).exp() + self.sigma.square()).sqrt()).log_prob(self.x).sum(-1)


def test_the_scale_of_the_locals_follows_the_globals():
    density = Measured(600)
    q = fit_arrow(density)
    variance = 1 / ((-2 * q.loc[1]).exp() + 1 / density.sigma.square())
    torch.testing.assert_close(q.local_scale_tril[:, 0, 0].abs(), variance.sqrt(), rtol=0.02, atol=0)
    slope = variance * (-2 * q.loc[1]).exp()  # of log C_n in log τ
    torch.testing.assert_close(q.log_scale_slope[:, 0, 1], slope, rtol=0.02, atol=0.01)
    assert q.log_scale_slope[:, 0, 0].abs().max() < 0.01
    truth, mean, std = on_grid(density, q)
    assert ((q.loc - mean) / std).abs().max() < 0.2
    width = good_width(602)
    value, error, ess, khat = log_evidence(joint_weights(density, q.widened(width, width), 2000))
    assert abs(value - truth) < 5 * error  # with all latents weighed at once, where a jointly Gaussian q fails
    assert ess > 1000
    assert khat < 0.5


def test_the_globals_of_a_jointly_gaussian_fit_are_too_narrow(monkeypatch):
    """What the integrated steps are for."""
    monkeypatch.setattr(arrow, "MOST_INTEGRATED", 0)
    density = RandomEffects(600)
    q = fit_arrow(density, num_steps=20)
    std = on_grid(density, q, half_width=14.0)[2]
    assert (q.scale_tril @ q.scale_tril.mT).diagonal().sqrt()[1] / std[1] < 0.75


def test_errors_of_many_slopes_do_not_add_up(monkeypatch):
    """The curvature of the globals is the same with few draws and with many, where f is quadratic in the globals."""
    density = RandomEffects(6000)
    q = arrow.replace(fit_arrow(density), log_scale_slope=None).widened(0.05, 1.0)
    few = torch.stack([arrow._regress(density, q).marginal.hessian for _ in range(60)])
    monkeypatch.setattr(arrow, "SPARE_DRAWS", 200)
    many = torch.stack([arrow._regress(density, q).marginal.hessian for _ in range(4)])
    error = few.std(0) / math.sqrt(60) + many.std(0) / 2
    assert ((few.mean(0) - many.mean(0)).abs() < 4 * error).all()
    assert error.max() < 0.01


# -- where it cannot be done ------------------------------------------------------------------------------------------


def test_a_point_without_finite_gradients_keeps_the_guide():
    class Broken(HierarchicalGaussian):
        def gradient(self, g, u):
            g_gradient, u_gradient = super().gradient(g, u)
            u_gradient[:, 3] = math.nan
            return g_gradient, u_gradient

    density = Broken(600, 2, 1)
    torch.manual_seed(5)
    q = fit_arrow(density, num_steps=10)
    torch.manual_seed(5)
    guide = density.draw(100)[1][:, 3]
    torch.testing.assert_close(q.local_loc[3], guide.mean(0))
    torch.testing.assert_close(q.local_scale_tril[3, 0], guide.std(0))
    assert not q.slope[3].any()
    others = torch.arange(600) != 3
    error = (q.local_loc - density.a)[others] / density.c[others, :, 0].sqrt()
    assert error.abs().max() < 0.1  # its part in the globals' mean is missing


def test_globals_without_finite_gradients_keep_the_guide():
    class Broken(HierarchicalGaussian):
        def gradient(self, g, u):
            g_gradient, u_gradient = super().gradient(g, u)
            return g_gradient * math.nan, u_gradient

        def log_joint(self, g, u):
            prior, conditional = super().log_joint(g, u)
            return prior, conditional + (0.0 if u.requires_grad else math.nan)

    density = Broken(50, 2, 1)
    torch.manual_seed(5)
    q = fit_arrow(density)
    torch.manual_seed(5)
    guide = density.draw(100)[0]
    torch.testing.assert_close(q.loc, guide.mean(0))
    torch.testing.assert_close(q.scale_tril, torch.diag(guide.std(0)))
    assert q.local_loc.isfinite().all()


def test_a_guide_without_width():
    """As an AutoDelta; some draws are not defined."""

    class Delta(HierarchicalGaussian):
        def draw(self, count):
            g, u = torch.full((count, 2), 0.4, **F64), torch.full((count, 600, 1), 0.3, **F64)
            u[::2] = math.nan
            return g, u

    density = Delta(600, 2, 1)
    assert max(density.errors(fit_arrow(density)).values()) < 0.05
