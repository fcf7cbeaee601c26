"""Options of the estimators."""

import math

import arviz as az
import numpy as np
import pytest
import torch
from truths import LinearGaussian

from pyro_vae import (
    annealed_importance_sampling,
    importance_sampling,
)
from pyro_vae.evidence.density import LatentDensity
from pyro_vae.evidence.log_weights import LogWeightSummary
from pyro_vae.evidence.proposals import from_guide, from_prior, mixture_weights
from pyro_vae.particles.sampler import ParticleSampler

# -- options of importance sampling -----------------------------------------------------------------------------------


def test_jackknife_against_leaving_each_weight_out():
    for k, heavy in ((2, 1.0), (37, 0.5), (1000, 1.5)):
        log_weight = heavy * torch.randn(k, 6, dtype=torch.float64) - 700
        summary = LogWeightSummary(k, correction="jackknife")
        for chunk in log_weight.split(33):
            summary.update(chunk)
        value, error, _, _ = summary.result()
        total = log_weight.logsumexp(0) - math.log(k)
        others = ~torch.eye(k, dtype=torch.bool).unsqueeze(-1)
        left = log_weight.expand(k, k, 6).masked_fill(~others, -math.inf).logsumexp(1) - math.log(k - 1)
        torch.testing.assert_close(value, k * total - (k - 1) * left.mean(0), atol=1e-6 * k, rtol=0)
        torch.testing.assert_close(error, ((k - 1) * left.var(0, unbiased=False)).sqrt(), rtol=1e-5, atol=0)


def test_corrections_remove_the_bias():
    """K = 20 weights of a log-normal: the first-order bias is −Var(w)/2K."""
    torch.manual_seed(0)
    log_weight = 0.8 * torch.randn(20, 200_000, dtype=torch.float64) - 0.32  # E w = 1
    bias = {}
    for correction in (None, "delta", "jackknife"):
        summary = LogWeightSummary(20, correction=correction)
        summary.update(log_weight)
        value = summary.result()[0]
        bias[correction] = value.mean().item()
    assert bias[None] == pytest.approx(-(math.exp(0.64) - 1) / 40, rel=0.25)
    assert abs(bias["delta"]) < 0.35 * abs(bias[None])
    assert abs(bias["jackknife"]) < 0.25 * abs(bias[None])


@pytest.mark.parametrize("heavy", [0.5, 2.0, 6.0])
def test_smoothed_weights_are_those_of_arviz(heavy):
    """A number of draws whose tail has a whole length: 0.2x rounds it up, 1.x down."""
    torch.manual_seed(1)
    log_weight = heavy * torch.randn(2500, 5, dtype=torch.float64)
    summary = LogWeightSummary(2500, smooth=True)
    for chunk in log_weight.split(300):
        summary.update(chunk)
    value, _, _, khat = summary.result()
    for i in range(5):
        one = log_weight[:, i].numpy()
        if az.__version__.startswith("0."):
            smoothed, k = az.psislw(one, normalize=False)
            total = np.logaddexp.reduce(smoothed)
        else:
            from arviz_stats.base import array_stats

            smoothed, k = array_stats.psislw(-one)  # normalised; the smallest weight is not smoothed
            total = one.min() - smoothed[one.argmin()]
        assert khat[i].item() == pytest.approx(float(k), abs=1e-6)
        assert value[i].item() == pytest.approx(total - math.log(2500), abs=1e-6)


def test_a_defensive_mixture_bounds_the_weights():
    """A guide far too narrow, whose weights have infinite variance; a fifth of the prior mends that."""
    truth = LinearGaussian(2, 3, noise=1.5)
    x = truth.sample(50)
    plain, defended = (
        importance_sampling(truth.model, lambda x: truth.guide(x, 0.3), x, num_particles=40_000, defensive=share)
        for share in (0.0, 0.2)
    )
    assert plain.doubtful.float().mean() > 0.9
    assert not defended.doubtful.any()
    z = (defended.log_evidence - truth.log_evidence(x)) / defended.standard_error
    assert 0.5 < z.abs().max() < 5
    with pytest.raises(ValueError, match=r"defensive: expected a share of the particles in \[0, 1\), got 1"):
        importance_sampling(truth.model, truth.guide, x, defensive=1)


@pytest.mark.parametrize("chunk", [1, 7, 50, 101])
def test_mixtures_have_fixed_counts_in_any_chunks(chunk):
    truth = LinearGaussian(2, 3)
    x = truth.sample(4)
    density = LatentDensity(ParticleSampler(truth.model, truth.guide, (x,)))

    def counting(i, proposal):
        def draw(count):
            u = proposal.draw(count)
            return u + 1000 * (i + 1)

        return type(proposal)(draw, lambda u, terms: torch.zeros(u.shape[:2]), needs_guide=True)

    counts = torch.tensor([[101 - 13, 101 - 1, 0, 101], [13, 1, 101, 0]])
    proposals = [counting(i, make(density)) for i, make in enumerate((from_guide, from_prior))]
    seen = []
    density.log_all = lambda u: (seen.append(u), torch.zeros(u.shape[:2]), torch.zeros(u.shape[:2]))[1:] * 2
    weigh = mixture_weights(density, proposals, counts)
    left = 101
    while left:
        weigh(min(chunk, left))
        left -= min(chunk, left)
    kind = torch.cat(seen)[..., 0] > 1500
    assert kind.sum(0).tolist() == counts[1].tolist()


def test_a_single_chain_or_particle_has_no_error_bar():
    """Nothing to estimate a variance from: NaN, and no warning; the exact guide gives the exact value all the same."""
    truth = LinearGaussian(2, 3)
    x = truth.sample(4)
    for estimator, options in (
        (importance_sampling, {}),
        (importance_sampling, {"defensive": 0.5}),
        (annealed_importance_sampling, {"num_temperatures": 1}),
        (annealed_importance_sampling, {"num_temperatures": 2, "schedule": "adaptive", "num_leapfrog": 1}),
    ):
        evidence = estimator(truth.model, truth.guide, x, num_particles=1, **options)
        assert evidence.standard_error.isnan().all()
        torch.testing.assert_close(evidence.log_evidence, truth.log_evidence(x), atol=1e-4, rtol=0)


def test_options_are_checked():
    truth = LinearGaussian(2, 3)
    x = truth.sample(4)
    for options, message in (
        ({"correction": "bootstrap"}, "correction: expected None, 'delta' or 'jackknife', got 'bootstrap'"),
        ({"correction": "delta", "num_particles": 1}, "needs num_particles of at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            importance_sampling(truth.model, truth.guide, x, **options)
    for options, message in (
        ({"start": "posterior"}, "start: expected one of 'guide', 'prior', 'adapted', got 'posterior'"),
        ({"schedule": "cosine"}, "schedule: expected one of 'linear', 'sigmoid', 'adaptive', got 'cosine'"),
        ({"num_temperatures": 0}, "num_temperatures: expected at least 1, got 0"),
        ({"exact_draw": {"w": x}}, r"exact_draw: expected draws of the sites \['z'\], missing \['z'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            annealed_importance_sampling(truth.model, truth.guide, x, **options)
