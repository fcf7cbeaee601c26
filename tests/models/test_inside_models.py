"""A VAE inside another model: its sites in the caller's plates, with the caller's prior for z."""

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from truths import LinearGaussian, exact_vae, small_vae

from pyro_vae import VAE, importance_sampling
from pyro_vae.distributions import ConditionalBernoulli, ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP


def binary(*shape):
    return torch.bernoulli(torch.full((*shape, 4, 4), 0.5))


# -- the caller's prior, against log p(x) -----------------------------------------------------------------------------

GROUPS = torch.tensor([[1.0, -1.0], [-0.5, 0.5], [0.0, 2.0]])
SLOPE = torch.tensor([[0.7, -0.3], [0.2, 0.4]])


def gaussians(truth, loc):
    """log N(x; W loc + b, W Wᵀ + s² I), for z ~ N(loc, I)."""
    weight = truth.weight.double()
    covariance = weight @ weight.T + truth.noise**2 * torch.eye(len(weight))
    return dist.MultivariateNormal(loc.double() @ weight.T + truth.bias, covariance)


def grouped(c):
    return dist.Normal(GROUPS[c], 1.0).to_event(1), GROUPS[c]


def regression(c):
    loc = nn.functional.one_hot(c, 3).float()[:, :2] @ SLOPE
    return dist.Normal(loc, 1.0).to_event(1), loc


@pytest.mark.parametrize("prior", [grouped, regression])
def test_evidence_under_the_callers_prior(prior):
    truth = LinearGaussian(2, 4)
    vae, c = exact_vae(truth, widen=1.3), torch.randint(3, (50,))
    x = gaussians(truth, prior(c)[1]).sample().float()

    def model(x, c):
        with pyro.plate("rows", len(x)):
            vae.sample_model(x, prior=prior(c)[0])

    def guide(x, c):
        with pyro.plate("rows", len(x)):
            vae.sample_guide(x)

    found = importance_sampling(model, guide, x, c, num_particles=4000, plate="rows")
    exact = gaussians(truth, prior(c)[1]).log_prob(x.double())
    z = (found.log_evidence - exact) / found.standard_error
    assert z.abs().max() < 5
    assert (truth.log_evidence(x) - exact).abs().max() > 0.5  # not that of the VAE's own prior


def test_evidence_under_a_mixture():
    truth = LinearGaussian(2, 4)
    vae = exact_vae(truth, widen=1.3)
    logits = torch.tensor([0.5, 0.0, -1.0])
    mixture = dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(GROUPS, 1.0).to_event(1))
    x = gaussians(truth, GROUPS[torch.randint(3, (50,))]).sample().float()

    def model(x):
        with pyro.plate("data", len(x)):
            return vae.sample_model(x, prior=mixture)

    found = importance_sampling(model, vae.guide, x, num_particles=4000)
    parts = gaussians(truth, GROUPS).log_prob(x.double()[:, None])
    exact = (parts + logits.double().log_softmax(0)).logsumexp(1)
    assert ((found.log_evidence - exact) / found.standard_error).abs().max() < 5
    assert model(x).shape == (50, 2)  # gives back z


# -- sites ------------------------------------------------------------------------------------------------------------


def test_names_of_sites():
    one, two, x = small_vae(), small_vae(), binary(5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = one.sample_model(x, prefix="one_")
            two.sample_model(x, prior=dist.Normal(z, 0.1).to_event(1), prefix="two_")

    def guide(x):
        with pyro.plate("data", len(x)):
            one.sample_guide(x, prefix="one_")
            two.sample_guide(x, prefix="two_")

    assert {"one_z", "one_x", "two_z", "two_x"} <= set(poutine.trace(model).get_trace(x).nodes)
    before = [p.clone() for vae in (one, two) for p in vae.parameters()]
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
    after = [p for vae in (one, two) for p in vae.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def scoped(x):
        with pyro.plate("data", len(x)):
            scope(one.sample_model, prefix="inner")(x)

    assert {"inner/z", "inner/x"} <= set(poutine.trace(scoped).get_trace(x).nodes)


def test_plates_within_plates_and_none():
    """Images in groups: the event shape of the likelihood tells rows from pixels."""
    vae, x = small_vae(), binary(3, 5)

    def model(x):
        with pyro.plate("groups", 3, dim=-2), pyro.plate("data", 5, dim=-1):
            vae.sample_model(x)

    def guide(x):
        with pyro.plate("groups", 3, dim=-2), pyro.plate("data", 5, dim=-1):
            vae.sample_guide(x)

    q = poutine.trace(guide).get_trace(x)
    p = poutine.trace(poutine.replay(model, q)).get_trace(x)
    flat = {"z": q.nodes["z"]["value"].flatten(0, 1)}
    expected = poutine.trace(poutine.condition(vae.model, flat)).get_trace(x.flatten(0, 1))
    torch.testing.assert_close(p.log_prob_sum(), expected.log_prob_sum())
    torch.testing.assert_close(q.nodes["z"]["fn"].mean, vae.encode(x.flatten(0, 1)).mean.reshape(3, 5, 2))
    single = poutine.trace(vae.sample_model).get_trace(x[0, 0])
    assert single.nodes["z"]["value"].shape == (2,)
    assert single.nodes["x"]["fn"].batch_shape == ()


def test_vectorized_particles_in_the_callers_plate():
    vae, x = small_vae(), binary(5)

    def model(x):
        with pyro.plate("data", len(x)):
            vae.sample_model(x)

    loss = Trace_ELBO(num_particles=500, vectorize_particles=True).loss(model, vae.guide, x)
    assert loss == pytest.approx(Trace_ELBO(num_particles=500).loss(vae.model, vae.guide, x), rel=0.05)


def test_without_x_it_draws_x():
    vae = small_vae()
    with pyro.plate("data", 7):
        trace = poutine.trace(vae.sample_model).get_trace()
    assert trace.nodes["x"]["value"].shape == (7, 4, 4)


def test_distributions_with_gradients():
    vae, x = small_vae(), binary(5)
    with poutine.trace(param_only=True) as params:
        q = vae.posterior_given(x)
        z = q.rsample()
        loss = -vae.likelihood_given(z).log_prob(x).sum() + q.log_prob(z).sum()
    loss.backward()
    assert all(p.grad is not None for p in vae.parameters())
    assert len(params.trace.param_nodes) == len(list(vae.parameters()))
    assert vae.likelihood_given(torch.zeros(3, 5, 2)).batch_shape == (3, 5)
    torch.testing.assert_close(vae.posterior_given(x).mean, vae.encode(x).mean)


def test_a_context_in_the_callers_plate():
    vae = VAE(
        StandardNormal(2),
        ConditionalBernoulli(MLP(2, [4], context_size=3), (4, 4)),
        ConditionalNormal(MLP((4, 4), [4], context_size=3), 2),
    )
    x, c = binary(5), torch.randn(5, 3)

    def model(x, c):
        with pyro.plate("data", len(x)):
            vae.sample_model(x, c)

    q = poutine.trace(vae.guide).get_trace(x, c)
    own = poutine.trace(poutine.replay(vae.model, q)).get_trace(x, c)
    inside = poutine.trace(poutine.replay(model, q)).get_trace(x, c)
    torch.testing.assert_close(inside.log_prob_sum(), own.log_prob_sum())


# -- mini-batches -----------------------------------------------------------------------------------------------------


def test_a_mini_batch_counts_for_all_data():
    vae, x = small_vae(), binary(20)
    q = poutine.trace(vae.guide).get_trace(x[:5], total=20)
    p = poutine.trace(poutine.replay(vae.model, q)).get_trace(x[:5], total=20)
    for trace, names in ((q, "z"), (p, "zx")):
        trace.compute_log_prob()
        for name in names:
            site = trace.nodes[name]
            torch.testing.assert_close(site["log_prob"], 4 * site["unscaled_log_prob"])
    pyro.set_rng_seed(1)
    whole = importance_sampling(vae.model, vae.guide, x, num_particles=10).log_evidence
    pyro.set_rng_seed(1)
    scaled = importance_sampling(vae.model, vae.guide, x, num_particles=10, total=200).log_evidence
    torch.testing.assert_close(scaled, whole)  # the evidence of a point has no scale
    with pytest.raises(ValueError, match=r"at least the 20 rows of this batch, got 5\. Try total=len\(data\)"):
        vae.model(x, total=5)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        (dist.Normal(torch.zeros(5, 2), 1.0), ValueError, r"prior: expected event shape \(2,\).*Try \.to_event\(1\)"),
        (StandardNormal(2), TypeError, r"prior: expected a distribution, got StandardNormal.*prior\(\) for a module"),
        (lambda: dist.Normal(0.0, 1.0), TypeError, r"prior: expected a distribution, got function"),
    ],
)
def test_priors_that_do_not_fit(prior, error, message):
    with pyro.plate("data", 5), pytest.raises(error, match=message):
        small_vae().sample_model(binary(5), prior=prior)


def test_contexts_with_another_number_of_rows():
    vae = VAE(
        StandardNormal(2),
        ConditionalBernoulli(MLP(2, [4], context_size=3), (4, 4)),
        ConditionalNormal(MLP((4, 4), [4], context_size=3), 2),
    )
    x, c = binary(5), torch.randn(8, 3)
    for where, call in {
        "model": lambda: vae.model(x, c),
        "guide": lambda: vae.guide(x, c),
        "encode": lambda: vae.encode(x, c),
        "generate": lambda: vae.generate(5, c),
        "reconstruct": lambda: vae.reconstruct(x, c),
        "similar": lambda: vae.similar(x, c, size=2),
    }.items():
        with pytest.raises(ValueError, match=rf"{where}: expected context with one row for each of the 5 rows, got 8"):
            call()
    with pytest.raises(ValueError, match=r"2 plates of x, .*got shape \(3,\) beside \(2, 5, 4, 4\)"):
        vae.sample_model(binary(2, 5), torch.randn(3))
