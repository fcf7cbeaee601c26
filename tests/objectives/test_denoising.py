"""The strength of a corruption may change while it is in use, also in compiled runs."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae import CompiledELBO, DenoisingELBO
from pyro_vae.objectives.denoising import gaussian_noise, masking_noise, salt_and_pepper_noise


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    a = pyro.param("a", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(a * x, 0.7))


def seen_by(loss, x):
    """What the guide is called with."""
    seen = []

    def watching(x):
        seen.append(x)
        guide(x)

    loss.loss(model, watching, x)
    return seen[-1]


NOISES = {
    "gaussian": (lambda s: gaussian_noise(s), "scale"),
    "masking": (lambda s: masking_noise(s, value=-3.0), "probability"),
    "salt and pepper": (lambda s: salt_and_pepper_noise(s, (-2.0, 2.0)), "probability"),
}
noises = pytest.mark.parametrize("name", NOISES)


@noises
def test_another_strength_corrupts_as_a_new_corruption_does(name):
    make, attribute = NOISES[name]
    x, corruption = torch.randn(1000), make(0.1)
    setattr(corruption, attribute, 0.8)
    results = []
    for f in (corruption, make(0.8)):
        pyro.set_rng_seed(0)
        results.append(f(x))
    assert torch.equal(*results)
    assert getattr(corruption, attribute) == 0.8
    for dtype in (torch.float32, torch.float64):
        assert corruption(x.to(dtype)).dtype is dtype


@pytest.mark.parametrize("how", ["corruption", "strength"])
def test_a_corruption_that_is_set_later_counts(how):
    x, loss = torch.zeros(10_000), DenoisingELBO(gaussian_noise(0.1))
    watching = lambda y: seen.append(y) or guide(y)  # noqa: E731
    seen = []
    loss.loss(model, watching, x)
    if how == "corruption":
        loss.corruption = gaussian_noise(2.0)
    else:
        loss.corruption.scale = 2.0
    loss.loss(model, watching, x)
    assert [round(y.std().item(), 1) for y in seen] == [0.1, 2.0]


@pytest.mark.parametrize("how", ["corruption", "strength"])
@noises
def test_compiled_runs_read_the_strength(name, how):
    """The same losses and gradients as without compilation, as the strength moves."""
    make, attribute = NOISES[name]
    x, results = torch.randn(4000), []
    strengths = [0.1] * 4 + [0.9, 0.0, 0.5, 0.5, 0.0]
    for compiled in (False, True):
        pyro.clear_param_store()
        loss = DenoisingELBO(make(0.1))
        run = CompiledELBO(loss, backend="eager") if compiled else loss
        losses = []
        for step, strength in enumerate(strengths):
            if how == "strength":
                setattr(loss.corruption, attribute, strength)
            elif strength != strengths[step - 1]:
                loss.corruption = make(strength)
            pyro.set_rng_seed(step)
            value = run.loss_and_grads(model, guide, x)
            leaf = pyro.param("a").unconstrained()
            losses.append((value, leaf.grad.item()))
            leaf.grad = None
        results.append(losses)
    assert results[0] == results[1]


def test_generated_code_reads_the_strength():
    """z = ax̃ + 0.7 ε with x̃ = x + sη, for which the expected loss is known."""
    x, loss = torch.randn(4000), DenoisingELBO(gaussian_noise(0.1))
    run = CompiledELBO(loss, backend="inductor")
    for scale in [0.1] * 4 + [5.0, 0.1, 2.0]:
        loss.corruption.scale = scale
        value = run.loss_and_grads(model, guide, x)
        variance = 0.7**2 + (0.5 * scale) ** 2
        constant = 0.5 * math.log(2 * math.pi) - math.log(0.7) - 0.5
        expected = (0.5 * (0.5 * x).square() * 2 + variance + constant).sum().item()
        draws = 0.5 * x + variance**0.5 * torch.randn(4000)
        spread = (0.5 * (x - draws).square() + 0.5 * draws.square()).std().item() + 1  # of one point
        assert abs(value - expected) < 5 * spread * len(x) ** 0.5


def test_copies():
    """A copy has a corruption of its own where it is deep, and loses nothing by pickling."""
    loss = DenoisingELBO(gaussian_noise(0.5))
    loss.loss(model, guide, torch.zeros(3))  # which remembers a guide
    for new in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        loss.corruption.scale = 0.1
        assert new.corruption.scale == 0.5
        assert seen_by(new, torch.zeros(10_000)).std().item() == pytest.approx(0.5, rel=0.05)
        loss.corruption.scale = 0.5


def test_what_cannot_be():
    loss = DenoisingELBO(masking_noise(0.5))
    with pytest.raises(TypeError, match=r"expected a function Tensor → Tensor as corruption, got 0.5. Try gaussian"):
        loss.corruption = 0.5
    with pytest.raises(TypeError, match="expected a function"):
        DenoisingELBO(0.5)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="masking_noise: probability: expected a probability"):
            loss.corruption.probability = wrong
        assert loss.corruption.probability == 0.5
    with pytest.raises(ValueError, match="gaussian_noise: expected a finite scale >= 0"):
        gaussian_noise(1.0).scale = -1.0
