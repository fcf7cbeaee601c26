"""What conditional distributions check and take; the laws of all families are in `contract/`."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae import VAE, fit
from pyro_vae.distributions import (
    ConditionalBernoulli,
    ConditionalNegativeBinomial,
    ConditionalNormal,
    ConditionalStudentT,
    LearnedScale,
    StandardNormal,
    condition,
)
from pyro_vae.networks import MLP, ConvDecoder, ConvEncoder


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
    with pytest.raises(ValueError, match="init: expected a positive number"):
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
