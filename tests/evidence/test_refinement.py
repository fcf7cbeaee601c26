"""Refined guides: the Gaussian of each row against closed forms and quadrature, and what takes them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import planar
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from truths import LinearGaussian
from truths.battery import TRUTHS

from pyro_vae import adaptive_importance_sampling, draw_particles, draw_posterior, importance_sampling
from pyro_vae.evidence import refine


@pytest.fixture
def pair():
    truth = LinearGaussian(3, 4)
    return truth, lambda x: truth.guide(x, widen=1.5), truth.sample(30)


def data_of(truth, n):
    return poutine.trace(poutine.uncondition(truth.model)).get_trace(torch.zeros(n, *truth.shape)).nodes["x"]["value"]


# -- what is fitted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gaussian_posterior_is_found_exactly(dtype):
    truth = LinearGaussian(3, 4, dtype=dtype)
    x = truth.sample(30)
    refined = refine(truth.model, lambda x: truth.guide(x, widen=1.5), x, seed=0, progress=False)
    posterior = truth.posterior(x)
    tolerance = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(refined.loc, posterior.mean, **tolerance)
    torch.testing.assert_close(refined.scale_tril, posterior.scale_tril.expand(30, 3, 3), **tolerance)
    assert refined.loc.dtype is dtype
    # KL of a guide that is w times as wide: D (½ (w² − 1) − log w)
    expected = 3 * (0.5 * (1.5**2 - 1) - torch.tensor(1.5).log())
    assert ((refined.gap - expected) / refined.gap_error).abs().max() < 4.5
    assert not refined.kept.any()
    assert refined.is_gaussian.all()
    particles = draw_particles(truth.model, refined, x, num_particles=3)
    assert (particles.log_weight - truth.log_evidence(x)).abs().max() < 1e-3


def test_small_gains_are_no_matter_of_luck():
    """A guide 2 % too wide loses 0.0012 nats of a row, whose free draws have noise of 0.0035."""
    truth = LinearGaussian(3, 4)
    x = truth.sample(100)
    refined = refine(truth.model, lambda x: truth.guide(x, widen=1.02), x, seed=0, progress=False)
    assert not refined.kept.any()
    root = truth.posterior(x).scale_tril
    torch.testing.assert_close(refined.scale_tril, root.expand(100, 3, 3), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["Bernoulli network, 2 latents", "two levels", "mixture with latents, enumerated"])
def test_the_divergence_from_the_posterior_shrinks_by_what_is_said(name):
    """KL(q‖p) = log p(x) − ELBO, with log p(x) by quadrature; several sites, and discrete latents summed out."""
    truth = TRUTHS[name]()
    x = data_of(truth, 40)
    refined = refine(truth.model, truth.guide, x, seed=0, progress=False)
    kl, variance = [], 0.0
    for guide in (truth.guide, refined):
        evidence = adaptive_importance_sampling(truth.model, guide, x, num_particles=1000, seed=1, progress=False)
        off = (evidence.log_evidence - truth.log_evidence(x)) / (evidence.standard_error + 1e-3)
        assert off.abs().max() < 4.5
        log_weight = draw_particles(truth.model, guide, x, num_particles=1000, seed=2).log_weight.double()
        kl.append(truth.log_evidence(x) - log_weight.mean(0))
        variance = variance + log_weight.var(0) / len(log_weight)
    difference = kl[0] - kl[1] - refined.gap
    variance = variance + refined.gap_error**2
    assert (difference / variance.sqrt()).abs().max() < 4.5
    assert difference.mean().abs() < 4.5 * variance.sum().sqrt() / len(x)
    assert kl[1].mean() < 0.4 * kl[0].mean()


class Curves:
    """A positive, a bounded and a simplex latent, and one in an inner plate."""

    def model(self, x, start):
        with pyro.plate("data", len(x), dim=-2):
            rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
            share = pyro.sample("share", dist.Beta(2.0, 2.0))
            parts = pyro.sample("parts", dist.Dirichlet(torch.ones(3)))
            with pyro.plate("times", 2, dim=-1):
                shift = pyro.sample("shift", dist.Normal(start.unsqueeze(-1), 1.0))
                loc = rate * parts[..., 0] + share * parts[..., 1] + shift
                pyro.sample("x", dist.Normal(loc, 0.3), obs=x)

    def guide(self, x, start):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("share", dist.Beta(2.0, 2.0))
            pyro.sample("rate", dist.Gamma(3.0, 2.0))
            pyro.sample("parts", dist.Dirichlet(torch.ones(3)))
            with pyro.plate("times", 2, dim=-1):
                pyro.sample("shift", dist.Normal(start.unsqueeze(-1), 1.0))


def test_supports_inner_plates_and_several_arguments():
    curves = Curves()
    x, start = torch.randn(12, 2) + 1.0, torch.linspace(-1, 1, 12)
    refined = refine(curves.model, curves.guide, x, start, seed=0, progress=False)
    assert refined.loc.shape == (12, 1 + 1 + 2 + 2)
    assert not refined.is_gaussian.any()
    assert refined.gap.min() > 1.0
    first, second, before = (
        estimate(curves.model, guide, x, start, num_particles=2000, seed=1, progress=False)
        for estimate, guide in (
            (importance_sampling, refined),
            (adaptive_importance_sampling, refined),
            (importance_sampling, curves.guide),
        )
    )
    error = torch.hypot(first.standard_error, second.standard_error)
    assert ((first.log_evidence - second.log_evidence) / error).abs().max() < 4.5
    assert second.effective_sample_size.median() > 1.5 * before.effective_sample_size.median()
    some = draw_particles(curves.model, refined, x[[5, 2]], start[[5, 2]], num_particles=4)
    assert some.latents["parts"].shape == (4, 2, 3)
    assert some.latents["shift"].shape == (4, 2, 2)
    with pytest.raises(ValueError, match="2 of 2 rows are none of them"):  # rows of one, with the start of another
        refined(x[[5, 2]], start[[2, 5]])


# -- latents outside of the plate -------------------------------------------------------------------------------------


class Hierarchy:
    """m ~ N(3, 2²), z_n ~ N(m, a²), x_n ~ N(z_n, b²): z_n given all of x is a Gaussian, and p(z_n|m, x_n) too."""

    a, b = 1.2, 0.7

    def model(self, x):
        m = pyro.sample("m", dist.Normal(3.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, self.a))
            pyro.sample("x", dist.Normal(z, self.b), obs=x)

    def posterior_m(self, x):
        precision = 0.25 + len(x) / (self.a**2 + self.b**2)
        return (0.75 + x.sum() / (self.a**2 + self.b**2)) / precision, precision**-0.5

    def guide(self, x):
        pyro.sample("m", dist.Normal(*self.posterior_m(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 1.0))

    def posterior(self, x):
        """Mean and standard deviation of z_n given all of x."""
        precision = self.a**-2 + self.b**-2
        loc, scale = self.posterior_m(x)
        slope = self.a**-2 / precision
        return slope * loc + x * self.b**-2 / precision, (1 / precision + (slope * scale) ** 2) ** 0.5


def test_locals_given_globals_equal_the_closed_form():
    hierarchy = Hierarchy()
    x = 3 + torch.randn(6)
    refined = refine(hierarchy.model, hierarchy.guide, x, seed=0, progress=False)
    assert (refined.gap > 0).all()
    loc, scale = hierarchy.posterior(x)
    z = draw_guide(refined, x, 20_000)
    assert ((z.mean(0) - loc) / scale).abs().max() < 4.5 / 20_000**0.5
    assert (z.std(0) / scale - 1).abs().max() < 0.02
    log_weight = importance_sampling(hierarchy.model, refined, x, plate=None, num_particles=50, progress=False)
    assert log_weight.effective_sample_size > 49.9  # each joint weight is p(x), so that z and m go together
    one = Trace_ELBO().loss(hierarchy.model, refined, x)
    assert abs(one + log_weight.log_evidence.item()) < 1e-3


def test_globals_and_locals_are_drawn_and_weighed_together():
    hierarchy = Hierarchy()
    x = 3 + torch.randn(6)
    guide = AutoNormal(hierarchy.model, init_scale=0.3)
    refined = refine(hierarchy.model, guide, x, seed=0, progress=False)
    loc, scale = hierarchy.posterior(x)
    found = draw_posterior(hierarchy.model, refined, x, num_samples=4000, num_particles=2000, seed=0, progress=False)
    assert ((found["z"].mean(0) - loc) / scale).abs().max() < 4.5 / 1500**0.5
    draws = refined.sample_posterior(x, num_samples=20, seed=0)
    assert draws["m"].shape == (20,)
    assert draws["z"].shape == (20, 6)
    torch.testing.assert_close(refined.median(x)["m"], guide.median(x)["m"])
    assert (refined.get_posterior(x).mean - refined.loc).abs().max() < 0.1  # at the median of m, not its mean of draws


def draw_guide(guide, x, count):
    with pyro.plate("draws", count, dim=-2):
        return poutine.trace(guide).get_trace(x).nodes["z"]["value"]


def test_q_of_globals_is_the_guides_own_and_still_trains():
    hierarchy = Hierarchy()
    x = 3 + torch.randn(50)
    guide = AutoNormal(hierarchy.model, init_scale=0.3)
    guide(x)
    refined = refine(hierarchy.model, guide, x, seed=0, progress=False)
    m = poutine.trace(refined).get_trace(x)
    assert {n for n, s in m.nodes.items() if s["type"] == "sample"} >= {"m", "m_unconstrained", "z"}
    assert "z_unconstrained" not in m.nodes
    before = guide.locs.m.item()
    svi = SVI(hierarchy.model, refined, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(50):
        svi.step(x)
    target = hierarchy.posterior_m(x)[0]
    assert abs(guide.locs.m.item() - target) < abs(before - target)


def test_globals_of_any_support():
    def model(x):
        tau = pyro.sample("tau", dist.LogNormal(0.5, 0.1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, tau))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        tau = pyro.sample("tau", dist.LogNormal(0.5, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0 * x, tau))

    x = torch.linspace(-4, 4, 7)
    refined = refine(model, guide, x, seed=0, progress=False)
    # E[z|tau, x] = x tau²/(1 + tau²), whose slope in log tau is 2 x tau²/(1 + tau²)²
    squared = torch.tensor(1.0).exp()
    torch.testing.assert_close(refined.slope.flatten(), 2 * x * squared / (1 + squared) ** 2, rtol=0.03, atol=0.01)
    torch.testing.assert_close(refined.loc.flatten(), x * squared / (1 + squared), rtol=0.02, atol=0.01)


# -- where steps do not help ------------------------------------------------------------------------------------------


def test_an_exact_guide_loses_nothing(pair):
    truth, _, x = pair
    refined = refine(truth.model, truth.guide, x, seed=0, progress=False)
    assert refined.gap.abs().max() < 1e-3
    assert (refined.gap[refined.kept] == 0).all()


def test_a_guide_that_is_no_gaussian_and_better_is_said_to_be():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.abs(), 0.2), obs=x)

    def guide(x):
        loc = torch.stack([x, -x], -1) / 1.04
        with pyro.plate("data", len(x)):
            both = dist.Normal(loc, (1 / 26) ** 0.5)
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones_like(loc)), both))

    refined = refine(model, guide, torch.linspace(1.0, 2.0, 8), seed=0, progress=False)
    assert (refined.gap + torch.tensor(2.0).log()).abs().max() < 0.1
    assert "worse        8 of 8: the guide is no Gaussian, and better there" in repr(refined)


def test_a_flow_without_an_inverse_is_a_start_too(pair):
    truth, _, x = pair
    flow = planar(3)

    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    refined = refine(truth.model, guide, x, seed=0, progress=False)
    assert not refined.is_gaussian.any()
    assert (refined.loc - truth.posterior(x).mean).abs().max() < 1e-3


def test_what_is_printed(pair):
    truth, guide, x = pair
    text = repr(refine(truth.model, guide, x, seed=0, progress=False))
    assert text.startswith("RefinedGuide of 30 data points, 3 unconstrained latents each\n  ELBO gained  mean 0.6")
    assert text.endswith("not helped   0 of 30, which keep where they started")


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_refused(pair):
    truth, guide, x = pair
    with pytest.raises(ValueError, match="refine: plate: expected the name"):
        refine(truth.model, guide, x, plate=None)
    with pytest.raises(ValueError, match="num_steps: expected at least 1"):
        refine(truth.model, guide, x, num_steps=0)
    hierarchy = Hierarchy()
    joint = AutoMultivariateNormal(hierarchy.model)
    with pytest.raises(ValueError, match="one joint density of latents inside and outside of the plate"):
        refine(hierarchy.model, joint, torch.randn(5))

    def subsampling(x):
        with pyro.plate("data", len(x), subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def its_guide(x):
        with pyro.plate("data", len(x), subsample_size=3) as index:
            pyro.sample("z", dist.Normal(x[index] / 2, 1.0))

    with pytest.raises(ValueError, match="draws 3 of 10 data points by itself"):
        refine(subsampling, its_guide, torch.randn(10))


def test_discrete_latents_that_are_not_summed_out_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(torch.full_like(x, 0.5)))
            pyro.sample("z", dist.Normal(y, 1.0))

    with pytest.raises(ValueError, match="site 'y' is discrete"):
        refine(model, guide, torch.randn(6), progress=False)

    def enumerated(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    refined = refine(config_enumerate(model), enumerated, torch.randn(6), seed=0, progress=False)
    assert refined.loc.shape == (6, 1)
