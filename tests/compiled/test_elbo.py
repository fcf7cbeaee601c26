"""Compiled losses, gradients and steps against Pyro's under one seed, and all that must not be baked into a graph."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoIAFNormal, AutoLowRankMultivariateNormal, AutoNormal
from same_as_pyro import X, assert_same, gradients, vae_pair
from test_recordings import scaled_pair
from torch import nn
from truths import small_vae

from pyro_vae import VAE, CompiledELBO, ImportanceWeightedELBO, fit
from pyro_vae.compiled import codegen as codegen_module
from pyro_vae.compiled.codegen import _Captured
from pyro_vae.compiled.watch import Watch
from pyro_vae.distributions import ConditionalBernoulli, StandardNormal
from pyro_vae.networks import MLP

ELBOS = [
    Trace_ELBO(),
    Trace_ELBO(num_particles=3),
    Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    TraceMeanField_ELBO(),
    TraceGraph_ELBO(),
    TraceEnum_ELBO(max_plate_nesting=1),
    RenyiELBO(alpha=0.5, num_particles=4),
    ImportanceWeightedELBO(5),
    ImportanceWeightedELBO(5, doubly_reparameterized=True),
]
Y = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))


def flow_vae():
    zuko = pytest.importorskip("zuko")
    posterior = nn.Sequential(nn.Flatten(), zuko.flows.MAF(2, 16, transforms=2, hidden_features=(16,)))
    flow = posterior[1]

    class Posterior(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, x):
            return self.flow(x.flatten(-2))

    return VAE(StandardNormal(2), ConditionalBernoulli(MLP(2, [16], activation=nn.Tanh), (4, 4)), Posterior())


def bernoulli_pair(enumerate=False):
    """A discrete latent: drawn with a score-function term, or enumerated."""

    def model(x):
        p = pyro.param("p", torch.tensor(0.3), constraint=dist.constraints.unit_interval)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(k.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x):
        logits = pyro.param("logits", lambda: torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(logits=logits))

    return (config_enumerate(model), config_enumerate(guide)) if enumerate else (model, guide)


def subsampled_pair():
    def model(x):
        s = pyro.param("s", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", 20, subsample_size=5) as i:
            z = pyro.sample("z", dist.Normal(0.0, s))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x[i])

    def guide(x):
        loc = pyro.param("loc", torch.zeros(20))
        with pyro.plate("data", 20, subsample_size=5) as i:
            pyro.sample("z", dist.Normal(loc[i], 0.5))

    return model, guide


def auto_pair(guide):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, s).to_event(1), obs=x)

    return model, guide(model)


def name(elbo):
    return type(elbo).__name__ if isinstance(elbo, pyro.infer.ELBO) else None


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.parametrize(
    ("elbo", "make"),
    [
        *((elbo, lambda: small_vae(full=True)) for elbo in ELBOS),
        # a divergence of Gaussians in closed form, and draws of a flow
        *((elbo, lambda: small_vae(full=False)) for elbo in (ELBOS[0], ELBOS[3], ELBOS[8])),
        *((elbo, flow_vae) for elbo in (ELBOS[0], ELBOS[2], ELBOS[8])),
    ],
    ids=name,
)
def test_loss_and_gradients_equal_those_of_pyro(elbo, make):
    assert_same(elbo, *vae_pair(make), X)


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceGraph_ELBO(), ImportanceWeightedELBO(4)], ids=name)
def test_score_function_terms_survive(elbo):
    assert_same(elbo, *bernoulli_pair(), Y)


def test_enumerated_sites():
    assert_same(TraceEnum_ELBO(max_plate_nesting=1), *bernoulli_pair(enumerate=True), Y)


@pytest.mark.parametrize("guide", [AutoNormal, AutoLowRankMultivariateNormal, AutoIAFNormal])
def test_autoguides(guide):
    assert_same(Trace_ELBO(), *auto_pair(guide), Y)


@pytest.mark.parametrize(
    ("elbo", "make"),
    [
        (Trace_ELBO(), lambda: vae_pair(lambda: small_vae(full=True))),
        (TraceEnum_ELBO(max_plate_nesting=1), lambda: bernoulli_pair(enumerate=True)),
        (TraceGraph_ELBO(), bernoulli_pair),
    ],
)
def test_generated_code_gives_the_same_to_rounding(elbo, make, monkeypatch):
    monkeypatch.setattr(codegen_module, "_hinted", False)  # code that cannot be generated is an error in each case
    model, guide = make()
    x = X if "vae" in getattr(model, "__qualname__", "").lower() else Y
    compiled = assert_same(elbo, model, guide, x, backend="inductor", rtol=1e-5, atol=1e-5)
    (plan,) = compiled.plans
    assert plan.graph._run != plan.graph.module.forward


def test_subsamples_stay_random_and_are_those_of_pyro():
    pair = subsampled_pair()
    compiled = assert_same(Trace_ELBO(), *pair, Y)
    losses = {round(compiled.loss_and_grads(*pair, Y), 3) for _ in range(10)}
    assert len(losses) == 10


def test_svi_moves_every_parameter_as_with_pyro():
    results = []
    for elbo in (Trace_ELBO(), CompiledELBO(Trace_ELBO(), backend="eager")):
        pyro.clear_param_store()
        torch.manual_seed(3)
        svi = SVI(*subsampled_pair(), pyro.optim.Adam({"lr": 0.05}), loss=elbo)
        losses = [svi.step(Y) for _ in range(300)]
        results.append((losses, {k: v.detach().clone() for k, v in pyro.get_param_store().items()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
    assert results[0][1]["s"] != 1


# -- where no graph can be had ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["if", "item", "numpy", "tolist"])
def test_decisions_by_value_run_as_they_are_and_are_named(how):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if how == "if" and z.sum() > 0:  # here
                z = 2 * z
            if how == "item" and z.sum().item() > 0:  # here
                z = 2 * z
            if how == "numpy" and z.detach().numpy().sum() > 0:  # here
                z = 2 * z
            if how == "tolist" and z.detach().sum().tolist() > 0:  # here
                z = 2 * z
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    pair, compiled = (model, scaled_pair(lambda: 1.0)[1]), CompiledELBO(Trace_ELBO(), backend="eager")

    def run():
        for seed in range(8):
            torch.manual_seed(seed)
            got = compiled.loss_and_grads(*pair, Y)
            torch.manual_seed(seed)
            assert got == Trace_ELBO().loss_and_grads(*pair, Y)

    with pytest.warns(UserWarning, match=r"test_elbo\.py:\d+: .*# here") as caught:
        run()
    assert len(caught) == 1


def test_without_a_compiler_there_is_one_hint_and_the_same_numbers(monkeypatch):
    import torch._inductor

    def compile(*args, **kwargs):
        raise torch._inductor.exc.InvalidCxxCompiler

    monkeypatch.setattr(torch._inductor, "compile", compile)
    monkeypatch.setattr(codegen_module, "_hinted", False)
    pair = vae_pair(small_vae)
    expected = gradients(Trace_ELBO(), *pair, X)
    compiled = [CompiledELBO(Trace_ELBO()) for _ in range(2)]

    def run():
        for elbo in compiled * 3:
            assert gradients(elbo, *pair, X)[0] == expected[0]

    with pytest.warns(UserWarning, match=r"no working C\+\+ compiler.*Try to install g\+\+") as caught:
        run()
    assert len(caught) == 1


def test_arguments_that_need_a_gradient_are_left_to_pyro():
    pair, compiled = vae_pair(small_vae), CompiledELBO(Trace_ELBO(), backend="eager")
    for _ in range(3):
        x = X.clone().requires_grad_()
        torch.manual_seed(0)
        compiled.differentiable_loss(*pair, x).backward()
        assert x.grad.abs().sum() > 0


def test_differentiable_loss_and_accumulation():
    (model, guide), elbo = vae_pair(small_vae), Trace_ELBO()
    compiled = CompiledELBO(elbo, backend="eager")
    elbo.loss(model, guide, X)
    params = [p.unconstrained() for p in pyro.get_param_store().values()]
    results = []
    for loss in (elbo, elbo, compiled, compiled, compiled):
        for p in params:
            p.grad = None
        torch.manual_seed(0)
        (3 * loss.differentiable_loss(model, guide, X)).backward()
        loss.loss_and_grads(model, guide, X)  # adds
        results.append(torch.cat([p.grad.flatten() for p in params]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"expected a pyro\.infer\.ELBO"):
        CompiledELBO("Trace_ELBO")
    with pytest.raises(ValueError, match="expected one of 'inductor', 'eager', got 'c'"):
        CompiledELBO(backend="c")
    with pytest.raises(ValueError, match="cache_size"):
        CompiledELBO(cache_size=0)
    with pytest.raises(ValueError, match="compile: expected True, False or 'auto', got 'yes'"):
        fit(*vae_pair(small_vae), X, num_epochs=1, compile="yes")


def test_watch_names_what_changed():
    vae = small_vae()
    watch = Watch(vae.model)
    assert watch.changed() is None
    vae.likelihood.extra = 1
    assert watch.changed() == "'extra' of ConditionalBernoulli"


def test_parameters_that_pyro_does_not_know_have_gradients():
    """Modules that a model calls without pyro.module: `fit` trains them, compiled or not."""
    network = nn.Linear(1, 1)

    def model(x, z):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(network(z).squeeze(-1), 1.0), obs=x)

    def guide(x, z):
        pass

    x, z = torch.randn(30), torch.randn(30, 1)
    elbo = CompiledELBO(Trace_ELBO(), backend="eager")
    for _ in range(3):
        call = elbo.find(model, guide, (x, z))
        found = None if call is None else elbo.run(model, guide, call)
    Trace_ELBO().differentiable_loss(model, guide, x, z).backward()
    gradients = {id(leaf): gradient for leaf, gradient in found.gradients}
    for p in network.parameters():
        torch.testing.assert_close(gradients[id(p)], p.grad)


def test_selections_by_a_mask_are_not_recorded():
    """As many elements as a mask has are another number in each call: recorded, they would be those of the first."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = torch.zeros_like(z)
            loc[z > 0] = z[z > 0] * 2
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, scale))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), CompiledELBO(Trace_ELBO(), backend="eager"))
    svi.step(torch.zeros(20))  # runs as it is
    with pytest.warns(UserWarning, match="may be another number in each call"):
        svi.step(torch.zeros(20))


def test_what_cannot_be_captured_runs_without_a_cuda_graph(monkeypatch):
    def refuse():
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    run = _Captured(lambda a, b: [a + b], 1)
    held = torch.ones(2)
    for value in (1.0, 2.0, 3.0):
        assert run(held, torch.tensor(value))[0].tolist() == [1 + value] * 2
    with pytest.warns(UserWarning, match="no CUDA graph .* not permitted when stream is capturing$"):
        assert run(held, torch.tensor(4.0))[0].tolist() == [5.0] * 2
    assert run(held, torch.tensor(5.0))[0].tolist() == [6.0] * 2  # and says so once


def test_a_random_generator_of_the_models_own_is_not_recorded():
    def model(x):
        shift = torch.randn((), generator=torch.Generator().manual_seed(0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    compiled = CompiledELBO(Trace_ELBO(), backend="eager")
    x = torch.randn(5)
    with pytest.warns(UserWarning, match="it draws from a random generator of its own"):
        losses = [compiled.loss_and_grads(model, guide, x) for _ in range(4)]
    assert all(torch.isfinite(torch.tensor(losses)))
