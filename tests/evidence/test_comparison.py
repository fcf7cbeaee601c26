"""Differences of log p(x) between fits, with both of their errors."""

import math
from dataclasses import replace

import pytest
import torch
from truths import LinearGaussian

from pyro_vae import compare, importance_sampling
from pyro_vae.evidence.evidence import Evidence


def evidence(values, errors=0.1, khat=0.2):
    values = torch.as_tensor(values, dtype=torch.float64)
    errors, khat = (torch.as_tensor(v, dtype=torch.float64).expand(len(values)) for v in (errors, khat))
    return Evidence(values, errors, torch.full_like(values, 100.0), khat, 1000, "lower bound", "importance_sampling")


def part(whole, rows):
    """The `Evidence` of some rows, which are drawn independently."""
    fields = ("log_evidence", "standard_error", "effective_sample_size", "pareto_khat", "num_zero")
    return replace(whole, **{name: getattr(whole, name)[rows] for name in fields})


def test_difference_and_its_errors():
    a, b = torch.tensor([-1.0, -2.0, -3.0, -10.0]), torch.tensor([-1.5, -2.1, -3.6, -10.2])
    result = compare({"b": evidence(b, 0.3), "a": evidence(a, 0.4)})
    assert list(result.evidence) == ["a", "b"]
    d = result.differences["b"]
    assert d.mean == pytest.approx(-0.35)
    assert d.standard_error == pytest.approx((b - a).std().item() / 2)
    assert d.standard_error < 0.5 * a.std().item() / 2  # what is hard for both cancels
    assert d.monte_carlo_error == pytest.approx(0.5 / 2)
    assert d.total_error == pytest.approx(math.hypot(d.standard_error, 0.25))
    assert (d.num_points, d.num_doubtful) == (4, 0)
    line = repr(result).splitlines()[-1]
    assert line.split() == ["b", "-4.350", "-0.350", f"{d.standard_error:.3f}", "0.250", "-0.350", "0"]


def test_points_that_do_not_count():
    a = evidence([-1.0, -2.0, -math.inf, -4.0], khat=[0.1, 0.9, 0.1, 0.1])
    b = evidence([-2.0, -4.0, -3.0, -6.0], khat=[0.1, 0.1, 0.1, math.nan])
    d = compare({"a": a, "b": b}).differences["b"]
    assert (d.num_points, d.num_doubtful) == (3, 3)  # k-hat of one, NaN of the other, and −inf
    assert d.mean == pytest.approx(-(1 + 2 + 2) / 3)
    assert d.trusted_mean == pytest.approx(-1.0)
    assert "1 pairs are not finite" in repr(compare({"a": a, "b": b}))


def test_errors_cover_the_true_difference():
    """Two models of known evidence: over many data sets, the difference is off by its total error."""
    good, bad = LinearGaussian(2, 4), LinearGaussian(2, 4, noise=0.8)
    z, data = [], good.sample(5000)
    together = {
        name: importance_sampling(t.model, lambda x, t=t: t.guide(x, 1.5), data, num_particles=50)
        for name, t in (("good", good), ("bad", bad))
    }
    for i in range(100):
        rows = slice(50 * i, 50 * i + 50)
        x = data[rows]
        result = compare({name: part(fit, rows) for name, fit in together.items()})
        first, second = result.evidence
        d = result.differences[second]
        truth = {"good": good, "bad": bad}
        exact = (truth[second].log_evidence(x) - truth[first].log_evidence(x)).mean().item()
        z.append((d.mean - exact) / d.monte_carlo_error)  # given the points, particles are all that errs
    z = torch.tensor(z)
    assert 0.8 < z.std() < 1.3
    assert abs(z.mean()) < 0.4


def test_fits_that_cannot_be_compared():
    with pytest.raises(ValueError, match="compare: expected at least two fits, got"):
        compare({"a": evidence([-1.0])})
    with pytest.raises(ValueError, match=r"expected the same data points in all, got \{'a': 1, 'b': 2\}"):
        compare({"a": evidence([-1.0]), "b": evidence([-1.0, -2.0])})
