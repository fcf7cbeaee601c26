"""Evidence against closed forms and quadrature, and the same in any chunks."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from truths import LinearGaussian, quadrature, small_vae

from pyro_vae import fit, importance_sampling, prior_sampling
from pyro_vae.evidence.log_weights import LogWeightSummary, pareto_khat


def test_agrees_with_quadrature_and_full_covariance_has_the_higher_elbo(device):
    """A nonlinear decoder on two latents, whose posterior is correlated."""
    torch.manual_seed(4)
    truth = small_vae()
    with torch.no_grad():
        for p in truth.likelihood.parameters():
            p.mul_(2.5)
    x = truth.generate(400)
    rows, elbo = x[:60].to(device), {}
    exact = quadrature(truth, rows.cpu(), points=121)  # of the likelihood, which both have
    for full in (False, True):
        vae = small_vae(full=full)
        vae.likelihood.load_state_dict(truth.likelihood.state_dict())
        vae.likelihood.requires_grad_(False)
        vae = vae.to(device)
        result = fit(
            vae.model, vae.guide, x.to(device), num_epochs=80, learning_rate=1e-2, loss=TraceMeanField_ELBO(), seed=0
        )
        elbo[full] = -np.mean(result.loss[-30:])
        evidence = importance_sampling(vae.model, vae.guide, rows, num_particles=5000)
        z = (evidence.log_evidence.cpu() - exact) / evidence.standard_error.cpu()
        assert z.abs().max() < 5
        assert z.abs().max() > 0.5  # the error bars are not merely wide
        assert elbo[full] < exact.mean() + 1.0
    assert elbo[True] > elbo[False] + 0.02


def test_three_guides_are_told_apart():
    """Exact, too wide, too narrow: standard error, ESS and k-hat each tell them apart."""
    truth = LinearGaussian(3, 5)
    x = truth.sample(50)
    exact, wide, narrow = (
        importance_sampling(truth.model, lambda x, w=w: truth.guide(x, w), x, num_particles=4000)
        for w in (1.0, 2.0, 0.3)  # k-hats of the last are about 1 − 0.3²
    )
    assert (exact.standard_error < 1e-3).all()
    assert not wide.doubtful.any()
    assert wide.effective_sample_size.max() < 0.5 * exact.effective_sample_size.min()
    assert narrow.doubtful.float().mean() > 0.9
    assert narrow.pareto_khat.median() > 0.7 > wide.pareto_khat.max()
    z = (wide.log_evidence - truth.log_evidence(x)) / wide.standard_error
    assert z.abs().max() < 5
    assert (narrow.log_evidence - truth.log_evidence(x)).mean() < 0  # a lower bound


def test_prior_sampling_needs_no_guide_and_fails_visibly_in_many_dimensions():
    easy, hard = LinearGaussian(1, 2, noise=1.5), LinearGaussian(20, 30, noise=0.3)
    x = easy.sample(40)
    evidence = prior_sampling(easy.model, None, x, num_particles=20_000)
    z = (evidence.log_evidence - easy.log_evidence(x)) / evidence.standard_error
    assert 0.5 < z.abs().max() < 5
    assert not evidence.doubtful.any()
    x = hard.sample(10)
    evidence = prior_sampling(hard.model, None, x, num_particles=5000)
    assert evidence.doubtful.all()
    assert (evidence.log_evidence < hard.log_evidence(x) - 5).all()
    assert "by prior_sampling" in repr(evidence)
    calls = []

    def counting(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(torch.zeros(()), 1.0))
            calls.append(z.shape)
            pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)

    prior_sampling(counting, None, torch.zeros(5), num_particles=10, chunk_size=10)
    assert sum(shape == (10, 1) for shape in calls) == 5  # one run of the likelihood for each row, not two


def test_error_bars_cover_the_truth():
    truth = LinearGaussian(2, 4)
    x = truth.sample(1).expand(2000, -1).clone()  # one point, two thousand times
    evidence = importance_sampling(truth.model, lambda x: truth.guide(x, 1.5), x, num_particles=400)
    z = (evidence.log_evidence - truth.log_evidence(x)) / evidence.standard_error
    assert 0.92 < (z.abs() < 1.96).double().mean() < 0.98
    assert 0.9 < z.std() < 1.1


def test_standard_error_of_the_mean():
    """Two hundred runs at once: rows are drawn independently."""
    truth = LinearGaussian(2, 4)
    x = truth.sample(30)
    together = importance_sampling(truth.model, lambda x: truth.guide(x, 1.7), x.repeat(200, 1), num_particles=50)
    fields = ("log_evidence", "standard_error", "effective_sample_size", "pareto_khat", "num_zero")
    each = zip(*(getattr(together, name).split(30) for name in fields), strict=True)
    runs = [replace(together, **dict(zip(fields, values, strict=True))) for values in each]
    means, spreads, errors = np.array([run.mean for run in runs]).T
    assert errors.shape == (200,)
    assert errors.mean() == pytest.approx(means.std(), rel=0.2)
    assert spreads.mean() == pytest.approx(truth.log_evidence(x).std().item() / math.sqrt(30), rel=0.05)


# -- streaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 100, 1999])
def test_the_same_weights_in_any_chunks(count):
    log_weight = 3 * torch.randn(2000, 8, dtype=torch.float64) - 500
    log_weight[:, 3] = -torch.rand(2000).log()  # heavy
    log_weight[5, 4] = -math.inf
    whole, parts = LogWeightSummary(2000), LogWeightSummary(2000)
    whole.update(log_weight)
    for chunk in log_weight.split(count):
        parts.update(chunk)
    for a, b in zip(whole.result(), parts.result(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    log_evidence, error, ess, _ = whole.result()
    weight = (log_weight - log_weight.max(0).values).exp()
    torch.testing.assert_close(log_evidence, log_weight.logsumexp(0) - math.log(2000))
    torch.testing.assert_close(ess, weight.sum(0).square() / weight.square().sum(0))
    delta = (weight / weight.mean(0)).var(0, unbiased=False).div(2000).sqrt()
    torch.testing.assert_close(error, delta)


@pytest.mark.parametrize("num_particles", [1, 2, 47])
@pytest.mark.parametrize("chunk_size", [1, 10, 23, 10_000])
def test_counts_are_exact_for_any_chunk(num_particles, chunk_size):
    """Twice as wide a guide; K that no chunk divides. An inexact count would show as a shift of the mean weight."""
    seen = []
    truth = LinearGaussian(2, 3)
    x = truth.sample(13)

    def guide(x):
        with pyro.plate("data", len(x)):
            seen.append(pyro.sample("z", truth.posterior(x)).shape)

    evidence = importance_sampling(
        truth.model, guide, x, num_particles=num_particles, chunk_size=chunk_size, compile=False
    )
    drawn = sum(shape[0] * shape[1] for shape in seen if len(shape) == 3)
    looked_at = (6 + 6 + 2 + 2 + 2 + 2) * 5  # particles of five rows: the checks for many particles, and for rows
    assert drawn == num_particles * 13 + looked_at
    assert evidence.num_particles == num_particles
    assert (evidence.log_evidence - truth.log_evidence(x)).abs().max() < 1e-4
    assert evidence.standard_error.isnan().all() == (num_particles == 1)


def test_chunkings_agree_and_a_seed_repeats_to_the_bit(device):
    truth = LinearGaussian(3, 5, device=device)
    x = truth.sample(20)
    runs = []
    for chunk_size in (64, 1000, 1000, None):
        pyro.set_rng_seed(5)
        runs.append(
            importance_sampling(
                truth.model, lambda x: truth.guide(x, 1.5), x, num_particles=3000, chunk_size=chunk_size
            )
        )
    a, b, c, d = runs
    assert b.log_evidence.equal(c.log_evidence)
    assert b.pareto_khat.equal(c.pareto_khat)
    for other in (b, d):
        z = (a.log_evidence - other.log_evidence) / (a.standard_error**2 + other.standard_error**2).sqrt()
        assert z.abs().max() < 5
        assert not a.log_evidence.equal(other.log_evidence)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB")
def test_memory_does_not_grow_with_particles():
    code = """
import resource, torch
from truths import small_vae
from pyro_vae import importance_sampling
torch.set_num_threads(1)
vae = small_vae(8, (16, 16))
x = torch.bernoulli(torch.full((20, 16, 16), 0.5))
for num_particles in (2000, 20_000):
    importance_sampling(vae.model, vae.guide, x, num_particles=num_particles)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="tests")
    few, many = map(int, done.stdout.split())
    assert many < 1.1 * few


# -- k-hat ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0.1, 0.3, 0.5, 0.8, 1.2])
def test_khat_finds_the_shape_of_a_pareto(shape):
    khat = pareto_khat(-shape * torch.rand(20_000, 50, dtype=torch.float64).log())
    assert abs(khat.mean() - shape) < 0.05
    assert khat.std() < 0.15


def test_khat_agrees_with_arviz():
    """Its fit, on the same weights. 0.2x rounds the length of the tail up, as here and as R's loo does, 1.x down; the K
    below need no rounding."""
    arviz = pytest.importorskip("arviz")
    scale = torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    for k in (100, 400, 2500, 10_000):
        log_weight = torch.randn(k, 5, dtype=torch.float64) * scale
        if arviz.__version__.startswith("0."):
            expected = arviz.psislw(log_weight.T.numpy())[1]
        else:
            from arviz_stats.base import array_stats

            expected = array_stats.psislw(-log_weight.T.numpy(), axis=-1)[1]
        np.testing.assert_allclose(pareto_khat(log_weight), expected, atol=1e-10)


def test_khat_of_few_equal_and_broken_weights():
    assert pareto_khat(torch.randn(20, 2)).isnan().all()
    assert pareto_khat(torch.randn(21, 2)).isfinite().all()
    assert (pareto_khat(torch.zeros(100, 2)) == -math.inf).all()
    log_weight = torch.randn(100, 3)
    log_weight[7, 1] = math.nan
    khat = pareto_khat(log_weight)
    assert khat.isnan().tolist() == [False, True, False]
    assert khat[[0, 2]].equal(pareto_khat(log_weight[:, [0, 2]]))


def test_a_broken_row_is_named_and_spreads_to_no_other():
    import pyro.distributions as dist

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("broken", torch.where(x > 2, math.nan, 0.0) + 0 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    x = torch.tensor([0.0, 3.0, 1.0])
    evidence = importance_sampling(model, guide, x, num_particles=100)
    assert evidence.log_evidence.isnan().tolist() == [False, True, False]
    assert evidence.doubtful.tolist() == [False, True, False]
    assert "1 points, left out of the mean: rows 1" in repr(evidence)
    assert math.isfinite(evidence.mean[0])


def test_summary_reads_well():
    truth = LinearGaussian(3, 5)
    text = repr(importance_sampling(truth.model, lambda x: truth.guide(x, 0.4), truth.sample(20), num_particles=500))
    assert "Evidence of 20 data points by importance_sampling, 500 particles each (nats)" in text
    assert "of 20 points not to trust (above 0.63)" in text
    assert "lower bound on log p(x) in expectation" in text
    few = importance_sampling(truth.model, truth.guide, truth.sample(1), num_particles=20)
    assert "1 of 1 points not to trust (too few particles to tell)" in repr(few)
    assert math.isnan(few.mean[1])  # one point has no spread
    assert math.isnan(few.threshold)
