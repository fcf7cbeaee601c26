"""Discrete latents summed out, global latents taken jointly: pairs that are more than one z in one plate."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro_pairs import SemiSupervised

from pyro_vae import (
    adaptive_importance_sampling,
    annealed_importance_sampling,
    draw_particles,
    fit,
    importance_sampling,
    prior_sampling,
    sandwich,
)


def annealed(*args, **options):
    """With fewer temperatures than by default: these posteriors are near."""
    return annealed_importance_sampling(*args, **{"num_temperatures": 20, "num_particles": 64} | options)


ESTIMATORS = [importance_sampling, adaptive_importance_sampling, annealed]


@pytest.fixture
def semi_supervised():
    torch.manual_seed(0)
    net = SemiSupervised(pixels=9, classes=3, hidden=16)
    with torch.no_grad():
        net.decoder[-1].weight.mul_(3)  # so that z and y matter
    x = torch.bernoulli(torch.full((7, 9), 0.5))
    return net, x


@pytest.mark.parametrize("enumerate_guide", [None, "parallel", "expanded", "sequential"])
def test_semi_supervised_vae_goes_through_importance_sampling(semi_supervised, enumerate_guide):
    net, x = semi_supervised
    guide = net.guide
    if enumerate_guide is not None:
        kind = "sequential" if enumerate_guide == "sequential" else "parallel"
        guide = config_enumerate(guide, kind, expand=enumerate_guide == "expanded")
    evidence = importance_sampling(net.model, guide, x, num_particles=20_000)
    z = (evidence.log_evidence - net.log_joint(x).logsumexp(-1)) / evidence.standard_error
    assert 0.3 < z.abs().max() < 5


def test_summing_out_a_label_has_less_variance_than_drawing_it(semi_supervised):
    net, x = semi_supervised
    drawn = importance_sampling(net.model, net.guide, x)
    summed = importance_sampling(net.model, config_enumerate(net.guide), x)
    assert (summed.standard_error < 0.8 * drawn.standard_error).all()


@pytest.mark.parametrize("estimator", [adaptive_importance_sampling, annealed])
@pytest.mark.parametrize("where", ["guide", "model", "both"])
def test_gradient_methods_sum_out_the_label(semi_supervised, estimator, where):
    net, x = semi_supervised
    model, guide = net.model, net.guide
    if where != "guide":
        model = config_enumerate(model)
    if where == "model":  # a guide of z alone
        guide = poutine.block(lambda x: net.guide(x, torch.eye(3)[[0] * len(x)]), hide=["y"])
    else:
        guide = config_enumerate(guide)
    evidence = estimator(model, guide, x)
    z = (evidence.log_evidence - net.log_joint(x).logsumexp(-1)) / evidence.standard_error
    assert 0.3 < z.abs().max() < 5


def test_given_labels_give_the_joint(semi_supervised):
    net, x = semi_supervised
    y = torch.eye(3)[torch.arange(7) % 3]
    evidence = importance_sampling(net.model, net.guide, x, y)
    exact = net.log_joint(x)[torch.arange(7), torch.arange(7) % 3]
    assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error).all()


def test_sandwich_of_a_model_with_an_enumerated_label(semi_supervised):
    net, x = semi_supervised
    result = sandwich(net.model, config_enumerate(net.guide), x.repeat(10, 1), estimator=importance_sampling)
    assert abs(result.mean[0]) < 5 * result.mean[1] + 1e-3


def test_fit_of_a_plate_without_a_size(semi_supervised):
    """Its loss is per row, though the plate says that it has −1 of them."""
    net, x = semi_supervised
    x = x.repeat(20, 1)
    guide = config_enumerate(net.guide)
    result = fit(net.model, guide, x, num_epochs=15, learning_rate=0.01, loss=TraceEnum_ELBO(max_plate_nesting=1))
    exact = -net.log_joint(x[:7]).logsumexp(-1).mean().item()
    assert exact - 0.1 < result.loss[-1] < exact + 3
    assert result.loss[-1] < result.loss[0]


def test_discrete_latents_that_are_not_marked_are_refused_where_gradients_are_needed(semi_supervised):
    net, x = semi_supervised
    with pytest.raises(ValueError, match=r"site 'y' is discrete.*Try pyro.infer.config_enumerate"):
        adaptive_importance_sampling(net.model, net.guide, x)


# -- sums over plates -------------------------------------------------------------------------------------------------


def nested(x):
    """Each row: y ~ Bernoulli; each of its columns: c ~ Bernoulli(y), x ~ N(2 c + y, 1). All of it summed out."""
    with pyro.plate("data", len(x), dim=-2):
        y = pyro.sample("y", dist.Bernoulli(0.3))
        with pyro.plate("columns", x.shape[1], dim=-1):
            c = pyro.sample("c", dist.Bernoulli(0.2 + 0.5 * y))
            pyro.sample("x", dist.Normal(2 * c + y, 1.0), obs=x)


def nested_log_evidence(x):
    total = []
    for y in (0.0, 1.0):
        p = 0.2 + 0.5 * y
        columns = [math.log(p if c else 1 - p) + dist.Normal(2 * c + y, 1.0).log_prob(x.double()) for c in (0.0, 1.0)]
        total.append(torch.stack(columns).logsumexp(0).sum(-1) + math.log(0.3 if y else 0.7))
    return torch.stack(total).logsumexp(0)


@pytest.mark.parametrize("kind", ["model alone", "guide of both", "guide of y"])
def test_a_discrete_latent_inside_an_inner_plate_is_summed_there(kind):
    x = torch.randn(6, 4) + 1

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            y = pyro.sample("y", dist.Bernoulli(torch.full((len(x), 1), 0.5)))
            if kind == "guide of both":
                with pyro.plate("columns", x.shape[1], dim=-1):
                    pyro.sample("c", dist.Bernoulli(0.4 + 0.1 * y))

    guide = (lambda x: None) if kind == "model alone" else config_enumerate(guide)
    evidence = importance_sampling(config_enumerate(nested), guide, x, num_particles=3, chunk_size=4)
    torch.testing.assert_close(evidence.log_evidence, nested_log_evidence(x), atol=1e-5, rtol=0)
    assert (evidence.standard_error < 1e-3).all()


def test_prior_sampling_sums_out_what_the_model_marks():
    x = torch.randn(6, 4) + 1
    evidence = prior_sampling(config_enumerate(nested), None, x, num_particles=2)
    torch.testing.assert_close(evidence.log_evidence, nested_log_evidence(x), atol=1e-5, rtol=0)


def test_a_latent_whose_prior_depends_on_a_summed_one():
    """y ~ Bernoulli, z ~ N(4 y, 1), x ~ N(z, 1): z is replayed, y is not."""

    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(4 * y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 1, 1.5))

    x = torch.linspace(-3, 7, 9)
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.7, 0.3])), dist.Normal(torch.tensor([0.0, 4.0]), 2**0.5)
    )
    particles = draw_particles(model, guide, x, num_particles=2)
    prior = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.7, 0.3])), dist.Normal(torch.tensor([0.0, 4.0]), 1.0)
    )
    torch.testing.assert_close(particles.log_prior, prior.log_prob(particles.latents["z"]))
    for estimator in ESTIMATORS:
        evidence = estimator(model, guide, x)
        assert ((evidence.log_evidence - mixture.log_prob(x)).abs() < 5 * evidence.standard_error).all()


def test_a_hidden_markov_model_is_summed_by_the_forward_algorithm():
    steps, transition = 6, torch.rand(3, 3).softmax(-1)
    loc = torch.tensor([-1.0, 0.0, 2.0])

    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            state = 0
            for t in pyro.markov(range(steps)):
                state = pyro.sample(f"state_{t}", dist.Categorical(transition[state]))
                pyro.sample(f"x_{t}", dist.Normal(loc[state], 1.0), obs=x[:, t])

    x = torch.randn(5, steps)
    forward = transition[0].log() + dist.Normal(loc, 1.0).log_prob(x[:, 0, None])
    for t in range(1, steps):
        forward = (forward.unsqueeze(-1) + transition.log()).logsumexp(1)
        forward = forward + dist.Normal(loc, 1.0).log_prob(x[:, t, None])
    evidence = importance_sampling(model, lambda x: None, x, num_particles=2)
    torch.testing.assert_close(evidence.log_evidence.float(), forward.logsumexp(-1), atol=1e-4, rtol=0)


def test_a_global_latent_and_labels_summed_inside_the_plate():
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(m + 3 * y, 1.0), obs=x)

    x = torch.randn(6)
    m = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    rows = torch.stack(
        [dist.Normal(m[:, None] + 3 * y, 1.0).log_prob(x) + math.log(p) for y, p in ((0, 0.7), (1, 0.3))]
    )
    exact = (rows.logsumexp(0).sum(-1) + dist.Normal(0.0, 1.0).log_prob(m)).logsumexp(0) + math.log(16 / 4000)
    for estimator in ESTIMATORS:
        evidence = estimator(model, lambda x: pyro.sample("m", dist.Normal(0.0, 0.7)), x, plate=None)
        assert (evidence.log_evidence - exact).abs() < 5 * evidence.standard_error


def test_a_masked_row_still_sums_to_one():
    x, mask = torch.randn(5), torch.tensor([True, False, True, False, True])

    @config_enumerate
    def model(x, mask):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            pyro.sample("x", dist.Normal(y.to(x.dtype), 1.0), obs=x)

    evidence = importance_sampling(model, lambda x, mask: None, x, mask, num_particles=2)
    shares, locs = dist.Categorical(torch.tensor([0.2, 0.3, 0.5])), dist.Normal(torch.arange(3.0), 1.0)
    exact = torch.where(mask, dist.MixtureSameFamily(shares, locs).log_prob(x), 0.0)
    torch.testing.assert_close(evidence.log_evidence.float(), exact, atol=1e-5, rtol=0)


# -- CEVAE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["bernoulli", "normal"])
def test_cevae_of_pyro_goes_through_every_estimator(outcome):
    """Its model and guide, unchanged: the estimators agree with each other, and a sandwich closes around log p."""
    from pyro.contrib.cevae import CEVAE

    cevae = CEVAE(feature_dim=5, outcome_dist=outcome, latent_dim=2, hidden_dim=8, num_layers=2)
    x, t, y = torch.randn(30, 5), torch.bernoulli(torch.full((30,), 0.5)), torch.bernoulli(torch.full((30,), 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cevae.fit(x, t, y, num_epochs=3, batch_size=10, log_every=0)
    first, *others = (f(cevae.model, cevae.guide, x, t, y) for f in ESTIMATORS)
    for other in others:
        error = (first.standard_error.square() + other.standard_error.square()).sqrt()
        assert ((first.log_evidence - other.log_evidence).abs() < 5 * error)[~first.doubtful].all()
    gap, error = sandwich(cevae.model, cevae.guide, x.repeat(5, 1), t.repeat(5), y.repeat(5), num_temperatures=12).mean
    assert abs(gap) < 4 * error + 0.02


# -- all data as one point --------------------------------------------------------------------------------------------


def global_mean(x):
    """m ~ N(0, 1), z_n ~ N(m, 1), x_n ~ N(z_n, 1): x ~ N(0, 2 I + 1 1ᵀ), jointly."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def global_guide(x):
    m = pyro.sample("m", dist.Normal(x.mean() * len(x) / (len(x) + 2), 1.1 * math.sqrt(2 / (len(x) + 2))))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x + m) / 2, math.sqrt(0.5)))


def joint_log_evidence(x):
    return dist.MultivariateNormal(torch.zeros(len(x)), 2 * torch.eye(len(x)) + 1).log_prob(x).double()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_joint_evidence_with_a_global_latent(estimator):
    x = torch.randn(8) + 1
    evidence = estimator(global_mean, global_guide, x, plate=None)
    assert evidence.log_evidence.shape == (1,)
    assert (evidence.log_evidence - joint_log_evidence(x)).abs().item() < 5 * evidence.standard_error.item() + 1e-4
    particles = draw_particles(global_mean, global_guide, x, num_particles=3, plate=None)
    assert particles.latents["m"].shape == (3, 1)
    assert particles.latents["z"].shape == (3, 1, 8)


def test_joint_evidence_with_autoguides():
    x = torch.randn(8) + 1
    for make, options in ((AutoNormal, {}), (AutoMultivariateNormal, {"init_scale": 0.5})):
        guide = make(global_mean, **options)
        guide(x)
        svi = SVI(
            global_mean, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(num_particles=8, vectorize_particles=True)
        )
        for _ in range(100):
            svi.step(x)
        for estimator in (importance_sampling, adaptive_importance_sampling):
            evidence = estimator(global_mean, guide, x, plate=None)
            assert (evidence.log_evidence - joint_log_evidence(x)).abs() < 5 * evidence.standard_error
        for start in ("guide", "adapted"):
            evidence = annealed(global_mean, guide, x, plate=None, start=start)
            assert (evidence.log_evidence - joint_log_evidence(x)).abs() < 5 * evidence.standard_error


def test_autoguides_with_a_latent_for_each_point():
    """They know their sizes after the first run, which is one on all rows, and cannot be cut into rows."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(9)
    evidence = importance_sampling(model, AutoNormal(model, init_scale=1.0), x)
    exact = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)
    assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error).all()
    with pytest.raises(ValueError, match=r"site 'z' of the guide is a point \(Delta\), which has no density"):
        importance_sampling(model, AutoDelta(model), x)


def test_per_point_evidence_with_a_latent_outside_says_what_to_do():
    with pytest.raises(ValueError, match=r"site 'm' of the guide is outside plate 'data'.*plate=None for the joint"):
        importance_sampling(global_mean, global_guide, torch.randn(8))


def test_joint_evidence_needs_all_data():
    def model(x):
        with pyro.plate("data", 100, subsample_size=8):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 100, subsample_size=8):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    with pytest.raises(ValueError, match="plate 'data' has 8 of 100 data points; the joint evidence"):
        importance_sampling(model, guide, torch.randn(8), plate=None)
