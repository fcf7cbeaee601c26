"""What Pyro's jitted objectives compile, ours does: nothing of this is refused. And shapes that change cost no more."""

import gc
import tracemalloc
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from same_as_pyro import assert_same, asserting

from pyro_vae import CompiledELBO

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
OUTSIDE = dist.Normal(torch.zeros(3), torch.ones(3), validate_args=True)


def outside(x):
    """A distribution that was made outside, under validation."""
    z = pyro.sample("z", OUTSIDE.to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def cholesky(x):
    scale_tril = pyro.sample("L", dist.LKJCholesky(3, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale_tril), obs=x)


def sequential(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"x_{i}", dist.Normal(z, 1.0).to_event(1), obs=x[i])


class Regression(PyroModule[torch.nn.Linear]):
    def __init__(self):
        super().__init__(2, 1)
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))

    def forward(self, x):
        mean = super().forward(x[:, :2]).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 2])


@pytest.mark.parametrize("make", [outside, cholesky, asserting, sequential, Regression])
def test_nothing_is_refused(make):
    pyro.enable_validation(True)
    model = make() if isinstance(make, type) else make
    assert_same(Trace_ELBO(), model, AutoNormal(model), X)


def test_enumeration_without_parameters():
    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(k.unsqueeze(-1), 1.0).to_event(1), obs=x)

    assert_same(TraceEnum_ELBO(max_plate_nesting=1), model, lambda x: None, X)


def test_a_loss_without_parameters_draws_once():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 0.5))

    elbo, compiled = Trace_ELBO(), CompiledELBO(backend="eager")
    for i in range(6):
        values = []
        for loss in (elbo, compiled):
            torch.manual_seed(i)
            values.append((loss.differentiable_loss(model, guide, X).item(), torch.rand(1).item()))
        assert values[0] == pytest.approx(values[1])
    assert len(compiled.plans) == 1


def test_an_assertion_that_fails_later_is_raised_by_the_next_audit():
    compiled, guide = CompiledELBO(backend="eager"), AutoNormal(asserting)
    for _ in range(3):  # as it is, recorded, replayed
        compiled.loss_and_grads(asserting, guide, X)
    with pytest.raises(AssertionError):
        compiled.loss_and_grads(asserting, guide, X * 1000)


def floats_pair(dtype):
    def model(x, beta, *, scale=1.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=dtype), scale))
            pyro.sample("x", dist.Normal(beta * z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x, beta, *, scale=1.0):
        loc = pyro.param("loc", torch.zeros((), dtype=dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.5 * scale))

    return model, guide


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("moving", [False, True])
def test_floats_keep_the_dtype_of_the_model(dtype, moving):
    pair, compiled = floats_pair(dtype), CompiledELBO(backend="eager")
    tolerance = 1e-6 if dtype is torch.float32 else 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(12):
            values = []
            for loss in (Trace_ELBO(), compiled):
                torch.manual_seed(i)
                beta = 0.1 + i / 30 * moving
                value = loss.differentiable_loss(*pair, X.to(dtype), beta, scale=0.3)
                assert value.dtype == dtype
                values.append(value.item())
            assert values[1] == pytest.approx(values[0], rel=tolerance)
    assert len(compiled.plans) == 1


@pytest.mark.parametrize("sizes", [range(100, 250), [100 + i % 30 for i in range(150)]], ids=["once", "in turn"])
def test_shapes_that_change_are_left_to_pyro_in_bounded_memory(sizes):
    pair, x = floats_pair(torch.float32), torch.randn(700, 3)
    compiled = CompiledELBO(backend="eager")
    svi = SVI(*pair, pyro.optim.Adam({"lr": 1e-3}), loss=compiled)
    held = []
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for larger in (0, 150, 300, 450):
            for n in sizes:
                svi.step(x[: n + larger], 0.5)
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0] / 2**20)
    tracemalloc.stop()
    assert len(compiled.plans) <= 8
    assert held[3] - held[1] < 0.15
