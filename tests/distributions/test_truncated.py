"""The truncated Normal against 40 digits: in its tails, on narrow and wide intervals, in float32 and float64."""

import functools
import math

import mpmath as mp
import pytest
import torch
from scipy import stats
from torch.distributions import Normal, biject_to, kl_divergence

from pyro_vae.distributions.truncated import TruncatedNormal

mp.mp.dps = 40
INF = math.inf
DTYPES = [torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# (μ, σ, low, high): one end, two, none; the mean inside, far outside on either side; narrow and wide
CASES = [
    (0, 1, 0, INF),
    (0, 2, -1, INF),
    (-5, 1, 0, INF),
    (-100, 1, 0, INF),
    (-1e4, 1, 0, INF),
    (20, 1, 0, INF),
    (1, 1, -INF, 0),
    (3, 0.5, -INF, -20),
    (0, 1, -1, 1),
    (5, 2, -1, 1.5),
    (-8, 1, -1, 1.5),
    (0, 1, 2, 2.5),
    (0, 1, -0.001, 0.002),
    (0.5, 0.1, 0, 1),
    (30, 1, 0, 1),
    (1e3, 1, 0, 0.01),
    (0, 1, -30, 30),
    (-2, 1, -8, 9),
    (0.3, 0.5, -INF, INF),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
LEVELS = [1e-12, 1e-3, 0.5, 0.999, 1 - 1e-12]
QUANTILES = [1e-6, 0.3, 0.999]


def made(case, dtype):
    loc, scale = (torch.tensor(float(v), dtype=dtype, requires_grad=True) for v in case[:2])
    ends = [v if math.isinf(v) else torch.tensor(float(v), dtype=dtype) for v in case[2:]]
    return TruncatedNormal(loc, scale, *ends), [v if isinstance(v, float) else v.item() for v in (loc, scale, *ends)]


@functools.cache
def above(z):
    """1 − Φ(z)."""
    return mp.erfc(z / mp.sqrt(2)) / 2


def ends_of(loc, scale, low, high):
    a = -mp.inf if math.isinf(low) else (mp.mpf(low) - loc) / scale
    b = mp.inf if math.isinf(high) else (mp.mpf(high) - loc) / scale
    return a, b


@functools.cache
def log_mass(a, b):
    if a == -mp.inf and b == mp.inf:
        return mp.mpf(0)
    if a == -mp.inf or (b != mp.inf and a + b < 0):
        a, b = -b, -a
    return mp.log(above(a) - (0 if b == mp.inf else above(b)))


@functools.cache  # quadratures of several functions have the same nodes
def log_p(x, loc, scale, low, high):
    loc, scale = mp.mpf(loc), mp.mpf(scale)
    z = (mp.mpf(x) - loc) / scale
    return -z * z / 2 - mp.log(2 * mp.pi) / 2 - mp.log(scale) - log_mass(*ends_of(loc, scale, low, high))


def quantile(u, loc, scale, low, high, near):
    """The x with P(X ≤ x) = u, by a root of the logarithm of the smaller tail."""
    loc, scale = mp.mpf(loc), mp.mpf(scale)
    a, b = ends_of(loc, scale, low, high)
    tails = [(0 if e == mp.inf else 1 if e == -mp.inf else above(e)) for e in (a, b)]
    lower = [(1 if e == mp.inf else 0 if e == -mp.inf else above(-e)) for e in (a, b)]
    tail, body = ((1 - u) * t[0] + u * t[1] for t in (tails, lower))
    if tail < body:
        return loc + scale * mp.findroot(lambda z: mp.log(above(z)) - mp.log(tail), (near - loc) / scale)
    return loc + scale * mp.findroot(lambda z: mp.log(above(-z)) - mp.log(body), (near - loc) / scale)


def close(value, exact, tolerance):
    assert abs(value - float(exact)) <= tolerance, (value, float(exact))


def inside(case):
    """Values from one end to the other."""
    p, _ = made(case, torch.float64)
    return [x.item() for x in p.icdf(torch.tensor([0.0, 0.01, 0.5, 0.99, 1 - 1e-9], dtype=torch.float64)).detach()]


def test_the_truth_is_a_density():
    for case in ((0, 1, -1, 1), (-5, 1, 0, INF), (3, 0.5, -INF, -2)):
        places = [case[2], -10, -5, -3, -1, 0, 1, 3, 10] if math.isinf(case[2]) else [case[2], 0.5, 1, 5, 30]
        places = [v for v in places if v < case[3]] + [case[3]]
        assert mp.almosteq(mp.quad(lambda x, case=case: mp.exp(log_p(x, *case)), places), 1, 1e-15)


@dtypes
@cases
def test_log_prob_and_its_gradient(case, dtype):
    p, exact = made(case, dtype)
    tolerance = {torch.float32: 3e-6, torch.float64: 1e-13}[dtype]
    for x in inside(case):
        value = torch.tensor(x, dtype=dtype).clamp(exact[2], exact[3])
        log_prob = p.log_prob(value)
        if math.isinf(x):
            continue
        x = value.item()
        truth = log_p(x, *exact)
        # rounding of z in z²/2, where the mean is inside
        z = abs((x - exact[0]) / exact[1])
        rounding = 4 * torch.finfo(dtype).eps * (min(z, 40.0) ** 2 if exact[2] < exact[0] < exact[3] else 1)
        close(log_prob.item(), truth, tolerance * max(1, abs(float(truth))) + rounding)
        gradient = torch.autograd.grad(log_prob, [p.loc, p.scale])
        for i, g in enumerate(gradient):
            slope = mp.diff(lambda v, i=i, x=x: log_p(x, *exact[:i], v, *exact[i + 1 :]), exact[i])
            close(g.item(), slope, 20 * tolerance * max(1, abs(float(slope))) + 10 * rounding)


@dtypes
@cases
def test_quantiles_and_their_gradients(case, dtype):
    """∂x/∂μ and ∂x/∂σ at fixed u are what reparametrised draws carry."""
    p, exact = made(case, dtype)
    sd, h = p.variance.sqrt().item(), mp.mpf(10) ** -20
    for u in QUANTILES:
        x = p.icdf(torch.tensor(u, dtype=torch.float64))
        truth = quantile(mp.mpf(u), *exact, mp.mpf(x.item()))
        resolution = 4 * torch.finfo(dtype).eps * abs(x.item())
        close(x.item(), truth, {torch.float32: 2e-6, torch.float64: 1e-6}[dtype] * sd + resolution)
        for i, g in enumerate(torch.autograd.grad(x, [p.loc, p.scale])):
            moved = [mp.mpf(v) + (h if i == j else 0) for j, v in enumerate(exact[:2])]
            slope = (quantile(mp.mpf(u), *moved, *exact[2:], truth) - truth) / h
            close(g.item(), slope, 1e-6 * max(1, abs(float(slope))))


@dtypes
@cases
def test_moments_and_entropy(case, dtype):
    """By quadrature of 40 digits, around the quantiles."""
    p, exact = made(case, dtype)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-11}[dtype]
    double, _ = made(case, torch.float64)
    places = [v.item() for v in double.icdf(torch.tensor(LEVELS, dtype=torch.float64))]
    width = places[-1] - places[0]
    first = exact[2] if not math.isinf(exact[2]) else places[0] - 0.5 * width
    last = exact[3] if not math.isinf(exact[3]) else places[-1] + 0.5 * width
    places = [first, *[v for v in places if first < v < last], last]

    def mean_of(f):
        return mp.quad(lambda x: f(x) * mp.exp(log_p(x, *exact)), places)

    mean = mean_of(lambda x: x)
    variance = mean_of(lambda x: (x - mean) ** 2)
    sd = float(mp.sqrt(variance))
    close(p.mean.item(), mean, tolerance * sd + 4 * torch.finfo(dtype).eps * abs(float(mean)))
    close(p.variance.item(), variance, 10 * tolerance * float(variance))
    close(p.entropy().item(), mean_of(lambda x: -log_p(x, *exact)), 10 * tolerance * max(1, abs(math.log(sd))))


@cases
def test_draws_follow_it(case):
    if case[0] in (-1e4, 1e3):  # beyond SciPy's cdf
        return
    p, _ = made(case, torch.float64)
    loc, scale, low, high = case
    truth = stats.truncnorm((low - loc) / scale, (high - loc) / scale, loc=loc, scale=scale)
    x = p.rsample((20000,))
    assert p.support.check(x).all()
    assert stats.kstest(x.detach().numpy(), truth.cdf).pvalue > 1e-3


def test_gradients_of_expectations_by_draws():
    """∂E[x²]/∂(μ, σ) by the mean over draws, against the derivatives of the closed moments."""
    for case in ((0, 1, -1, 1), (-3, 1, 0, INF), (1, 0.5, -INF, 0), (0.2, 1, -0.5, 3)):
        p, _ = made(case, torch.float64)
        x = p.rsample((100_000,))
        exact = torch.autograd.grad(p.variance + p.mean.square(), [p.loc, p.scale])
        for leaf, truth in zip((p.loc, p.scale), exact, strict=True):
            parts = torch.stack(
                [torch.autograd.grad(c.square().mean(), leaf, retain_graph=True)[0] for c in x.chunk(50)]
            )
            assert abs(parts.mean() - truth) < 4 * parts.std() / 50**0.5


@dtypes
def test_kl(dtype):
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-11}[dtype]
    pairs = [
        ((0, 1, -1, 1), (0.5, 2, -1, 1)),
        ((-5, 1, 0, INF), (-4, 2, 0, INF)),
        ((-100, 1, 0, INF), (-90, 1, 0, INF)),
        ((1, 0.5, 0, 1), (0, 1, -2, INF)),
        ((1, 0.5, -INF, 0), (0, 1, -INF, INF)),
    ]
    for first, second in pairs:
        (p, a), (q, b) = made(first, dtype), made(second, dtype)
        low = a[2] if not math.isinf(a[2]) else -12.0
        high = a[3] if not math.isinf(a[3]) else max(1.0, 60 / max(1.0, -a[0]))
        places = [low + (high - low) * i / 8 for i in range(9)]
        exact = mp.quad(lambda x, a=a, b=b: mp.exp(log_p(x, *a)) * (log_p(x, *a) - log_p(x, *b)), places)
        close(kl_divergence(p, q).item(), exact, 10 * tolerance)
    wide, narrow = made((0, 1, -2, 2), dtype)[0], made((0, 1, -1, 1), dtype)[0]
    assert kl_divergence(wide, narrow).item() == INF
    assert kl_divergence(made((0, 1, -1, INF), dtype)[0], narrow).item() == INF
    assert kl_divergence(narrow, wide).isfinite()


def test_without_ends_it_is_the_normal():
    p, q = TruncatedNormal(torch.tensor(0.3), torch.tensor(2.0)), Normal(0.3, 2.0)
    x = torch.linspace(-20, 20, 9)
    torch.testing.assert_close(p.log_prob(x), q.log_prob(x))
    torch.testing.assert_close(p.entropy(), q.entropy())
    u = torch.tensor([1e-6, 0.3, 0.9], dtype=torch.float64)
    torch.testing.assert_close(
        p.icdf(u).double(), Normal(0.3 * torch.ones(1).double(), 2.0).icdf(u), rtol=1e-6, atol=1e-6
    )


def test_outside_there_is_no_mass_and_it_is_said():
    p = TruncatedNormal(torch.zeros(3), torch.ones(3), torch.tensor([0.0, 0.5, 1.0]), 2.0, validate_args=False)
    assert p.log_prob(torch.tensor(0.7)).isfinite().tolist() == [True, True, False]
    assert p.log_prob(torch.tensor(3.0)).tolist() == [-INF] * 3
    with pytest.raises(ValueError, match="within the support"):
        TruncatedNormal(0.0, 1.0, low=0.0, validate_args=True).log_prob(torch.tensor(-1.0))
    with pytest.raises(ValueError, match="expected low < high"):
        TruncatedNormal(0.0, 1.0, 1.0, 0.0, validate_args=True)


@pytest.mark.parametrize("ends", [(0.0, INF), (-INF, 0.0), (-1.0, 1.0), (-INF, INF)])
def test_supports_have_transforms(ends):
    p = TruncatedNormal(torch.zeros(4), torch.ones(4), *ends)
    y = biject_to(p.support)(torch.randn(4))
    assert p.support.check(y).all()
    assert p.expand((3, 4)).sample().shape == (3, 4)
    assert all(p.support.check(torch.tensor(e)) for e in ends if math.isfinite(e))
    for u, end in zip((0.0, 1.0), ends, strict=True) if ends != (-INF, INF) else ():
        assert p.icdf(torch.tensor(u)).tolist() == [end] * 4
