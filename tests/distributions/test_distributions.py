"""Conditional distributions: one contract over all families, and the full covariance against float64."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence
from truths import LinearGaussian, linear_vae

from pyro_vae import VAE, fit
from pyro_vae.distributions import (
    ConditionalBernoulli,
    ConditionalBeta,
    ConditionalContinuousBernoulli,
    ConditionalMultivariateNormal,
    ConditionalNegativeBinomial,
    ConditionalNormal,
    ConditionalPoisson,
    ConditionalStudentT,
    LearnedScale,
    MultivariateNormal,
    StandardNormal,
    condition,
)
from pyro_vae.networks import MLP, ConvDecoder, ConvEncoder

FAMILIES = {
    "normal": lambda shape: ConditionalNormal(MLP(3, [8]), shape),
    "normal, fixed scale": lambda shape: ConditionalNormal(MLP(3, [8]), shape, scale=0.5),
    "normal, shared scale": lambda shape: ConditionalNormal(MLP(3, [8]), shape, scale=LearnedScale()),
    "normal, scale each": lambda shape: ConditionalNormal(MLP(3, [8]), shape, scale=LearnedScale(shape)),
    "student t, df from the network": lambda shape: ConditionalStudentT(MLP(3, [8]), shape),
    "multivariate normal": lambda shape: ConditionalMultivariateNormal(MLP(3, [8]), shape),
    "bernoulli": lambda shape: ConditionalBernoulli(MLP(3, [8]), shape),
    "student t": lambda shape: ConditionalStudentT(MLP(3, [8]), shape, df=9.0),
    "beta": lambda shape: ConditionalBeta(MLP(3, [8]), shape),
    "continuous bernoulli": lambda shape: ConditionalContinuousBernoulli(MLP(3, [8]), shape),
    "poisson": lambda shape: ConditionalPoisson(MLP(3, [8]), shape),
    "negative binomial": lambda shape: ConditionalNegativeBinomial(MLP(3, [8]), shape),
}
SHAPES = [(4,), (2, 3), (1, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
class TestContract:
    def test_shapes_and_batches(self, family, shape, device):
        conditional = FAMILIES[family](shape).to(device)
        randomize(conditional)
        x = torch.randn(5, 2, 3, device=device)
        p = conditional(x)
        assert p.batch_shape == (5, 2)
        assert p.event_shape == shape
        y = p.sample((6,))
        assert y.shape == (6, 5, 2, *shape)
        assert p.mean.shape == p.variance.shape == (5, 2, *shape)
        # a row does not depend on the others, nor on how the batch is shaped
        torch.testing.assert_close(conditional(x[3, 1]).log_prob(y[:, 3, 1]), p.log_prob(y)[:, 3, 1])

    def test_moments(self, family, shape):
        conditional = FAMILIES[family](shape)
        randomize(conditional)
        p = conditional(torch.randn(3))
        y = p.sample((20000,))
        error = p.variance.sqrt() / math.sqrt(20000)
        assert ((y.mean(0) - p.mean).abs() < 5 * error).all()
        assert (y.var(0) / p.variance - 1).abs().max() < 0.1

    def test_gradients_reach_every_parameter(self, family, shape):
        conditional = FAMILIES[family](shape)
        randomize(conditional)
        p = conditional(torch.randn(10, 3))
        p.log_prob(p.sample()).sum().backward()
        assert all(q.grad is not None and q.grad.abs().sum() > 0 for q in conditional.parameters())

    def test_expand_and_support(self, family, shape):
        p = FAMILIES[family](shape)(torch.randn(5, 3)).expand((4, 5))
        y = p.sample()
        assert p.batch_shape == (4, 5)
        assert p.support.check(y).all()
        assert p.log_prob(y).shape == (4, 5)


def randomize(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)


def test_scale_starts_at_one_and_stays_positive():
    q = ConditionalNormal(MLP(3, [8]), 4)
    torch.testing.assert_close(q(torch.randn(5, 3)).base_dist.scale, torch.ones(5, 4))
    q.head.bias.data.fill_(-200.0)  # where softplus is zero in float32
    assert (q(torch.zeros(5, 3)).base_dist.scale == 1e-5).all()


def test_learned_scale():
    scale = LearnedScale(3, init=0.05)
    torch.testing.assert_close(scale(), torch.full((3,), 0.05))
    with pytest.raises(ValueError, match="expected init >"):
        LearnedScale(init=0.0)
    with pytest.raises(ValueError, match="positive scale"):
        ConditionalNormal(MLP(3, []), 4, scale=-1.0)
    for init in (2e-5, 0.1, 50.0, 1000.0, 1e6):  # e^1000 is no float
        torch.testing.assert_close(LearnedScale(init=init)(), torch.tensor(init))


@pytest.mark.parametrize("shape", [(3, 1), (1, 1, 3), (2,), (4,)], ids=str)
def test_a_fixed_parameter_that_would_be_one_of_rows_is_refused(shape):
    """(3, 1) for an event (3,) would be another scale for each of three rows, and fail with five."""
    message = (
        rf"that broadcasts to the event shape \(3,\), got one of shape {re.escape(str(shape))}. Try a single number"
    )
    with pytest.raises(ValueError, match="ConditionalNormal: expected a scale " + message):
        ConditionalNormal(MLP(3, []), 3, scale=torch.ones(shape))
    with pytest.raises(ValueError, match="ConditionalStudentT: expected a df " + message):
        ConditionalStudentT(MLP(3, []), 3, df=torch.ones(shape))
    with pytest.raises(ValueError, match="ConditionalNegativeBinomial: expected a total_count " + message):
        ConditionalNegativeBinomial(MLP(3, []), 3, total_count=torch.ones(shape))


def test_fixed_parameters_that_broadcast():
    for shape in ((), (1,), (3,), (2, 1), (1, 3), (2, 3)):
        p = ConditionalNormal(MLP(3, []), (2, 3), scale=torch.full(shape, 0.5))(torch.zeros(5, 3))
        assert p.batch_shape == (5,)
        torch.testing.assert_close(p.stddev, torch.full((5, 2, 3), 0.5))


def test_conv_networks_and_batch_norm_work_under_particles(device):
    """Convolutions refuse five dimensions, and batch norm takes the wrong one, unless left dimensions are flattened."""
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(6))
    encoder(torch.zeros(1, 1, 8, 8))
    posterior = ConditionalNormal(encoder, 2).to(device)
    x = torch.randn(3, 5, 1, 8, 8, device=device)
    q = posterior(x, event_dims=[3])
    assert q.batch_shape == (3, 5)
    torch.testing.assert_close(posterior(x[1], event_dims=[3]).mean, q.mean[1])
    normed = ConditionalNormal(nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5)), 1, features=5).to(device)
    z = torch.randn(7, 5, 2, device=device)  # (particles, rows == features, latent)
    torch.testing.assert_close(normed(z).mean, normed(z.reshape(35, 2)).mean.reshape(7, 5, 1))
    image = ConditionalBernoulli(ConvDecoder(2, [8, 4], (8, 8)), (1, 8, 8)).to(device)
    assert image(z).sample().shape == (7, 5, 1, 8, 8)
    assert ConditionalNormal(ConvEncoder((1, 8, 8), [4], 6), 2)(x.cpu(), event_dims=[3]).batch_shape == (3, 5)


def test_head_of_a_feature_map_is_pixelwise():
    likelihood = ConditionalNormal(ConvDecoder(2, [4], (6, 6)), (3, 6, 6))
    assert likelihood.head.weight.shape == (6, 4, 1, 1)  # loc and scale of three channels
    with pytest.raises(ValueError, match=r"expects an event shape \(channels, \*\(6, 6\)\), got \(6, 6\)"):
        ConditionalNormal(ConvDecoder(2, [4], (6, 6)), (6, 6))


def test_features_are_found_or_asked_for():
    assert ConditionalNormal(nn.Sequential(nn.Linear(3, 7), nn.ReLU()), 2).head.in_features == 7
    assert ConditionalNormal(nn.Identity(), 2, features=9).head.in_features == 9
    with pytest.raises(ValueError, match=r"cannot tell how many features Flatten puts out.*Try features="):
        ConditionalNormal(nn.Flatten(), 2)


def test_wrong_device_is_named():
    with pytest.raises(ValueError, match=r"expected inputs on cpu, where the weights are, got meta.*Try to move one"):
        ConditionalNormal(MLP(3, [4]), 2)(torch.zeros(5, 3, device="meta"))


def test_wrong_dtype_is_named():
    with pytest.raises(TypeError, match=r"expected inputs of torch.float32, the weights' dtype, got torch.uint8"):
        ConditionalNormal(MLP(3, [4]), 2)(torch.zeros(5, 3, dtype=torch.uint8))


# -- what counts as a conditional distribution ------------------------------------------------------------------------


def test_condition_accepts_every_kind():
    z = torch.randn(5, 2)
    assert condition(dist.Normal(0.0, 1.0)).batch_shape == ()
    assert condition(StandardNormal((2, 3))).event_shape == (2, 3)
    assert condition(lambda z: dist.Normal(z, 1.0).to_event(1), z).batch_shape == (5,)
    spline = dist.transforms.conditional_spline(1, context_dim=2)
    flow = dist.ConditionalTransformedDistribution(dist.Normal(torch.zeros(1), 1.0).to_event(1), [spline])
    assert condition(flow, z).sample((5,)).shape == (5, 1)
    with pytest.raises(TypeError, match="posterior: expected a distribution, got Tensor"):
        condition(lambda z: z, z, role="posterior")
    with pytest.raises(TypeError, match="prior: expected a distribution or a callable"):
        condition(3.0, role="prior")


def test_torch_distribution_becomes_one_of_pyro():
    base = torch.distributions.Normal(torch.zeros(5), 2.0)
    p = condition(lambda: base)
    x = pyro.sample("x", p)
    torch.testing.assert_close(p.log_prob(x), base.log_prob(x))
    assert p.mean.equal(base.mean)
    assert p.variance.equal(base.variance)
    assert p.expand((3, 5)).sample().shape == (3, 5)
    assert p.to_event(1).event_shape == (5,)


def test_zuko_flow_in_every_role():
    validate = torch.distributions.Distribution._validate_args
    constraints = torch.distributions.Distribution.__dict__.get("arg_constraints")
    zuko = pytest.importorskip("zuko")
    flow = zuko.flows.NSF(2, 3, transforms=1, hidden_features=[8])
    c = torch.randn(5, 3)
    p = condition(flow, c)
    y = p.rsample()
    assert y.shape == (5, 2)
    assert p.support.check(y).all()
    torch.testing.assert_close(p.log_prob(y), flow(c).log_prob(y))
    vae = VAE(
        zuko.flows.NSF(2, 0, transforms=1, hidden_features=[8]),
        ConditionalNormal(MLP(2, [8]), 3),
        zuko.flows.MAF(2, 3, transforms=1, hidden_features=[8]),
    )
    before = [p.clone() for p in vae.parameters()]
    fit(vae.model, vae.guide, torch.randn(64, 3), num_epochs=2, learning_rate=0.01)
    assert all(not torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))
    # zuko switches validation off for the whole process when it is imported
    torch.distributions.Distribution._validate_args = validate
    if constraints is not None:
        torch.distributions.Distribution.arg_constraints = constraints


# -- the full covariance ----------------------------------------------------------------------------------------------


def test_scale_tril_is_diag_tau_times_unit_lower():
    q = ConditionalMultivariateNormal(MLP(3, [8]), 4)
    assert q(torch.randn(2, 3)).scale_tril.allclose(torch.eye(4))  # off-diagonal starts at zero, scales at one
    randomize(q)
    x = torch.randn(2, 3)
    _, raw, lower = q.head(q.network(x)).split([4, 4, 6], 1)
    tau = nn.functional.softplus(raw + math.log(math.expm1(1 - 1e-5))) + 1e-5
    expected = torch.zeros(2, 4, 4)
    index = 0
    for i in range(4):
        for j in range(i):
            expected[:, i, j] = tau[:, i] * lower[:, index] / 2  # √d
            index += 1
        expected[:, i, i] = tau[:, i]
    torch.testing.assert_close(q(x).scale_tril, expected)


def float32_error(q, z):
    """Against float64 on the very same draw."""
    exact = dist.MultivariateNormal(q.loc.double(), scale_tril=q.scale_tril.double()).log_prob(z.double())
    return (q.log_prob(z).double() - exact).abs().max().item()


def test_full_covariance_is_sound_in_float32_at_start_and_after_training(device):
    data = LinearGaussian(64, 80, noise=4.0, device=device)
    x = data.sample(2000)
    x = (x - x.mean(0)) / x.std(0)
    vae = linear_vae(64, 80).to(device)
    q = vae.encode(x)
    assert float32_error(q, q.rsample()) < 1e-3
    fit(vae.model, vae.guide, x, num_epochs=30, learning_rate=3e-3, loss=TraceMeanField_ELBO(), seed=0)
    q = vae.encode(x)
    off_diagonal = (q.scale_tril / q.scale_tril.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).tril(-1).abs().max()
    assert off_diagonal > 0.1  # it did learn correlations
    assert float32_error(q, q.rsample()) < 1e-3
    assert float32_error(q.expand((3, 2000)), q.expand((3, 2000)).rsample()) < 1e-3


def test_full_covariance_is_sound_for_any_head_of_order_one():
    """Where entries in units of τ alone would give an error of millions of nats; see the next test."""
    q = ConditionalMultivariateNormal(MLP(64, []), 64)
    for p in q.parameters():
        nn.init.normal_(p, std=1 / 8)
    q = q(torch.randn(500, 64))
    assert float32_error(q, q.rsample()) < 1e-3


def test_a_draw_of_an_ill_conditioned_triangle_is_scored_from_its_noise():
    """Off-diagonals as large as the diagonal lose millions of nats in a solve at d = 64: the noise loses none."""
    tril = torch.eye(64) + torch.randn(20, 64, 64).tril(-1)
    loc = torch.randn(20, 64)
    q = MultivariateNormal(loc, 0.1 * tril)
    z = q.rsample()
    eps = torch.linalg.solve_triangular(0.1 * tril.double(), (z.double() - loc).unsqueeze(-1), upper=False)
    assert (eps.square().sum((-2, -1)) > 1e4).any()  # a solve does fail here, even in float64: z was rounded
    expected = -0.5 * q._draw[1].double().square().sum(-1) - 32 * math.log(2 * math.pi) - 64 * math.log(0.1)
    torch.testing.assert_close(q.log_prob(z).double(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("expanded", [False, True])
def test_own_draws_have_the_partial_gradients_of_the_solve(expanded):
    tril = (torch.eye(4) + 0.3 * torch.randn(5, 4, 4).tril(-1)).double().requires_grad_()
    loc = torch.randn(5, 4).double().requires_grad_()
    q, truth = MultivariateNormal(loc, tril), dist.MultivariateNormal(loc, scale_tril=tril)
    if expanded:
        q, truth = q.expand((3, 5)), truth.expand((3, 5))
    z = q.rsample()
    weight = torch.randn(q.batch_shape).double()
    for value in (z, z.detach().clone().requires_grad_()):
        inputs = [value, loc, tril]
        got = torch.autograd.grad((q.log_prob(value) * weight).sum(), inputs, retain_graph=True)
        expected = torch.autograd.grad((truth.log_prob(value) * weight).sum(), inputs, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        z += 1.0  # no longer its draw
    torch.testing.assert_close(q.log_prob(z), truth.log_prob(z))


def gaussians():
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for batch in ((), (5,)):
        tril = 0.4 * random(*batch, 6, 6).tril(-1) + torch.diag_embed(random(*batch, 6).exp())
        yield dist.Normal(random(*batch, 6), random(*batch, 6).exp()).to_event(1)
        yield dist.MultivariateNormal(random(*batch, 6), scale_tril=tril)
        yield MultivariateNormal(random(*batch, 6), tril)
        yield MultivariateNormal(random(*batch, 6), tril, (2, 3))
        yield dist.Normal(random(*batch, 2, 3), random(*batch, 2, 3).exp()).to_event(2)


def dense(p):
    """(mean, covariance) of any of these, (*batch, 6) and (*batch, 6, 6)."""
    mean = p.mean.reshape(*p.batch_shape, 6)
    full = isinstance(p, dist.MultivariateNormal)
    return mean, p.covariance_matrix if full else torch.diag_embed(p.variance.reshape(*p.batch_shape, 6))


def test_kl_of_any_two_gaussians():
    pairs = 0
    for p in gaussians():
        for q in gaussians():
            if p.event_shape != q.event_shape:
                continue
            (m1, s1), (m2, s2) = dense(p), dense(q)
            inverse = torch.linalg.inv(s2)
            delta = (m2 - m1).unsqueeze(-1)
            expected = 0.5 * (
                torch.logdet(s2)
                - torch.logdet(s1)
                - 6
                + (inverse @ s1).diagonal(dim1=-2, dim2=-1).sum(-1)
                + (delta.mT @ inverse @ delta)[..., 0, 0]
            )
            torch.testing.assert_close(kl_divergence(p, q), expected)
            assert (kl_divergence(p, q) >= 0).all()
            pairs += 1
    assert pairs == 52


def test_kl_agrees_with_sampling():
    p, q = list(gaussians())[3], list(gaussians())[4]
    z = p.rsample((100_000,))
    difference = p.log_prob(z) - q.log_prob(z)
    error = difference.std() / math.sqrt(len(z))
    assert (difference.mean() - kl_divergence(p, q)).abs() < 5 * error


@pytest.mark.parametrize("shape", [(3,), (3, 2)], ids=str)
@pytest.mark.parametrize("family", [ConditionalNormal, ConditionalMultivariateNormal])
def test_mean_field_elbo_uses_the_closed_form(family, shape, monkeypatch):
    """Its value is E log p(x|z) − KL, with no noise from log q(z) − log p(z); and log q is never asked for."""
    vae = VAE(StandardNormal(shape), ConditionalNormal(MLP(shape, []), 4, scale=1.0), family(MLP(4, [8]), shape))
    randomize(vae)
    x = torch.randn(7, 4)
    pyro.set_rng_seed(1)
    loss = TraceMeanField_ELBO().loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(1)
    z = vae.guide(x)
    expected = vae.decode(z).log_prob(x).sum() - kl_divergence(vae.encode(x), vae.prior()).sum()
    assert loss == pytest.approx(-expected.item(), rel=1e-5)
    losses = torch.tensor([Trace_ELBO().loss(vae.model, vae.guide, x) for _ in range(400)])
    exact = torch.tensor([TraceMeanField_ELBO().loss(vae.model, vae.guide, x) for _ in range(400)])
    assert (losses.mean() - exact.mean()).abs() < 5 * (losses.var() / 400 + exact.var() / 400).sqrt()
