"""The β-VAE's objective against Pyro's ELBO and the closed form of the linear case."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn
from truths import LinearGaussian, linear_vae, small_vae

from pyro_vae import VAE, BetaELBO, CompiledELBO, fit
from pyro_vae.distributions import (
    ConditionalMultivariateNormal,
    ConditionalNormal,
    ConditionalOneHotCategorical,
    GaussianMixture,
    StandardNormal,
)
from pyro_vae.networks import MLP
from pyro_vae.objectives.schedules import cyclical, linear


def loss_and_gradient(elbo, vae, x):
    pyro.set_rng_seed(1)
    vae.zero_grad()
    loss = elbo.differentiable_loss(vae.model, vae.guide, x)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in vae.parameters() if p.grad is not None])


def test_beta_one_is_the_elbo():
    vae, x = small_vae(full=True), torch.bernoulli(torch.full((20, 4, 4), 0.4))
    ours, theirs = (loss_and_gradient(elbo, vae, x) for elbo in (BetaELBO(1.0), TraceMeanField_ELBO()))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    torch.testing.assert_close(ours[1], theirs[1])


def test_terms_are_weighted_and_evaluation_is_not():
    x = torch.randn(30, 5)
    for prior in (StandardNormal(2), GaussianMixture(3, 2)):  # KL in closed form, and from draws
        vae = VAE(prior, ConditionalNormal(MLP(2, []), 5, scale=0.5), ConditionalNormal(MLP(5, []), 2), name="v")
        pyro.clear_param_store()
        nn.init.normal_(vae.posterior.head.weight, std=0.3)
        at = {b: loss_and_gradient(BetaELBO(b), vae, x)[0] for b in (0.0, 1.0, 3.0)}
        kl = at[1.0] - at[0.0]
        assert at[3.0] == pytest.approx(at[0.0] + 3 * kl, rel=1e-5)
        for capacity in (0.1, 50.0):
            expected = at[0.0] + 2 * 30 * abs(kl / 30 - capacity)
            assert loss_and_gradient(BetaELBO(2.0, capacity=capacity), vae, x)[0] == pytest.approx(expected, rel=1e-5)
        pyro.set_rng_seed(1)
        assert BetaELBO(3.0, capacity=9.0).loss(vae.model, vae.guide, x) == pytest.approx(at[1.0], rel=1e-5)


def test_capacity_is_per_data_point_of_a_subsampled_plate():
    x = torch.randn(40)

    def model():
        with pyro.plate("data", 40, subsample_size=8):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        with pyro.plate("data", 40, subsample_size=8):
            pyro.sample("z", dist.Normal(1.0, 1.0))  # KL = ½ for each

    assert len(x) == 40
    loss = BetaELBO(1.0, capacity=0.2).differentiable_loss(model, guide)
    assert loss.item() == pytest.approx(40 * (0.5 - 0.2), rel=1e-5)


def test_the_linear_optimum():
    """With p(x|z) fixed, the best q is the posterior of a model with noise variance βσ²."""
    truth, beta = LinearGaussian(2, 4), 4.0
    x = truth.sample(500)
    vae = VAE(
        StandardNormal(2),
        ConditionalNormal(MLP(2, []), 4, scale=truth.noise),
        ConditionalMultivariateNormal(MLP(4, []), 2),
    )
    with torch.no_grad():
        vae.likelihood.head.weight.copy_(truth.weight)
        vae.likelihood.head.bias.copy_(truth.bias)
    vae.likelihood.requires_grad_(False)
    with pytest.warns(UserWarning, match="fit ended at beta = 4"):
        fit(
            vae.model,
            vae.guide,
            x,
            num_epochs=75,
            batch_size=100,
            learning_rate=0.02,
            loss=BetaELBO(beta, num_particles=4),
            scheduler=lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, 75),
            progress=False,
            seed=0,
        )
    variance = beta * truth.noise**2
    covariance = torch.linalg.inv(truth.weight.T @ truth.weight / variance + torch.eye(2))
    mean = (x - truth.bias) @ truth.weight / variance @ covariance
    q = vae.encode(x)
    torch.testing.assert_close(q.covariance_matrix.mean(0), covariance, rtol=0.03, atol=0.005)
    assert (q.mean - mean).square().mean().sqrt() < 0.03


def test_schedules_follow_the_steps():
    assert [linear(4, 1.0, 3.0)(s) for s in (0, 2, 4, 100)] == [1.0, 2.0, 3.0, 3.0]
    assert [cyclical(10, rising=0.2)(s) for s in (0, 1, 2, 9, 10, 11)] == [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]
    vae, x = linear_vae(1, 3), torch.randn(20, 3)
    for loss in (BetaELBO(linear(10)), CompiledELBO(BetaELBO(linear(10)), backend="eager")):
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.0}), loss=loss)
        for _ in range(6):
            svi.step(x)
        assert loss.beta == pytest.approx(0.5)  # of step 5


def test_a_compiled_schedule_is_not_baked_in():
    x, losses = torch.randn(64, 3), []
    for compile in (False, True):
        torch.manual_seed(0)
        vae = linear_vae(1, 3, name=f"vae_{compile}")
        loss = CompiledELBO(BetaELBO(linear(8)), backend="eager") if compile else BetaELBO(linear(8))
        options = {"num_epochs": 5, "batch_size": 32, "seed": 0, "progress": False, "compile": compile}
        losses.append(fit(vae.model, vae.guide, x, loss=loss, **options).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_cannot_be():
    for wrong in (lambda: BetaELBO(-1.0), lambda: BetaELBO(math.nan), lambda: BetaELBO(1.0, capacity=-1.0)):
        with pytest.raises(ValueError, match="expected a finite"):
            wrong()
    vae = VAE(
        ConditionalOneHotCategorical(None, 3),
        ConditionalNormal(MLP(3, []), 2),
        ConditionalOneHotCategorical(MLP(2, []), 3),
    )
    with pytest.raises(ValueError, match="'z': OneHotCategorical cannot be reparameterized"):
        BetaELBO(1.0).differentiable_loss(vae.model, vae.guide, torch.zeros(4, 2))


def test_auxiliary_sites_count():
    """u ~ N(0, 1), z = u + N(0, 1): the entropy of u is part of the bound, as in TraceMeanField_ELBO."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(u, 1.0))

    losses = []
    for loss in (TraceMeanField_ELBO(), BetaELBO(1.0)):
        pyro.set_rng_seed(0)
        losses.append(loss.differentiable_loss(model, guide, torch.zeros(1000)).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_capacity_needs_its_plate_and_follows_its_scale():
    """100 points of KL = ½: nothing is left at C = ½, whatever the scale."""

    def model(x):
        with pyro.plate("rows", 4 * len(x), subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", 4 * len(x), subsample_size=len(x)):
            pyro.sample("z", dist.Normal(1.0, 1.0))

    x = torch.zeros(100)
    with pytest.raises(ValueError, match=r"expects a plate 'data' of them, got 'rows'.*BetaELBO\(…, plate=…\)"):
        BetaELBO(1.0, capacity=0.5).differentiable_loss(model, guide, x)
    for scale in (1.0, 0.25):
        pair = [pyro.poutine.scale(f, scale) for f in (model, guide)]
        for capacity, penalty in ((0.5, 0.0), (0.2, 0.3)):
            loss = BetaELBO(2.0, capacity=capacity, plate="rows")
            rest = BetaELBO(0.0).differentiable_loss(*pair, x)
            expected = 2 * 400 * scale * penalty
            assert loss.differentiable_loss(*pair, x) - rest == pytest.approx(expected, abs=1e-2)
            assert loss.capacity == pytest.approx(capacity)


def rate(model, guide, *args, capacity=0.2):
    """N |KL/N − C|, with β = 1."""
    loss = BetaELBO(1.0, capacity=capacity).differentiable_loss(model, guide, *args)
    return (loss - BetaELBO(0.0).differentiable_loss(model, guide, *args)).item()


NUM_DATA, CAPACITY = 10, 0.2


@pytest.mark.parametrize("outside", [1.0, 0.25])
@pytest.mark.parametrize("inside", [1.0, 5.0])
@pytest.mark.parametrize("batch", [10, 2])
@pytest.mark.parametrize("inner", [3, 1])
@pytest.mark.parametrize("first", ["w", "z"])
def test_data_points_are_counted_at_their_plate(first, inner, batch, inside, outside):
    """10 points of KL 3 × ½ (three w in an inner plate, which may take one of them) and ½ (z, scaled inside)."""

    def sites(loc):
        def w():
            with pyro.plate("inner", 3, subsample_size=inner, dim=-2):
                pyro.sample("w", dist.Normal(loc, 1.0))

        def z():
            with pyro.poutine.scale(scale=inside):
                pyro.sample("z", dist.Normal(loc, 1.0))

        with pyro.poutine.scale(scale=outside), pyro.plate("data", NUM_DATA, subsample_size=batch, dim=-1):
            for site in (w, z) if first == "w" else (z, w):
                site()

    divergence = NUM_DATA * outside * (1.5 + 0.5 * inside)
    expected = divergence - NUM_DATA * outside * CAPACITY
    assert rate(lambda: sites(0.0), lambda: sites(1.0)) == pytest.approx(expected, rel=1e-5)


def test_data_points_in_a_sequential_plate_and_in_one_that_is_given_rows():
    def sequential(loc):
        for i in pyro.plate("data", 6, subsample_size=3):
            with pyro.poutine.scale(scale=5.0):
                pyro.sample(f"z{i}", dist.Normal(loc, 1.0))

    def rows(loc):
        with pyro.plate("data", 6, subsample=torch.tensor([0, 4])), pyro.poutine.scale(scale=5.0):
            pyro.sample("z", dist.Normal(loc, 1.0))

    def steps(loc):  # the plate of data within one of steps
        with pyro.plate("steps", 4, subsample_size=2, dim=-2), pyro.plate("data", 6, dim=-1):
            pyro.sample("z", dist.Normal(loc, 1.0))

    pyro.set_rng_seed(0)
    for sites, divergence in ((rows, 6 * 2.5), (steps, 6 * 4 * 0.5)):
        got = rate(lambda f=sites: f(0.0), lambda f=sites: f(1.0))
        assert got == pytest.approx(divergence - 6 * CAPACITY, rel=1e-5)
    got = rate(lambda: sequential(0.0), lambda: sequential(1.0))
    assert got == pytest.approx(6 * 2.5 - 6 * CAPACITY, rel=1e-5)


def test_a_plate_made_elsewhere():
    """Its scale is that of its sites, where they agree."""
    plate = pyro.plate("data", 6)

    def sites(loc, around, inside):
        with pyro.poutine.scale(scale=around), plate:
            pyro.sample("z", dist.Normal(loc, 1.0))
            with pyro.poutine.scale(scale=inside):
                pyro.sample("w", dist.Normal(loc, 1.0))

    for around, inside, size in ((1.0, 1.0, 6), (0.25, 1.0, 1.5), (1.0, 5.0, 6)):
        got = rate(*(lambda loc=loc, a=around, i=inside: sites(loc, a, i) for loc in (0.0, 1.0)))
        assert got == pytest.approx(6 * around * (0.5 + 0.5 * inside) - size * CAPACITY, rel=1e-5)


def test_latents_of_the_model_alone_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    warnings.simplefilter("ignore")  # Pyro's own
    with pytest.raises(ValueError, match="site 'y' is in the model alone"):
        BetaELBO(1.0).differentiable_loss(model, lambda x: None, torch.zeros(3))
