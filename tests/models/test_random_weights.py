"""Weights with priors, by `poutine.lift` and by `PyroSample`: one set for all rows, with the right posterior."""

import math

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from contract.families import ANY_SHAPE, VECTORS
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from truths import small_vae

from pyro_vae import VAE, CompiledELBO, fit, importance_sampling
from pyro_vae.distributions import (
    Broadcasting,
    Conditional,
    ConditionalBernoulli,
    ConditionalNormal,
    StandardNormal,
    VampPrior,
)
from pyro_vae.networks import MLP


def priors_of(part, role, scale=1.0):
    return {
        f"{role}.{name}": dist.Normal(0.0, scale).expand(w.shape).to_event(w.dim())
        for name, w in part.named_parameters()
    }


def binary(n):
    return torch.bernoulli(torch.full((n, 4, 4), 0.5))


# -- a linear decoder of known codes: Bayesian regression -------------------------------------------------------------


class Regression:
    """x_n ~ N(W z_n + b, s² I) with known z_n and w ~ N(0, τ²) for each weight: for columns of [z, 1] that are
    orthogonal the weights are independent, w_j | x ~ N(m_j, 1/λ_j), λ_j = Σ_n z_nj² / s² + 1/τ²."""

    rows, noise, spread = 24, 1.0, 0.3

    def __init__(self):
        codes = torch.randn(self.rows, 2, dtype=torch.float64)
        design = torch.linalg.qr(torch.cat([torch.ones(self.rows, 1), codes], 1)).Q * math.sqrt(self.rows)
        design[:, 1] *= 1.5
        weights = self.spread * torch.randn(3, 3).double()
        self.design = design[:, [1, 2, 0]] * design[:, :1].sign()  # two codes, and a column of ones for the bias
        self.x = (self.design @ weights.T + self.noise * torch.randn(self.rows, 3)).float()
        self.codes = self.design[:, :2].float()
        precision = self.design.square().sum(0) / self.noise**2 + 1 / self.spread**2
        self.mean = (self.x.double().T @ self.design / self.noise**2 / precision).float()  # (3, 3)
        self.scale = precision.rsqrt().float().expand(3, 3)

    def vae(self):
        return VAE(
            StandardNormal(2), ConditionalNormal(MLP(2, []), 3, scale=self.noise), ConditionalNormal(MLP(3, []), 2)
        )

    def learned(self, model, batch_size, steps=2000):
        """The means and scales that AutoNormal finds, (3, 3) each: weights and bias."""

        def conditioned(x, codes, total=None):
            return poutine.condition(model, {"z": codes})(x, total=total)

        guide = AutoNormal(poutine.block(conditioned, hide=["z", "x", "data"]), init_scale=0.1)
        optim = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.03 ** (1 / steps), "betas": (0.9, 0.99)})
        svi = SVI(conditioned, guide, optim, CompiledELBO(TraceMeanField_ELBO(num_particles=4), backend="eager"))
        averaged, kept = 0, steps // 2
        for step in range(steps):
            if not step * batch_size % self.rows:
                order = torch.randperm(self.rows)
            batch = order[step * batch_size % self.rows :][:batch_size]
            svi.step(self.x[batch], self.codes[batch], total=self.rows)
            if step >= steps - kept:  # the mean of the last half, as in Polyak's
                values = [torch.cat([v["weight"], v["bias"][:, None]], 1) for v in self.of(guide)]
                averaged = averaged + torch.stack(values) / kept
        return averaged

    @staticmethod
    def of(guide):
        for values in (guide.locs, guide.scales):
            found = {}
            for name in ("weight", "bias"):
                holder = values
                site = next(s for s in guide.prototype_trace.stochastic_nodes if s.endswith(f"head.{name}"))
                for part in site.split("."):
                    holder = getattr(holder, part)
                found[name] = holder.detach()
            yield found


def model_of(vae, kind, truth):
    if kind == "lift":
        return poutine.lift(vae.model, priors_of(vae.likelihood, "likelihood", truth.spread))
    to_pyro_module_(vae)
    for name, w in list(vae.likelihood.head.named_parameters()):
        prior = dist.Normal(0.0, truth.spread).expand(w.shape).to_event(w.dim())
        setattr(vae.likelihood.head, name, PyroSample(prior))
    return vae.model


def test_the_posterior_of_a_linear_decoder():
    """Within 5 %: the likelihood of a mini-batch counts N/B times, the prior of the weights once."""
    truth = Regression()
    mean, scale = truth.learned(model_of(truth.vae(), "lift", truth), batch_size=12)
    assert ((mean - truth.mean) / truth.scale).abs().max() < 0.05
    assert (scale / truth.scale - 1).abs().max() < 0.05


def test_weights_of_pyro_sample_learn_as_lifted_ones_do():
    """Step by step, and so they have the same posterior."""
    truth, found = Regression(), []
    for kind in ("lift", "PyroSample"):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        found.append(truth.learned(model_of(truth.vae(), kind, truth), batch_size=12, steps=20))
    torch.testing.assert_close(*found)


# -- one set of weights for all rows ----------------------------------------------------------------------------------


def in_its_own_plate(vae):
    return vae.model


def in_the_callers_plate(vae):
    def model(x, total=None):
        with pyro.plate("data", total or len(x), subsample=torch.arange(len(x))):
            vae.sample_model(x)

    return model


def by_hand(vae):
    def model(x, total=None):
        with pyro.plate("data", total or len(x), subsample=torch.arange(len(x))):
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", vae.likelihood_given(z), obs=x)

    return model


@pytest.mark.parametrize("use", [in_its_own_plate, in_the_callers_plate, by_hand])
@pytest.mark.parametrize("kind", ["lift", "PyroSample"])
def test_weights_are_outside_of_all_plates(use, kind):
    vae, x = small_vae(), binary(5)
    shapes = {name: w.shape for name, w in vae.likelihood.named_parameters()}
    model = use(vae)
    if kind == "lift":
        model = poutine.lift(model, priors_of(vae.likelihood, "likelihood"))
    else:
        make_random(vae.likelihood)
    trace = poutine.trace(model).get_trace(x, total=20)
    weights = [n for n in trace.stochastic_nodes if n.endswith(("weight", "bias"))]
    assert len(weights) == len(shapes)
    for name in weights:
        site = trace.nodes[name]
        assert site["value"].shape == shapes[name.partition("likelihood.")[2] or name]
        assert not site["cond_indep_stack"]
        assert site["scale"] == 1.0
    for name in ("z", "x"):
        assert trace.nodes[name]["scale"] == 4.0
    trace.compute_log_prob()
    # they are the weights that the likelihood used
    state = {n.partition("likelihood.")[2] or n: trace.nodes[n]["value"] for n in weights}
    plain = small_vae().likelihood
    plain.load_state_dict(state)
    expected = plain(trace.nodes["z"]["value"]).log_prob(x)
    torch.testing.assert_close(trace.nodes["x"]["unscaled_log_prob"], expected)


def make_random(part):
    """Standard Normal priors on all weights, as Pyro's tutorials have it."""
    to_pyro_module_(part)
    for module in part.modules():
        for name, w in list(module.named_parameters(recurse=False)):
            setattr(module, name, PyroSample(dist.Normal(0.0, 1.0).expand(w.shape).to_event(w.dim())))


def test_latent_codes_and_latent_weights_learn_together():
    vae, x = small_vae(), binary(1)[:1].repeat(40, 1, 1)
    model = poutine.lift(vae.model, priors_of(vae.likelihood, "likelihood"))
    weights = AutoNormal(poutine.block(model, hide=["z", "x", "data"]), init_scale=0.05)

    def guide(x):
        weights(x)
        vae.guide(x)

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(200)]
    assert weights.median()["vae$$$likelihood.head.weight"].shape == (16, 16)
    assert losses[-1] < losses[0] / 3  # all rows are alike


def test_priors_on_every_weight_of_prior_and_posterior():
    """VampPrior's pseudo-inputs are weights of the prior, and stay (K, *event)."""
    posterior = ConditionalNormal(MLP(4, [8]), 2)
    prior = VampPrior(posterior, torch.rand(3, 4))
    vae = VAE(prior, ConditionalNormal(MLP(2, [8]), 4), posterior)
    x = torch.randn(5, 4)
    model = poutine.lift(vae.model, {**priors_of(prior, "prior"), **priors_of(vae.likelihood, "likelihood")})
    trace = poutine.trace(model).get_trace(x)
    u = trace.nodes["vae$$$prior.pseudo_inputs"]["value"]
    assert u.shape == (3, 4)
    z = trace.nodes["z"]["value"]
    q = posterior(u)
    expected = q.log_prob(z[:, None]).logsumexp(1) - math.log(3)
    torch.testing.assert_close(trace.nodes["z"]["fn"].log_prob(z), expected)
    guide = poutine.lift(vae.guide, priors_of(posterior, "posterior"))
    sites = poutine.trace(guide).get_trace(x).nodes
    assert sites["vae$$$posterior.head.weight"]["value"].shape == (4, 8)


def test_sets_of_weights_for_many_particles_are_refused():
    vae, x = small_vae(), binary(5)
    model = poutine.lift(vae.model, priors_of(vae.likelihood, "likelihood"))
    message = (
        r"'vae\$\$\$likelihood.*one set of weights, of shape \(16, 2\), got \(3, 1, 16, 2\).*vectorize_particles=False"
    )

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    both = poutine.trace(lambda x: (guide(x), poutine.block(model, hide=["z", "x", "data"])(x)))
    with pytest.raises(ValueError, match=message):
        Trace_ELBO(num_particles=3, vectorize_particles=True).loss(model, lambda x: both(x), x)
    with pytest.raises(ValueError, match=r"one set of weights, of shape \(16, 2\), got \(7, 1, 16, 2\)"):
        Predictive(model, num_samples=7, parallel=True)(size=3)
    make_random(vae.likelihood)
    with pytest.raises(ValueError, match=r"'network.layers.0.weight' is random.*got \(7, 1, 16, 2\)"):
        Predictive(vae.model, num_samples=7, parallel=True)(size=3)
    draws = Predictive(vae.model, num_samples=7)(size=3)
    assert draws["x"].shape == (7, 3, 4, 4)
    assert draws["head.weight"].shape == (7, 1, 16, 16)


def test_a_prior_of_another_shape_is_refused():
    vae = small_vae()
    with pytest.raises(ValueError, match=r"of shape \(16, 2\), got \(\)\..*expand\(\[16, 2\]\).to_event\(2\)"):
        poutine.lift(vae.model, dist.Normal(0.0, 1.0))(binary(5))


# -- modules of Pyro --------------------------------------------------------------------------------------------------


# these have a transform of Pyro that is itself an ABC, and that Pyro's own conversion refuses
NOT_CONVERTED_BY_PYRO = {"flow, conditional", "flow, splines"}


@pytest.mark.parametrize("family", sorted({**ANY_SHAPE, **VECTORS}.keys() - NOT_CONVERTED_BY_PYRO))
def test_every_family_converts_to_a_module_of_pyro(family):
    made = {**ANY_SHAPE, **VECTORS}[family]
    part = made((4,)) if family in ANY_SHAPE else made(6)
    y = torch.randn(2, 3)
    with torch.no_grad():
        for w in part.parameters():
            w.add_(0.1 * torch.randn_like(w))
    pyro.set_rng_seed(1)
    expected = part(y).sample()
    to_pyro_module_(part)
    pyro.set_rng_seed(1)
    assert isinstance(part, PyroModule)
    torch.testing.assert_close(part(y).sample(), expected)


def test_a_family_as_a_module_of_pyro_trains_in_a_vae():
    likelihood = PyroModule[ConditionalBernoulli](MLP(2, [16]), (4, 4))
    posterior = PyroModule[ConditionalNormal](MLP((4, 4), [16]), 2)
    for trained in ("svi", "fit"):
        pyro.clear_param_store()
        vae, x = VAE(StandardNormal(2), likelihood, posterior), binary(20)
        before = [p.clone() for p in vae.parameters()]
        if trained == "svi":
            svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
            for _ in range(2):
                svi.step(x)
        else:
            fit(vae.model, vae.guide, x, num_epochs=2, progress=False)
        assert not any(torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))
        assert all("$$$" in name for name in pyro.get_param_store())  # each weight under one name
    whole = small_vae()
    to_pyro_module_(whole)
    assert importance_sampling(whole.model, whole.guide, x, num_particles=5).log_evidence.shape == (20,)
    pyro.clear_param_store()
    whole.reconstruct(x)
    assert not len(pyro.get_param_store())


def test_priors_that_depend_on_each_other():
    """A scale with a prior of its own: both are sampled once, outside of the plate."""
    vae = small_vae()
    to_pyro_module_(vae)
    head = vae.likelihood.head
    head.spread = PyroSample(dist.LogNormal(0.0, 1.0))
    head.weight = PyroSample(lambda self: dist.Normal(0.0, self.spread).expand([16, 16]).to_event(2))
    trace = poutine.trace(vae.model).get_trace(binary(5))
    spread, weight = (trace.nodes[f"likelihood.head.{name}"] for name in ("spread", "weight"))
    assert spread["value"].shape == ()
    assert weight["value"].shape == (16, 16)
    assert weight["fn"].base_dist.scale.unique() == spread["value"]


def test_an_abstract_class_is_refused_when_it_is_made():
    class NoForward(Broadcasting):
        pass

    class NoDistribution(Conditional):
        num_parameters = 2

    with pytest.raises(TypeError, match=r"NoForward: expected a subclass that defines forward.*def forward\(self, …\)"):
        NoForward()
    with pytest.raises(TypeError, match=r"NoDistribution: expected a subclass that defines distribution"):
        NoDistribution(nn.Linear(2, 3), 5)
    with pytest.raises(TypeError, match=r"defines distribution"):
        PyroModule[NoDistribution](nn.Linear(2, 3), 5)
    with pytest.raises(TypeError, match="Conditional: expected a subclass"):
        Conditional(nn.Linear(2, 3), 5)
