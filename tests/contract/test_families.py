"""Every family goes through the same laws. A new one costs one line here."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from pyro_vae.distributions import (
    ConditionalBernoulli,
    ConditionalBeta,
    ConditionalCategorical,
    ConditionalContinuousBernoulli,
    ConditionalDelta,
    ConditionalFlow,
    ConditionalLowRankMultivariateNormal,
    ConditionalMultivariateNormal,
    ConditionalNegativeBinomial,
    ConditionalNormal,
    ConditionalOneHotCategorical,
    ConditionalPoisson,
    ConditionalProduct,
    ConditionalStudentT,
    GaussianMixture,
    LearnedScale,
    ObservedPart,
    StandardNormal,
    VampPrior,
)
from pyro_vae.networks import MLP

D = 4


class WithItsPosterior(nn.Module):
    """A VampPrior beside the posterior that it mixes and does not own, as in a VAE."""

    def __init__(self):
        super().__init__()
        self.posterior = ConditionalNormal(network(), D)
        self.prior = VampPrior(self.posterior, torch.randn(5, 3))

    def forward(self):
        return self.prior()


def network():
    return MLP(3, [8], activation=nn.Tanh)


def affine():
    from pyro.distributions.transforms import affine_coupling

    return affine_coupling(D, [8])


FAMILIES = {
    "Normal": lambda: ConditionalNormal(network(), D),
    "Normal, images": lambda: ConditionalNormal(network(), (2, 3)),
    "Normal, learned scale": lambda: ConditionalNormal(network(), D, scale=LearnedScale()),
    "MultivariateNormal": lambda: ConditionalMultivariateNormal(network(), D),
    "LowRankMultivariateNormal": lambda: ConditionalLowRankMultivariateNormal(network(), D, rank=2),
    "StudentT": lambda: ConditionalStudentT(network(), D),
    "Beta": lambda: ConditionalBeta(network(), D),
    "Bernoulli": lambda: ConditionalBernoulli(network(), (2, 2)),
    "ContinuousBernoulli": lambda: ConditionalContinuousBernoulli(network(), D),
    "Categorical": lambda: ConditionalCategorical(network(), D, num_categories=3),
    "OneHotCategorical": lambda: ConditionalOneHotCategorical(network(), D),
    "Poisson": lambda: ConditionalPoisson(network(), D),
    "NegativeBinomial": lambda: ConditionalNegativeBinomial(network(), D),
    "Delta": lambda: ConditionalDelta(network(), D),
    "Flow": lambda: ConditionalFlow(ConditionalNormal(network(), D), [affine()]),
    "Product": lambda: ConditionalProduct(ConditionalNormal(network(), 2), ConditionalPoisson(network(), 2)),
    "ObservedPart": lambda: ObservedPart(ConditionalNormal(network(), D)),
}
PRIORS = {
    "StandardNormal": lambda: StandardNormal(D),
    "GaussianMixture": lambda: GaussianMixture(3, D),
    "VampPrior": WithItsPosterior,
    "Normal without a network": lambda: ConditionalNormal(None, D),
}
MAKE = {**{name: (make, True) for name, make in FAMILIES.items()}, **{n: (make, False) for n, make in PRIORS.items()}}
families = pytest.mark.parametrize("name", MAKE)


def call(family: nn.Module, needs_input: bool, x: Tensor):
    return family(x) if needs_input else family()


def setup(name: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    make, needs_input = MAKE[name]
    family = make().to(dtype)
    with torch.no_grad():
        for p in family.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return family, needs_input, torch.randn(6, 3, dtype=dtype)


def draw(fn):
    torch.manual_seed(1)
    return fn.sample()


@families
def test_weights_go_to_another_instance_and_back(name):
    family, needs_input, x = setup(name)
    other = MAKE[name][0]()
    other.load_state_dict(family.state_dict())
    value = draw(call(family, needs_input, x))
    assert torch.equal(call(other, needs_input, x).log_prob(value), call(family, needs_input, x).log_prob(value))


@families
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_apart(name, copier):
    """Also after use, when a draw may be remembered."""
    family, needs_input, x = setup(name)
    value = draw(call(family, needs_input, x))
    before = call(family, needs_input, x).log_prob(value)
    other = copier(family)
    assert torch.equal(call(other, needs_input, x).log_prob(value), before)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(call(family, needs_input, x).log_prob(value), before)


@families
def test_expanded_distributions_score_as_before(name):
    family, needs_input, x = setup(name)
    fn = call(family, needs_input, x)
    batch = (5, *((6,) if needs_input else ()))
    expanded = fn.expand(batch)
    assert expanded.batch_shape == batch
    assert expanded.event_shape == fn.event_shape
    value = draw(fn)
    log_prob = fn.log_prob(value)
    torch.testing.assert_close(expanded.log_prob(value.expand(*batch, *fn.event_shape)), log_prob.expand(batch))
    assert expanded.sample((2,)).shape == (2, *batch, *fn.event_shape)


@families
def test_double_precision_agrees_with_single(name):
    family, needs_input, x = setup(name)
    double = copy.deepcopy(family).double()
    value = draw(call(family, needs_input, x))
    fine = call(double, needs_input, x.double())
    log_prob = fine.log_prob(value.double())
    assert log_prob.dtype == torch.float64
    assert fine.sample().dtype in (torch.float64, torch.int64)
    if name == "Delta":  # whose density is that of one point
        torch.testing.assert_close(value.double(), fine.sample(), rtol=1e-5, atol=1e-5)
        return
    torch.testing.assert_close(call(family, needs_input, x).log_prob(value).double(), log_prob, rtol=1e-4, atol=1e-4)


@families
def test_shapes_and_gradients(name):
    """A log-probability for each row, whose gradient reaches every parameter."""
    family, needs_input, x = setup(name)
    fn = call(family, needs_input, x)
    value = fn.rsample() if name == "Delta" else draw(fn)
    log_prob = fn.log_prob(value)
    assert log_prob.shape == ((6,) if needs_input else ())
    assert torch.isfinite(log_prob).all()
    if not list(family.parameters()):
        return
    (value if name == "Delta" else log_prob).sum().backward()
    unreached = [n for n, p in family.named_parameters() if p.requires_grad and p.grad is None]
    assert unreached == []


@families
def test_particles_and_plates_are_batch(name):
    """Rows under two more dimensions are the rows alone."""
    family, needs_input, x = setup(name)
    if not needs_input:
        return
    many = x.expand(2, 3, 6, 3)
    fn, whole = family(x), family(many)
    assert whole.batch_shape == (2, 3, 6)
    value = draw(fn)
    torch.testing.assert_close(
        whole.log_prob(value.expand(2, 3, *value.shape)), fn.log_prob(value).expand(2, 3, 6), rtol=1e-4, atol=1e-5
    )
