"""Flows, low rank, priors and the variance of a decoder, against quadrature and closed forms."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import (
    affine_autoregressive,
    affine_coupling,
    batchnorm,
    conditional_affine_autoregressive,
    matrix_exponential,
    planar,
    spline_coupling,
)
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import nn
from torch.distributions import ComposeTransform, kl_divergence
from truths import linear_vae

from pyro_vae import VAE, fit, importance_sampling
from pyro_vae.distributions import (
    ConditionalBernoulli,
    ConditionalFlow,
    ConditionalLowRankMultivariateNormal,
    ConditionalMultivariateNormal,
    ConditionalNormal,
    ConditionalOneHotCategorical,
    GaussianMixture,
    LearnedScale,
    StandardNormal,
    VampPrior,
)
from pyro_vae.networks import MLP

zuko = pytest.importorskip("zuko")

FLOWS = {
    "inverse autoregressive": lambda: [affine_autoregressive(2, [16])],
    "masked autoregressive": lambda: [affine_autoregressive(2, [16]).inv],
    "conditional": lambda: [conditional_affine_autoregressive(2, 3, [16])],
    "spline": lambda: [spline_coupling(2, hidden_dims=[16])],
    "Zuko's": lambda: [zuko.flows.MaskedAutoregressiveTransform(2, 3, hidden_features=[16])],
    "Zuko's, inverse": lambda: [zuko.flows.MaskedAutoregressiveTransform(2, 3, hidden_features=[16]).inv],
    "a chain": lambda: [affine_autoregressive(2, [8]), spline_coupling(2, hidden_dims=[8])],
}


@pytest.mark.parametrize("name", FLOWS)
def test_flows_are_densities(name):
    flow = ConditionalFlow(ConditionalNormal(MLP(4, [8]), 2), FLOWS[name](), network=MLP(4, [3]))
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    q = flow(torch.randn(3, 4))
    assert (q.batch_shape, q.event_shape) == ((3,), (2,))
    assert q.support.check(torch.zeros(3, 2)).all()
    z = q.rsample((5,))
    assert z.requires_grad
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()), atol=1e-4, rtol=1e-4)  # noise against inversion
    torch.testing.assert_close(q.expand((6, 3)).log_prob(z[0]), q.log_prob(z[0].clone()).expand(6, 3))
    # the Jacobian by differentiation
    noise = q.base_dist.rsample().detach()

    def forward(row):
        rows = noise.clone()
        rows[1] = row
        for transform in q.transforms:
            rows = transform(rows)
        return rows[1]

    jacobian = torch.autograd.functional.jacobian(forward, noise[1])
    expected = q.base_dist.log_prob(noise)[1] - jacobian.det().abs().log()
    z = noise
    for transform in q.transforms:
        z = transform(z)
    assert q.log_prob(z)[1].item() == pytest.approx(expected.item(), abs=1e-3)
    assert q.log_prob(torch.zeros(50, 1, 2)).shape == (50, 3)
    assert any(key.startswith("transforms_modules.") for key in flow.state_dict())


def test_the_weights_of_a_flow_are_saved_and_moved():
    """Those of an inverse and of a composition too, which are no modules."""
    first, second, third = (affine_autoregressive(2, [4]) for _ in range(3))
    flow = ConditionalFlow(StandardNormal(2), [first, ComposeTransform([second.inv, third]).inv])
    expected = {id(p) for t in (first, second, third) for p in t.parameters()}
    assert {id(p) for p in flow.parameters()} == expected
    flow.double()
    assert {p.dtype for t in (first, second, third) for p in t.parameters()} == {torch.float64}


def banana():
    """One observation of x = z₂ − z₁² + noise, and the grid that integrates its posterior."""
    axis = torch.linspace(-6, 6, 601)
    grid = torch.cartesian_prod(axis, axis)
    log_joint = dist.Normal(0.0, 1.0).log_prob(grid).sum(-1)
    log_joint += dist.Normal(grid[:, 1] - grid[:, 0] ** 2, 0.3).log_prob(torch.tensor(-1.0))
    log_p = log_joint.logsumexp(0) + 2 * math.log(12 / 600)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 1] - z[..., 0] ** 2, 0.3), obs=x)

    return model, log_p


def test_a_flow_bends_where_a_gaussian_cannot():
    """KL(q‖p(z|x)) = log p(x) − ELBO; the best Gaussian's is found by fitting one in the same way."""
    model, log_p = banana()
    x = torch.full((1,), -1.0)
    kl = {}
    for name, q in {
        "gaussian": ConditionalMultivariateNormal(None, 2),
        "low rank": ConditionalLowRankMultivariateNormal(None, 2, rank=1),
        "flow": ConditionalFlow(StandardNormal(2), [affine_autoregressive(2, [32]) for _ in range(2)]),
    }.items():

        def guide(x, q=q, name=name):
            pyro.module(name, q)
            with pyro.plate("data", len(x)):
                pyro.sample("z", q().expand((len(x),)))

        elbo = Trace_ELBO(num_particles=64, vectorize_particles=True)
        options = {"num_epochs": 300, "learning_rate": 0.02, "compile": False, "seed": 0, "progress": False}
        if name == "flow":  # permuted, so that either dimension may bend the other
            q.transforms.insert(1, dist.transforms.Permute(torch.tensor([1, 0])))
        decay = lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, 300)  # noqa: E731
        fit(model, guide, x, loss=elbo, scheduler=decay, **options)
        bound = -Trace_ELBO(num_particles=20000, vectorize_particles=True).loss(model, guide, x)
        kl[name] = log_p.item() - bound
    assert all(value > -0.02 for value in kl.values())
    assert abs(kl["low rank"] - kl["gaussian"]) < 0.05  # diagonal plus rank one is full in two dimensions
    assert kl["flow"] < 0.5 * kl["gaussian"]


def test_low_rank_is_what_it_says():
    q = ConditionalLowRankMultivariateNormal(MLP(3, [4]), 5, rank=2)
    with torch.no_grad():
        q.head.weight.normal_(std=0.3)
    low, p = q(torch.randn(7, 3)), dist.Normal(torch.ones(5), 0.7).to_event(1)
    full = dist.MultivariateNormal(low.loc, low.cov_factor @ low.cov_factor.mT + torch.diag_embed(low.cov_diag))
    z = torch.randn(7, 5)
    torch.testing.assert_close(low.log_prob(z), full.log_prob(z), rtol=1e-4, atol=1e-4)
    normal = dist.MultivariateNormal(torch.ones(5), 0.49 * torch.eye(5))
    torch.testing.assert_close(kl_divergence(low, p), kl_divergence(full, normal), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        kl_divergence(p.expand((7,)), low), kl_divergence(normal.expand((7,)), full), rtol=1e-4, atol=1e-4
    )


def test_mixtures_as_priors():
    x = torch.bernoulli(torch.full((6, 3), 0.5))
    posterior = ConditionalMultivariateNormal(MLP(3, [8]), 2)
    nn.init.normal_(posterior.head.weight, std=0.5)
    prior = VampPrior(posterior, torch.rand(5, 3) * 3 - 1, limits=(0.0, 1.0))
    z = torch.randn(20, 2)
    components = posterior(prior.pseudo_inputs.clamp(0, 1))
    by_hand = torch.stack([components.log_prob(row) for row in z]).logsumexp(1) - math.log(5)
    torch.testing.assert_close(prior().log_prob(z), by_hand)
    assert not any(name.startswith("posterior") for name in prior.state_dict())
    vae = VAE(prior, ConditionalBernoulli(MLP(2, [8]), 3), posterior)
    before = [p.detach().clone() for p in (prior.pseudo_inputs, posterior.head.weight)]
    SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x)
    for p, old in zip((prior.pseudo_inputs, posterior.head.weight), before, strict=True):
        assert not torch.equal(p, old)
    mixture = GaussianMixture(4, (2,))
    by_hand = torch.stack(
        [mixture.logits.log_softmax(0)[k] + dist.Normal(mixture.loc[k], 1.0).log_prob(z).sum(-1) for k in range(4)]
    ).logsumexp(0)
    torch.testing.assert_close(mixture().log_prob(z), by_hand, rtol=1e-4, atol=1e-4)
    # log p(x) with a mixture as prior, by quadrature
    vae = VAE(mixture, ConditionalBernoulli(MLP(2, [8]), 3), ConditionalNormal(MLP(3, [8]), 2), name="mixture")
    axis = torch.linspace(-9, 9, 301)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_joint = vae.likelihood(grid).expand((6, len(grid))).log_prob(x.unsqueeze(1)) + mixture().log_prob(grid)
    exact = log_joint.logsumexp(1) + 2 * math.log(18 / 300)
    found = importance_sampling(vae.model, vae.guide, x, num_particles=20000, progress=False)
    assert ((found.log_evidence - exact).abs() < 4.5 * found.standard_error + 1e-3).all()


def em(x, weight, prior, steps):
    for _ in range(steps):
        log_p = x @ weight.clamp(1e-6, 1 - 1e-6).log().T + (1 - x) @ (1 - weight).clamp(1e-6).log().T + prior.log()
        r = (log_p - log_p.logsumexp(1, keepdim=True)).exp()
        weight, prior = (r.T @ x) / r.sum(0).unsqueeze(1), r.mean(0)
    return log_p.logsumexp(1).mean().item()


def test_a_known_code_is_a_mixture():
    """A one-hot code, summed out: the likelihood that EM reaches from the same place, and exact evidence."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(3, 10, generator=generator).round() * 0.8 + 0.1
    x = torch.bernoulli(truth[torch.randint(3, (600,), generator=generator)], generator=generator)
    vae = VAE(
        ConditionalOneHotCategorical(None, 3),
        ConditionalBernoulli(MLP(3, []), 10),
        ConditionalOneHotCategorical(MLP(10, []), 3),
    )
    with torch.no_grad():
        vae.likelihood.head.weight.copy_((truth.logit() * 0.3).T + 0.1 * torch.randn(10, 3, generator=generator))
    start = vae.likelihood(torch.eye(3)).mean.detach()
    best = em(x, start, torch.full((3,), 1 / 3), 200)
    model, guide = config_enumerate(vae.model), config_enumerate(vae.guide)
    result = fit(
        model,
        guide,
        x,
        num_epochs=150,
        batch_size=600,
        learning_rate=0.1,
        progress=False,
        seed=0,
        loss=TraceEnum_ELBO(max_plate_nesting=1),
        scheduler=lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, 150),
    )
    with torch.no_grad():
        codes = torch.eye(3)
        exact = (
            vae.likelihood(codes).expand((600, 3)).log_prob(x.unsqueeze(1)) + vae.prior().log_prob(codes)
        ).logsumexp(1)
    assert exact.mean().item() == pytest.approx(best, abs=2e-3)
    assert -result.loss[-1] == pytest.approx(best, abs=0.01)  # the exact posterior is linear in x
    found = importance_sampling(model, guide, x, num_particles=2, progress=False)
    torch.testing.assert_close(found.log_evidence.float(), exact, rtol=1e-4, atol=1e-4)


def test_a_scale_that_depends_on_z_is_recovered():
    z = torch.rand(4000, 1) * 4 - 2
    scale = 0.2 + 0.8 * torch.sigmoid(3 * z)
    x = torch.cat([z.sin() + scale * torch.randn_like(z)], 1)
    likelihood = ConditionalNormal(MLP(1, [32]), 1)

    def model(x, z):
        pyro.module("likelihood", likelihood)
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood(z), obs=x)

    decay = lambda optim: torch.optim.lr_scheduler.CosineAnnealingLR(optim, 50)  # noqa: E731
    options = {"num_epochs": 50, "learning_rate": 0.02, "scheduler": decay, "progress": False, "seed": 0}
    fit(model, lambda x, z: None, (x, z), **options)
    at = torch.linspace(-1.8, 1.8, 20).unsqueeze(1)
    found = likelihood(at).variance.sqrt().detach()
    assert (found / (0.2 + 0.8 * torch.sigmoid(3 * at)) - 1).abs().max() < 0.15


def test_a_collapsed_scale_is_reported():
    z = torch.randn(200, 1)
    x = torch.cat([z, 2 * z, -z], 1)  # on a line: the density grows without end as σ shrinks
    vae = linear_vae(1, 3)
    vae.likelihood.scale = LearnedScale(init=2e-3)
    with torch.no_grad():
        vae.likelihood.head.weight.copy_(torch.tensor([[1.0], [2.0], [-1.0]]))
        vae.likelihood.head.bias.zero_()
        vae.posterior.head.weight[0] = torch.tensor([1.0, 0.0, 0.0])
    options = {"num_epochs": 1, "batch_size": 200, "learning_rate": 0.0, "progress": False}
    fit(vae.model, vae.guide, x, **options)
    vae.likelihood.scale = LearnedScale(init=5e-4)
    pyro.clear_param_store()
    with pytest.warns(UserWarning, match=r"the scale of site 'x' has collapsed: 100\.0% of it"):
        fit(vae.model, vae.guide, x, **options)
    for wrong in (lambda: LearnedScale(init=0.1, smallest=0.2), lambda: ConditionalNormal(MLP(1, []), 1, smallest=0.0)):
        with pytest.raises(ValueError, match="smallest"):
            wrong()


def test_a_draw_without_gradients_is_scored_with_them():
    flow = ConditionalFlow(ConditionalNormal(MLP(3, []), 2), [affine_autoregressive(2, [8])])
    q = flow(torch.randn(4, 3))
    (-q.log_prob(q.sample()).mean()).backward()
    assert all(p.grad is not None and p.grad.any() for p in flow.transforms_modules.parameters() if p.dim() == 2)


def test_flows_that_others_accept():
    """log|det| is a sum over what the transformation takes as an event."""
    for make in (lambda: matrix_exponential(2), lambda: batchnorm(2).eval(), lambda: affine_coupling(2, [8])):
        flow = ConditionalFlow(StandardNormal(2), [make()]).eval()
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.3 * torch.randn_like(p))
        q = flow()
        z = q.rsample((5,))
        torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()), atol=1e-4, rtol=1e-4)
        plain = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), q.transforms)
        torch.testing.assert_close(q.log_prob(z), plain.log_prob(z.clone()), atol=1e-4, rtol=1e-4)


def test_batch_norm_of_a_flow_is_frozen_in_evaluation():
    normaliser = batchnorm(2)
    vae = VAE(
        ConditionalFlow(StandardNormal(2), [normaliser]),
        ConditionalBernoulli(MLP(2, []), 3),
        ConditionalMultivariateNormal(MLP(3, []), 2),
    )
    x = torch.bernoulli(torch.full((50, 3), 0.5))
    Trace_ELBO().loss(vae.model, vae.guide, x)
    before = normaliser.moving_mean.clone()
    assert before.any()
    importance_sampling(vae.model, vae.guide, x, num_particles=20, progress=False)
    assert torch.equal(normaliser.moving_mean, before)


def test_a_flow_that_was_used_can_be_copied():
    flow = ConditionalFlow(ConditionalNormal(MLP(3, []), 2), [affine_autoregressive(2, [8]), spline_coupling(2)])
    x = torch.randn(4, 3)
    flow(x).rsample().sum()
    again = copy.deepcopy(flow)
    torch.manual_seed(0)
    z = flow(x).rsample()
    torch.manual_seed(0)
    torch.testing.assert_close(again(x).rsample(), z)


def test_what_cannot_be_inverted_says_so():
    q = ConditionalFlow(StandardNormal(2), [planar(2)])()
    assert q.log_prob(q.rsample()).isfinite()
    with pytest.raises(NotImplementedError, match="flow of Planar: one of them has no inverse"):
        q.log_prob(torch.zeros(2))
    with pytest.raises(ValueError, match="num_components: expected at least 1"):
        GaussianMixture(0, 2)
