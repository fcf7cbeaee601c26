"""A distribution whose parameters change in place is the distribution of the new ones; and copies of distributions."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import AffineTransform, affine_autoregressive, conditional_affine_autoregressive
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae.distributions import (
    ConditionalFlow,
    ConditionalLowRankMultivariateNormal,
    ConditionalMultivariateNormal,
    ConditionalNormal,
    ConditionalPoisson,
    ConditionalProduct,
    GaussianMixture,
    MultivariateNormal,
    ObservedPart,
    StandardNormal,
    VampPrior,
)
from pyro_vae.distributions.gaussians import LowRankMultivariateNormal
from pyro_vae.distributions.univariate import Beta, NegativeBinomial, Poisson, StudentT
from pyro_vae.networks import MLP

D = 3
same = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731


def triangle(*batch):
    return torch.eye(D).expand(*batch, D, D).clone() * 0.7 + 0.3 * torch.randn(*batch, D, D).tril(-1)


def move(name, tensor):
    """A change in place to another parameter that is valid as well."""
    with torch.no_grad():
        if name in ("scale", "diag", "scale_tril"):
            tensor.mul_(3.0)
            if name == "scale_tril":
                tensor[..., 2, 0] += 1.5
        elif name == "lower":
            tensor[..., 1, 0] += 2.0
        else:
            tensor.add_(5.0)


def agree(ours, theirs, value):
    same(ours.log_prob(value), theirs.log_prob(value))
    same(ours.entropy(), theirs.entropy())
    for name in ("mean", "variance", "covariance_matrix", "scale_tril", "precision_matrix"):
        same(getattr(ours, name), getattr(theirs, name))
    fixed = dist.MultivariateNormal(torch.zeros(D), torch.eye(D))
    same(kl_divergence(ours, fixed), kl_divergence(theirs, fixed))
    same(kl_divergence(fixed, ours), kl_divergence(fixed, theirs))


def test_a_draw_is_not_scored_from_where_the_mean_was():
    loc = torch.zeros(2)
    q = MultivariateNormal(loc, torch.eye(2))
    value = torch.tensor([0.5, -0.5])
    z = q.rsample()
    before = q.log_prob(z)
    loc.add_(5.0)
    same(q.log_prob(z), dist.MultivariateNormal(loc, torch.eye(2)).log_prob(z))
    assert q.log_prob(z) < before - 10
    same(q.log_prob(value), dist.MultivariateNormal(loc, torch.eye(2)).log_prob(value))


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("draw", ["rsample", "sample"])
@pytest.mark.parametrize("name", ["loc", "scale_tril", "scale", "lower", "through a view", "by an optimizer"])
def test_full_covariance(name, draw, expanded):
    loc, tril = torch.randn(4, D), triangle(4)
    parts = {"loc": loc, "scale_tril": tril, "scale": torch.rand(4, D) + 0.5, "lower": torch.randn(4, D, D).tril(-1)}
    apart = name in ("scale", "lower")
    q = MultivariateNormal(loc, **({n: parts[n] for n in ("scale", "lower")} if apart else {"scale_tril": tril}))
    q = q.expand((2, 4)) if expanded else q
    z = getattr(q, draw)((5,))
    q.covariance_matrix, q.scale_tril, q.precision_matrix  # noqa: B018
    if name == "through a view":
        loc.view(-1)[0] += 4.0
    elif name == "by an optimizer":
        leaf = loc.requires_grad_()
        leaf.grad = torch.ones_like(leaf)
        torch.optim.SGD([leaf], lr=3.0).step()
        loc.requires_grad_(False)
    else:
        move(name, parts[name])
    new = parts["scale"].unsqueeze(-1) * (torch.eye(D) + parts["lower"]) if apart else tril
    agree(q, dist.MultivariateNormal(loc, scale_tril=new).expand(q.batch_shape), z)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("name", ["loc", "factor", "diag"])
def test_low_rank(name, expanded):
    parts = {"loc": torch.randn(4, D), "factor": torch.randn(4, D, 2), "diag": torch.rand(4, D) + 0.5}
    q = LowRankMultivariateNormal(parts["loc"], parts["factor"], parts["diag"])
    q = q.expand((2, 4)) if expanded else q
    z = q.rsample((5,))
    q.log_prob(z), q.covariance_matrix, q.scale_tril, q.precision_matrix, q.variance
    move(name, parts[name])
    agree(q, dist.LowRankMultivariateNormal(*parts.values()).expand(q.batch_shape), z)


def test_what_was_kept_without_gradients_has_none():
    factor = torch.randn(D, 1, requires_grad=True)
    q = LowRankMultivariateNormal(torch.zeros(D), factor, torch.ones(D))
    with torch.no_grad():
        q.log_prob(torch.ones(D))
    (gradient,) = torch.autograd.grad(q.log_prob(torch.ones(D)), factor)
    fresh = dist.LowRankMultivariateNormal(torch.zeros(D), factor, torch.ones(D))
    same(gradient, torch.autograd.grad(fresh.log_prob(torch.ones(D)), factor)[0])


@pytest.mark.parametrize("name", ["weights", "last", "base", "affine", "context"])
def test_flows(name):
    loc, shift, context = torch.zeros(D), torch.zeros(D), torch.randn(4, 2)
    conditional = name == "context"
    layer = conditional_affine_autoregressive(D, 2, [8]) if conditional else affine_autoregressive(D, [8])
    base = dist.Normal(loc, torch.ones(D)).to_event(1)
    transforms = [layer, AffineTransform(shift, 2.0, event_dim=1)][:: -1 if name == "last" else 1]
    flow = ConditionalFlow(base, transforms, network=nn.Linear(2, 2) if conditional else None)
    q = flow(context) if conditional else flow()
    z = q.rsample(() if conditional else (5,))
    before = q.log_prob(z)
    with torch.no_grad():
        changed = {"base": [loc], "affine": [shift]}.get(name, list(layer.parameters()))
        for tensor in changed:
            tensor.add_(0.5)
    fresh = (flow(context) if conditional else flow()).log_prob(z.detach().clone())
    assert (before - fresh).abs().min() > 1e-3
    same(q.log_prob(z), fresh)


def test_negative_binomial_follows_its_parameters():
    count, mean = torch.tensor(4.0), torch.tensor(3.0)
    p = NegativeBinomial(count, mean)
    p.sample((3,)), p.probs, p.logits, p.variance, p.mode
    mean.mul_(100)
    count.mul_(2)
    fresh = NegativeBinomial(8.0, 300.0)
    for name in ("mean", "variance", "probs", "logits", "mode"):
        same(getattr(p, name), getattr(fresh, name))
    assert (p.sample((1000,)).mean() - 300).abs() < 5 * (fresh.variance / 1000).sqrt()


@pytest.mark.parametrize("make", [lambda: MultivariateNormal(torch.zeros(D), triangle()), lambda: low_rank()])
def test_under_inference_mode(make):
    """Where torch does not count changes, nothing is remembered."""
    with torch.inference_mode():
        q = make()
        z = q.rsample((4,))
        theirs = dist.MultivariateNormal(q.mean, covariance_matrix=q.covariance_matrix)
        same(q.log_prob(z), theirs.log_prob(z))


def test_flows_under_inference_mode():
    flow = ConditionalFlow(StandardNormal(D), [AffineTransform(1.0, 2.0)])
    with torch.inference_mode():
        q = flow()
        z = q.rsample((4,))
        same(q.log_prob(z), dist.Normal(torch.ones(D), 2.0).to_event(1).log_prob(z))


def low_rank():
    return LowRankMultivariateNormal(torch.zeros(D), torch.randn(D, 1), torch.ones(D))


# -- copies -----------------------------------------------------------------------------------------------------------


def posterior():
    return ConditionalNormal(MLP(4, [4]), D)


CALLED = {
    "gaussian mixture": lambda: GaussianMixture(2, D)(),
    "vamp prior": lambda: VampPrior(posterior(), torch.rand(5, 4))(),
    "full covariance": lambda: ConditionalMultivariateNormal(MLP(4, [4]), D)(torch.randn(2, 4)),
    "low rank": lambda: ConditionalLowRankMultivariateNormal(MLP(4, [4]), D, rank=1)(torch.randn(2, 4)),
    "flow": lambda: ConditionalFlow(GaussianMixture(2, D), [affine_autoregressive(D, [8])])(),
    "product": lambda: ConditionalProduct(ConditionalPoisson(None, 1), ConditionalPoisson(None, D - 1))(),
    "observed part": lambda: ObservedPart(ConditionalPoisson(None, D))(),
    "poisson": lambda: Poisson(torch.rand(D, requires_grad=True).exp()).to_event(1),
    "negative binomial": lambda: NegativeBinomial(torch.rand(D, requires_grad=True).exp(), 1.0).to_event(1),
    "student t": lambda: StudentT(torch.rand(D, requires_grad=True).exp(), 1.0).to_event(1),
    "beta": lambda: Beta(torch.rand(D, requires_grad=True).exp(), 1.0).to_event(1),
}


@pytest.mark.parametrize("name", CALLED)
@pytest.mark.parametrize("by", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["deepcopy", "pickle"])
def test_copies_of_distributions(name, by):
    """Of distributions that came from weights, and were drawn from: the same density, on tensors of its own."""
    p = CALLED[name]()
    x = p.sample()
    expected = p.log_prob(x)
    new = by(p)
    same(new.log_prob(x.clone()).detach(), expected.detach())
    assert type(new) is type(p)
    assert new.sample().shape == x.shape
    assert new.log_prob(x.clone()).shape == expected.shape


@pytest.mark.parametrize("by", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_prior_that_was_called_has_weights_of_its_own(by):
    prior = GaussianMixture(2, D)
    x = prior().sample()
    prior().log_prob(x).backward()
    new = by(prior)
    same(new().log_prob(x), prior().log_prob(x))
    with torch.no_grad():
        prior.loc.add_(5.0)
    assert (new().log_prob(x) - prior().log_prob(x)).abs() > 1e-3


def test_a_copy_shares_what_the_original_shares():
    scale = torch.rand(D, requires_grad=True).exp()
    pair = [dist.Normal(torch.zeros(D), scale), StudentT(scale, 0.0, scale)]
    with pytest.raises(RuntimeError, match="deepcopy"):  # as Pyro has it
        copy.deepcopy(pair[0])
    new = copy.deepcopy(pair[1])
    assert not new.scale.requires_grad
    assert new.scale.data_ptr() != scale.data_ptr()
