"""Weighted sums of objectives: values and gradients are the sums of those of the parts, wherever they are used."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from truths import small_vae

from pyro_vae import BetaELBO, CombinedELBO, CompiledELBO, ForwardKL, ImportanceWeightedELBO, fit
from pyro_vae.objectives import linear

X = torch.bernoulli(torch.full((8, 4, 4), 0.5), generator=torch.Generator().manual_seed(0))


def gradients(loss, vae):
    vae.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in vae.named_parameters()}


@pytest.mark.parametrize(
    "make",
    [Trace_ELBO, TraceMeanField_ELBO, lambda: ImportanceWeightedELBO(3), lambda: BetaELBO(0.5)],
    ids=["Trace_ELBO", "TraceMeanField_ELBO", "ImportanceWeightedELBO", "BetaELBO"],
)
def test_it_is_the_sum_of_its_parts(make):
    """One after the other, on the random numbers that each would have alone; the model learns from the first."""
    vae = small_vae()
    parts = make(), ForwardKL()
    pyro.set_rng_seed(1)
    losses = [part.differentiable_loss(vae.model, vae.guide, X) for part in parts]
    expected = [gradients(loss, vae) for loss in losses]
    elbo = CombinedELBO([(make(), 2.0), (ForwardKL(), 0.25)])
    elbo.differentiable_loss(vae.model, vae.guide, X)  # whose looks draw
    pyro.set_rng_seed(1)
    loss = elbo.differentiable_loss(vae.model, vae.guide, X)
    assert loss.item() == pytest.approx(2 * losses[0].item() + 0.25 * losses[1].item(), rel=1e-6)
    found = gradients(loss, vae)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, 2 * expected[0][name] + 0.25 * expected[1][name], rtol=1e-5, atol=1e-6)
        if name.startswith("likelihood"):
            assert not expected[1][name].any()
            assert expected[0][name].any()
    vae.zero_grad()
    pyro.set_rng_seed(1)
    assert elbo.loss_and_grads(vae.model, vae.guide, X) == pytest.approx(loss.item(), rel=1e-6)
    pyro.set_rng_seed(1)
    value = elbo.loss(vae.model, vae.guide, X)
    if make is not Trace_ELBO and isinstance(make(), BetaELBO):
        assert value > loss.item()  # which evaluates at beta = 1
    else:
        assert value == pytest.approx(loss.item(), rel=1e-6)


def test_weights_and_parts_follow_the_steps():
    vae = small_vae()
    elbo = CombinedELBO([(BetaELBO(linear(4)), linear(10, 1.0, 2.0)), (ForwardKL(), 0.5)])
    assert elbo.weights == [1.0, 0.5]
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.0}), elbo)
    for _ in range(3):
        svi.step(X)
    assert elbo.weights == pytest.approx([1.2, 0.5])
    assert elbo.elbos[0].beta == 0.5
    assert elbo.not_a_bound() == "beta = 0.5"
    other = copy.copy(elbo)
    other.set_step(10)
    assert (other.weights, other.elbos[0].beta, other.not_a_bound()) == ([2.0, 0.5], 1.0, None)
    assert elbo.weights == pytest.approx([1.2, 0.5])
    assert CombinedELBO([(elbo, 1.0)]).weights == [1.0]  # a sum of sums
    pickled = pickle.loads(pickle.dumps(CombinedELBO([(Trace_ELBO(), 1.0), (ForwardKL(), 0.5)])))
    assert pickled.loss(vae.model, vae.guide, X) > 0


def trained(x, loss, **options):
    torch.manual_seed(0)
    pyro.clear_param_store()
    vae = small_vae()
    result = fit(vae.model, vae.guide, x, batch_size=8, loss=loss, seed=0, progress=False, **options)
    return result.loss, torch.cat([p.detach().flatten() for p in vae.parameters()])


def test_fit_compiles_schedules_and_resumes_it(tmp_path):
    """20 rows in batches of 8, 8 and 4; 12 steps, over which the weight of the second part falls."""
    x = torch.bernoulli(torch.full((20, 4, 4), 0.5))
    elbo = CombinedELBO([(TraceMeanField_ELBO(), 1.0), (ForwardKL(), linear(12, 1.0, 0.0))])
    losses, weights = trained(x, elbo, num_epochs=4)
    assert elbo.weights == [1.0, 1.0]  # fit takes a copy
    found = trained(x, CompiledELBO(copy.copy(elbo), backend="eager"), num_epochs=4)
    assert found[0] == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(found[1], weights, rtol=1e-4, atol=1e-5)
    trained(x, elbo, num_epochs=2, checkpoint=tmp_path / "fit.pt")
    found = trained(x, elbo, num_epochs=4, checkpoint=tmp_path / "fit.pt")
    assert found[0] == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(found[1], weights)
    without, _ = trained(x, CombinedELBO([(TraceMeanField_ELBO(), 1.0), (ForwardKL(), 1.0)]), num_epochs=4)
    assert losses[-1] < without[-1]


def test_wake_and_sleep_together_find_the_posterior_and_the_model():
    """x ~ N(μ + z, 0.5): μ is the mean of the data, q(z|x) = N(0.8 (x − μ), 0.2)."""

    def model(x):
        mu = pyro.param("mu", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mu + z, 0.5), obs=x)

    def guide(x):
        a, b, c = (pyro.param(name, torch.tensor(0.0)) for name in "abc")
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x + b, c.exp()))

    x = 3 + 1.25**0.5 * torch.randn(2000)
    loss = CombinedELBO([(Trace_ELBO(), 1.0), (ForwardKL(), 1.0)])
    scheduler = {"scheduler": lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, 500)}
    fit(model, guide, x, num_epochs=500, batch_size=2000, learning_rate=0.1, loss=loss, seed=0, **scheduler)
    found = {name: pyro.param(name).item() for name in ("mu", "a", "b", "c")}
    assert found["mu"] == pytest.approx(x.mean().item(), abs=0.02)
    assert found["a"] == pytest.approx(0.8, abs=0.01)
    assert found["b"] == pytest.approx(-0.8 * x.mean().item(), abs=0.04)
    assert found["c"] == pytest.approx(torch.tensor(0.2).log().item() / 2, abs=0.02)


def test_errors():
    with pytest.raises(ValueError, match="expected pairs of an objective and its weight, got none"):
        CombinedELBO([])
    for parts in ([Trace_ELBO()], [(Trace_ELBO(), "1")], [(1.0, Trace_ELBO())]):
        with pytest.raises(TypeError, match=r"expected pairs \(pyro.infer.ELBO, weight\)"):
            CombinedELBO(parts)
    with pytest.raises(ValueError, match=r"expected a finite weight of Trace_ELBO >= 0, got -1.0 at step 0"):
        CombinedELBO([(Trace_ELBO(), -1)])
    with pytest.raises(ValueError, match=r"expected a finite weight of ForwardKL >= 0, got -1.0 at step 5"):
        CombinedELBO([(ForwardKL(), linear(5, 1.0, -1.0))]).set_step(5)
    with pytest.raises(TypeError, match=r"RenyiELBO has no loss that can be differentiated.*Try Importance"):
        CombinedELBO([(RenyiELBO(), 1.0)])
    with pytest.raises(TypeError, match="not compiled yet"):
        CombinedELBO([(CompiledELBO(), 1.0)])
