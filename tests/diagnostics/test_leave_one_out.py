"""Leave-one-out and held-out log-densities against closed forms, refits and ArviZ."""

import math
import warnings

import arviz as az
import numpy as np
import pytest
import torch
from torch.distributions import InverseGamma, Normal, StudentT

from pyro_vae import compare
from pyro_vae.diagnostics.leave_one_out import leave_one_out, log_predictive

F64 = {"dtype": torch.float64}
SHAPE, RATE, COUNT = 3.0, 2.0, 0.5  # of the prior of σ² and of the prior's own observations of the mean


def posterior(x):
    """a, b, m, k of p(σ²|x) = InverseGamma(a, b), p(μ|σ², x) = Normal(m, σ²/k)."""
    n, mean = len(x), x.mean()
    k = COUNT + n
    b = RATE + 0.5 * (x - mean).square().sum() + 0.5 * COUNT * n / k * mean.square()
    return torch.tensor(SHAPE + n / 2, **F64), b, n * mean / k, torch.tensor(k, **F64)


def predictive(x, new):
    a, b, m, k = posterior(x)
    return StudentT(2 * a, m, (b / a * (1 + 1 / k)).sqrt()).log_prob(new)


def draws(x, count, *, exact=True):
    """Log-likelihoods (S, N) of any points, and the log-weights of draws of (μ, σ²): of the posterior, or wider."""
    a, b, m, k = posterior(x)
    q_variance = InverseGamma(a, b) if exact else InverseGamma(0.7 * a, 0.8 * b)
    variance = q_variance.sample((count,))
    q_mean = Normal(m, (variance / k).sqrt()) if exact else Normal(m + 0.1, 1.3 * (b / a / k).sqrt())
    mean = q_mean.sample(() if exact else (count,))

    def log_likelihood(new):
        return Normal(mean[:, None], variance.sqrt()[:, None]).log_prob(new)

    prior = InverseGamma(torch.tensor(SHAPE, **F64), torch.tensor(RATE, **F64)).log_prob(variance)
    prior = prior + Normal(0.0, (variance / COUNT).sqrt()).log_prob(mean)
    log_q = q_variance.log_prob(variance) + q_mean.log_prob(mean)
    return log_likelihood, prior + log_likelihood(x).sum(1) - log_q


def data(n=20):
    return 1.0 + 1.5 * torch.randn(n, **F64)


def refits(x):
    """log p(x_n|x_−n), each from its own posterior."""
    return torch.stack([predictive(torch.cat([x[:n], x[n + 1 :]]), x[n]) for n in range(len(x))])


@pytest.mark.parametrize("exact", [True, False])
def test_leave_one_out_is_that_of_exact_refits(exact):
    x = data()
    truth, z, biased = refits(x), [], []
    for _ in range(40):
        log_likelihood, log_weight = draws(x, 2000, exact=exact)
        if exact:
            assert log_weight.std() < 1e-9  # the same for all: the weights are right
        loo = leave_one_out(log_likelihood(x), None if exact else log_weight)
        assert loo.doubtful.sum() == 0
        z.append((loo.pointwise - truth) / loo.pointwise_error)
        biased.append((leave_one_out(log_likelihood(x)).elpd - truth.sum()) / loo.monte_carlo_error)
        seen = predictive_of_seen(x)
        assert loo.p_loo == pytest.approx((seen - truth).sum().item(), abs=0.2)
    z = torch.stack(z)
    assert z.abs().max() < 5
    assert z.square().mean().sqrt() == pytest.approx(1.0, abs=0.15)  # the errors are neither too small nor too large
    assert z.mean(0).abs().max() < 5 / math.sqrt(40)
    assert (np.abs(np.mean(biased)) > 3) != exact  # without weights, draws that are not exact mislead


def predictive_of_seen(x):
    return torch.stack([predictive(x, x[n]) for n in range(len(x))])


def test_terms_given_the_point_s_own_latent_do_not_leave_it_out():
    """x_n ~ N(u_n, ½²), u_n ~ N(μ, 2²), μ ~ N(0, 10²): the integrated terms equal refits, the conditional do not."""
    x, tau, sigma = 2.0 * torch.randn(20, **F64), 2.0, 0.5
    total = tau**2 + sigma**2

    def mean_of(x):
        precision = len(x) / total + 1 / 100
        return x.sum() / total / precision, 1 / precision

    others = [mean_of(torch.cat([x[:n], x[n + 1 :]])) for n in range(20)]
    truth = torch.stack([Normal(m, (v + total) ** 0.5).log_prob(x[n]) for n, (m, v) in enumerate(others)])
    m, v = mean_of(x)
    mu = m + v**0.5 * torch.randn(4000, 1, **F64)
    gain = tau**2 / total
    u = mu + gain * (x - mu) + (gain * sigma**2) ** 0.5 * torch.randn(4000, 20, **F64)
    integrated = leave_one_out(Normal(mu, total**0.5).log_prob(x))
    conditional = leave_one_out(Normal(u, sigma).log_prob(x))
    assert not integrated.doubtful.any()
    assert ((integrated.pointwise - truth).abs() < 5 * integrated.pointwise_error).all()
    assert integrated.p_loo == pytest.approx(1.0, abs=0.5)
    assert conditional.doubtful.sum() > 10
    assert abs(conditional.elpd - truth.sum()) > 3
    assert conditional.p_loo > 10


def test_agrees_with_arviz():
    x = data()
    x[3] = 9.0  # a k-hat above the others
    log_likelihood = draws(x, 2500)[0](x)  # a tail of 150 draws, which both generations round alike
    loo = leave_one_out(log_likelihood)
    old = az.__version__.startswith("0.")
    groups = {"posterior": {"m": np.random.randn(1, 2500)}, "log_likelihood": {"x": log_likelihood.numpy()[None]}}
    with warnings.catch_warnings(action="ignore"):
        found = az.loo(az.from_dict(**groups) if old else az.from_dict(groups), pointwise=True, reff=1.0)
    elpd, p_loo, pointwise = (found.elpd_loo, found.p_loo, found.loo_i) if old else (found.elpd, found.p, found.elpd_i)
    assert loo.elpd == pytest.approx(float(elpd), abs=1e-8)
    assert loo.p_loo == pytest.approx(float(p_loo), abs=1e-8)
    divisor = 20 / 19 if old else 1.0  # the older one divides the variance by N
    assert loo.standard_error == pytest.approx(float(found.se) * math.sqrt(divisor), rel=1e-8)
    assert loo.threshold == pytest.approx(float(found.good_k))
    np.testing.assert_allclose(loo.pointwise, pointwise, atol=1e-8)
    np.testing.assert_allclose(loo.pareto_khat, found.pareto_k, atol=1e-8)


@pytest.mark.skipif(az.__version__.startswith("0."), reason="ArviZ 1.x has it")
def test_agrees_with_arviz_for_approximate_posteriors():
    x = data()
    log_likelihood, log_weight = draws(x, 2500, exact=False)
    loo = leave_one_out(log_likelihood(x), log_weight)
    tree = az.from_dict(
        {"posterior": {"m": np.random.randn(1, 2500)}, "log_likelihood": {"x": log_likelihood(x).numpy()[None]}}
    )
    log_p = log_weight.numpy()[None]
    with warnings.catch_warnings(action="ignore"):
        found = az.loo_approximate_posterior(tree, log_p, np.zeros_like(log_p), pointwise=True)
    np.testing.assert_allclose(loo.pointwise, found.elpd_i, atol=1e-8)
    np.testing.assert_allclose(loo.pareto_khat, found.pareto_k, atol=1e-8)


def test_one_draw_is_a_fixed_model():
    log_likelihood = torch.tensor([[-1.0, -2.0, -4.0]])
    loo = leave_one_out(log_likelihood, torch.tensor([-123.0]))
    assert loo.pointwise.tolist() == [-1.0, -2.0, -4.0]
    assert (loo.elpd, loo.p_loo, loo.monte_carlo_error) == (-7.0, 0.0, 0.0)
    assert not loo.doubtful.any()
    assert "one θ, so that nothing is left out" in repr(loo)
    held_out = log_predictive(log_likelihood)
    assert held_out.log_evidence.tolist() == [-1.0, -2.0, -4.0]
    assert held_out.standard_error.tolist() == [0.0, 0.0, 0.0]
    same = leave_one_out(log_likelihood.expand(1000, 3))  # many draws of one θ
    torch.testing.assert_close(same.pointwise, loo.pointwise)
    assert same.p_loo == pytest.approx(0.0, abs=1e-9)
    assert not same.doubtful.any()


@pytest.mark.parametrize("exact", [True, False])
def test_log_predictive_is_that_of_the_closed_form(exact):
    x, new = data(), torch.linspace(-3.0, 5.0, 9, **F64)
    truth, z = predictive(x, new), []
    for _ in range(60):
        log_likelihood, log_weight = draws(x, 2000, exact=exact)
        evidence = log_predictive(log_likelihood(new), None if exact else log_weight)
        assert not evidence.doubtful.any()
        z.append((evidence.log_evidence - truth) / evidence.standard_error)
    z = torch.stack(z)
    assert z.abs().max() < 5
    assert z.square().mean().sqrt() == pytest.approx(1.0, abs=0.15)
    assert z.mean(0).abs().max() < 5 / math.sqrt(60)


def test_a_new_point_far_from_all_draws_is_doubtful():
    log_likelihood, _ = draws(data(), 2000)
    assert log_predictive(log_likelihood(torch.tensor([0.0, 40.0], **F64))).doubtful.tolist() == [False, True]


def test_models_are_compared_point_by_point():
    """Against a model with the wrong scale, the difference is that of the refits."""
    x = data(60)
    log_likelihood, _ = draws(x, 4000)
    mean = x.mean() + 3.0 / math.sqrt(60) * torch.randn(4000, 1, **F64)  # σ = 3, flat prior of μ
    good, bad = leave_one_out(log_likelihood(x)), leave_one_out(Normal(mean, 3.0).log_prob(x))
    others = (x.sum() - x) / 59
    truth = Normal(others, 3.0 * math.sqrt(1 + 1 / 59)).log_prob(x) - refits(x)
    result = compare({"bad": bad.evidence, "good": good.evidence})
    assert list(result.evidence) == ["good", "bad"]
    d = result.differences["bad"]
    assert abs(d.mean - truth.mean()) < 5 * d.monte_carlo_error
    assert d.standard_error == pytest.approx(truth.std().item() / math.sqrt(60), rel=0.05)
    assert "leave_one_out" in repr(good.evidence)


def test_draws_for_which_a_point_is_impossible():
    log_likelihood = torch.randn(500, 3, **F64)
    log_weight = 0.1 * torch.randn(500, **F64)
    log_likelihood[7, 0] = -math.inf  # without it, the point would be possible nowhere
    log_likelihood[8, 1] = math.nan
    loo = leave_one_out(log_likelihood, log_weight)
    assert loo.pointwise[0] == -math.inf
    assert loo.pointwise[1].isnan()
    assert loo.doubtful.tolist() == [True, True, False]
    assert "not finite    2 points: rows 0, 1" in repr(loo)
    log_weight[7] = log_weight[8] = -math.inf  # draws that do not count: the others are as without them
    loo = leave_one_out(log_likelihood[:, :1], log_weight)
    assert loo.pointwise.isfinite().all()
    keep = log_weight.isfinite()
    rest = leave_one_out(log_likelihood[keep], log_weight[keep])
    torch.testing.assert_close(loo.pointwise, rest.pointwise[:1], atol=1e-2, rtol=0)
    held_out = log_predictive(log_likelihood[:, [0, 2]], log_weight)
    assert held_out.log_evidence.isfinite().all()


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"leave_one_out: expected a log_likelihood of shape \(S draws, N points\)"):
        leave_one_out(torch.zeros(5))
    with pytest.raises(ValueError, match=r"flatten\(0, 1\) if chains come first"):
        log_predictive(torch.zeros(4, 100, 5))
    with pytest.raises(ValueError, match="a log_weight for each of the 100 draws"):
        leave_one_out(torch.zeros(100, 5), torch.zeros(5))


def test_summary():
    x = data()
    text = repr(leave_one_out(draws(x, 2000)[0](x))).splitlines()
    assert text[0] == "Leave-one-out of 20 data points, 2000 draws (nats)"
    assert "(points)" in text[1]
    assert "0 of 20 points not to trust (above 0.70)" in text[3]
    few = leave_one_out(torch.randn(10, 4))
    assert few.doubtful.all()
    assert "too few draws to tell" in repr(few)
    assert leave_one_out(torch.randn(100, 1)).standard_error != 0.0  # NaN, without a warning
