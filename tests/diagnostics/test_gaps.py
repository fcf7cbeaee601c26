"""Approximation and amortization gaps against closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from truths import LinearGaussian

from pyro_vae.diagnostics import inference_gaps


@pytest.fixture
def pair():
    """A linear-Gaussian model, and a diagonal guide that is 0.2 off in each dimension, and of other scales."""
    truth = LinearGaussian(3, 4)

    def guide(x):
        loc = truth.posterior(x).mean + 0.2
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, torch.tensor([0.3, 0.5, 0.7])).to_event(1))

    return truth, guide, truth.sample(40)


def closed_forms(truth):
    """KL of the best diagonal Gaussian, with the diagonal of the precision P, and of the guide:
    ½ (Σ log P_dd − log|P|) and ½ (tr P S − D − log|P S| + δᵀ P δ)."""
    precision = torch.linalg.inv(truth.covariance)
    best = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    covariance = torch.tensor([0.3, 0.5, 0.7]).double().square().diag()
    shift = torch.full((3,), 0.2).double()
    both = precision @ covariance
    return best, 0.5 * (both.trace() - 3 - torch.logdet(both) + shift @ precision @ shift)


def test_the_closed_forms_of_a_diagonal_guide(pair):
    truth, guide, x = pair
    gaps = inference_gaps(truth.model, guide, x, num_particles=1500, seed=1, progress=False)
    best, own = closed_forms(truth)
    assert gaps.family == "diagonal"
    assert gaps.is_gaussian.all()
    for found, error, expected in (
        (gaps.approximation, gaps.approximation_error, best),
        (gaps.amortization, gaps.amortization_error, own - best),
        (gaps.best - truth.log_evidence(x), gaps.best_error, -best),
        (gaps.elbo - truth.log_evidence(x), gaps.elbo_error, -own),
    ):
        off = (found - expected) / error
        assert off.abs().max() < 4.5
        assert off.mean().abs() < 4 / len(x) ** 0.5
        assert 0.7 < off.std() < 1.4
        assert (found.mean() - expected).abs() < 0.04 * expected.abs()
    torch.testing.assert_close(gaps.inference, gaps.approximation + gaps.amortization)


def test_the_full_family_has_no_approximation_gap_here(pair):
    truth, guide, x = pair
    gaps = inference_gaps(truth.model, guide, x, family="full", seed=1, progress=False)
    assert (gaps.best - truth.log_evidence(x)).abs().max() < 1e-4  # the posterior itself
    assert (gaps.approximation / gaps.approximation_error).abs().max() < 4.5
    own = closed_forms(truth)[1]
    assert ((gaps.amortization - own) / gaps.amortization_error).abs().max() < 4.5


def test_the_family_is_that_of_the_density_whatever_the_guide_is_made_of():
    """A LogNormal for a positive latent is a diagonal Gaussian over its logarithm; a Gamma is none."""

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            other = pyro.sample("other", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(other, 1 + rate), obs=x)

    def guide_of(rate, slope):
        def guide(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("other", dist.Normal(x / 4, 0.8))
                pyro.sample("rate", rate(slope * z))

        return guide

    x = torch.linspace(-2, 2, 10)
    for rate, slope, family, gaussian in (
        (lambda z: dist.LogNormal(0.3 + 0 * z, 0.6), 0.0, "diagonal", True),
        (lambda z: dist.LogNormal(0.3 + z, 0.6), 0.5, "full", True),
        (lambda z: dist.Gamma(3.0 + 0 * z, 2.0), 0.0, "full", False),
    ):
        gaps = inference_gaps(model, guide_of(rate, slope), x, num_particles=200, seed=0, progress=False)
        assert gaps.family == family
        assert (gaps.is_gaussian == gaussian).all()


def test_a_guide_that_is_no_gaussian_may_be_better_than_the_best_one():
    """The posterior has two modes, and the guide is exact."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.abs(), 0.2), obs=x)

    def guide(x):
        variance = 1 / (1 + 0.2**-2)
        loc = torch.stack([x, -x], -1) * variance / 0.2**2
        with pyro.plate("data", len(x)):
            both = dist.Normal(loc, variance**0.5)
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones_like(loc)), both))

    gaps = inference_gaps(model, guide, torch.linspace(1.0, 2.0, 8), num_particles=300, seed=0, progress=False)
    assert not gaps.is_gaussian.any()
    assert (gaps.approximation - torch.tensor(2.0).log()).abs().max() < 0.05  # it finds one of two equal modes
    assert (gaps.amortization + torch.tensor(2.0).log()).abs().max() < 0.05
    assert "the guide is no Gaussian at 8 points, and better than the best one at 8" in repr(gaps)


def test_what_is_printed_and_drawn(pair):
    truth, guide, x = pair
    gaps = inference_gaps(truth.model, guide, x, num_particles=300, num_steps=8, seed=0, progress=False)
    text = repr(gaps)
    assert text.startswith("Inference gaps of 40 data points, best diagonal Gaussian for each (nats)")
    assert "amortization gap     mean" in text
    ax = gaps.plot()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "approximation (best diagonal Gaussian)",
        "amortization (network)",
    ]
    from matplotlib import pyplot

    pyplot.close(ax.figure)


def test_what_is_refused(pair):
    truth, guide, x = pair
    with pytest.raises(ValueError, match="family: expected None, 'diagonal' or 'full', got 'flow'"):
        inference_gaps(truth.model, guide, x, family="flow")
    with pytest.raises(ValueError, match="no plate 'rows'"):
        inference_gaps(truth.model, guide, x, plate="rows")
