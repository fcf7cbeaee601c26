"""The laws that every family of conditional distributions keeps; a new one adds its line to `families`."""

import contextlib
import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from families import (
    ANY_SHAPE,
    INPUTS,
    INVERTED_BY_PYRO,
    PRIORS,
    VECTORS,
    WITHOUT_DENSITY,
    WITHOUT_MEAN,
    WITHOUT_PARAMETERS,
)
from torch import nn

from pyro_vae import distributions
from pyro_vae.distributions import Broadcasting, Conditional

SHAPES = [(4,), (2, 3), (1, 2, 2)]
CASES = [(name, shape) for name in ANY_SHAPE for shape in SHAPES] + [(name, (5,)) for name in [*VECTORS, *PRIORS]]
laws = pytest.mark.parametrize(("family", "shape"), CASES, ids=[f"{name} {shape}" for name, shape in CASES])


def make(family, shape, dtype=torch.float32, device="cpu"):
    """One with weights of order one, so that nothing is at its neutral value."""
    conditional = ANY_SHAPE[family](shape) if family in ANY_SHAPE else (VECTORS | PRIORS)[family](*shape)
    with torch.no_grad():
        for p in conditional.parameters():
            nn.init.normal_(p, std=0.3)
    return conditional.to(device, dtype)


def call(conditional, family, x):
    """The distribution with the batch shape of x."""
    return conditional().expand(x.shape[:-1]) if family in PRIORS else conditional(x)


def same(a, b, family, x, value):
    return torch.testing.assert_close(call(a, family, x).log_prob(value), call(b, family, x).log_prob(value))


def test_every_family_is_listed():
    made = {type(make(family, shape)) for family, shape in CASES} | {distributions.VampPrior}
    for name in distributions.__all__:
        cls = getattr(distributions, name)
        if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls not in (Conditional, Broadcasting):
            assert cls in made or cls is distributions.LearnedScale, f"{name} has no line in tests/contract/families.py"


@laws
def test_shapes_and_batches(family, shape, device):
    conditional = make(family, shape, device=device)
    x = torch.randn(5, 2, INPUTS, device=device)
    p = call(conditional, family, x)
    assert p.batch_shape == (5, 2)
    assert p.event_shape == shape
    y = p.sample((6,))
    assert y.shape == (6, 5, 2, *shape)
    assert p.log_prob(y).shape == (6, 5, 2)
    assert p.support.check(y).all()
    # a row does not depend on the others, nor on how the batch is shaped
    if family not in WITHOUT_DENSITY:
        torch.testing.assert_close(call(conditional, family, x[3, 1]).log_prob(y[:, 3, 1]), p.log_prob(y)[:, 3, 1])


@laws
def test_expanded_it_is_the_same(family, shape):
    p = call(make(family, shape), family, torch.randn(5, INPUTS))
    q = p.expand((4, 5))
    y = q.sample()
    assert (q.batch_shape, q.event_shape) == ((4, 5), shape)
    assert y.shape == (4, 5, *shape)
    assert q.support.check(y).all()
    if family not in WITHOUT_DENSITY:
        torch.testing.assert_close(q.log_prob(y.clone()), p.log_prob(y.clone()))


@pytest.mark.parametrize(
    ("family", "shape"),
    [case for case in CASES if case[0] not in WITHOUT_MEAN],
    ids=[f"{name} {shape}" for name, shape in CASES if name not in WITHOUT_MEAN],
)
def test_draws_have_its_mean_and_variance(family, shape):
    p = call(make(family, shape), family, torch.randn(3, INPUTS))
    assert p.mean.shape == p.variance.shape == (3, *shape)
    y = p.sample((20000,))
    error = p.variance.sqrt() / math.sqrt(20000)
    assert ((y.double().mean(0) - p.mean).abs() <= 5 * error + 1e-9).all()
    assert (y.var(0) - p.variance).abs().le(0.1 * p.variance).all()


@pytest.mark.parametrize("family", sorted(WITHOUT_MEAN))
def test_a_mean_that_is_not_known_is_not_given(family):
    p = call(make(family, (5,)), family, torch.randn(3, INPUTS))
    if family == "categorical":
        assert p.mean.isnan().all()
    else:
        with pytest.raises(NotImplementedError):
            _ = p.mean


@laws
def test_gradients_reach_every_parameter(family, shape):
    conditional = make(family, shape)
    p = call(conditional, family, torch.randn(10, INPUTS))
    if family in WITHOUT_PARAMETERS:
        assert list(conditional.parameters()) == []
        return
    (p.rsample() if family in WITHOUT_DENSITY else p.log_prob(p.sample())).sum().backward()
    without = [name for name, q in conditional.named_parameters() if q.grad is None or not q.grad.abs().sum() > 0]
    assert without == []


@laws
def test_draws_carry_gradients_where_they_say_so(family, shape):
    conditional = make(family, shape)
    p = call(conditional, family, torch.randn(10, INPUTS).requires_grad_())
    if not p.has_rsample:
        assert not p.sample().requires_grad
        return
    assert p.rsample().requires_grad == (family not in WITHOUT_PARAMETERS)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@laws
def test_float64(family, shape):
    """Draws and densities in float64, the densities those of the float32 one."""
    single = make(family, shape)
    double = copy.deepcopy(single).double()
    x = torch.randn(5, INPUTS)
    p, q = call(single, family, x), call(double, family, x.double())
    value = p.sample().clone()
    with default_dtype(torch.float64 if family in INVERTED_BY_PYRO else torch.float32):
        y = q.sample()
        exact = q.log_prob(value.double() if value.is_floating_point() else value)
        assert q.log_prob(y.clone()).dtype == exact.dtype == torch.float64
    assert y.dtype in (torch.float64, torch.int64)
    if family in WITHOUT_DENSITY:
        torch.testing.assert_close(y.float(), value)
    else:
        torch.testing.assert_close(exact.float(), p.log_prob(value), rtol=1e-4, atol=1e-4)


def used(family, shape):
    """One that has made a draw, which it may remember."""
    conditional, x = make(family, shape), torch.randn(5, INPUTS)
    p = call(conditional, family, x)
    (p.rsample() if p.has_rsample else p.sample()).sum()
    return conditional, x, p.sample().clone()


@laws
def test_weights_go_into_a_fresh_one(family, shape):
    conditional, x, value = used(family, shape)
    file = io.BytesIO()
    torch.save(conditional.state_dict(), file)
    file.seek(0)
    fresh = make(family, shape)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    same(fresh, conditional, family, x, value)


@laws
def test_a_pickle_is_the_same(family, shape):
    conditional, x, value = used(family, shape)
    same(pickle.loads(pickle.dumps(conditional)), conditional, family, x, value)


@laws
def test_a_copy_is_the_same_and_its_own(family, shape):
    conditional, x, value = used(family, shape)
    again = copy.deepcopy(conditional)
    same(again, conditional, family, x, value)
    ours = {id(p) for p in conditional.parameters()}
    assert not ours & {id(p) for p in again.parameters()}
    before = call(conditional, family, x).log_prob(value).detach()
    with torch.no_grad():
        for p in again.parameters():
            p.add_(0.5)
    torch.testing.assert_close(call(conditional, family, x).log_prob(value), before)
    if ours and family not in WITHOUT_DENSITY:
        assert not torch.allclose(call(again, family, x).log_prob(value), before)
