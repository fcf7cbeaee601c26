"""log p(x_n|θ), joint evidence and posterior draws of models with latents outside of the data plate."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from truths.hierarchical import RandomEffects

from pyro_vae import (
    adaptive_importance_sampling,
    draw_particles,
    draw_posterior,
    from_pyro_svi,
    importance_sampling,
    integrated_log_likelihood,
)

TRUTH = RandomEffects()
X = torch.linspace(-2.0, 3.0, 9)
QUIET = {"seed": 0, "progress": False}


def joint_guide(x):
    guide = AutoMultivariateNormal(TRUTH.model, init_scale=0.5)
    guide(x)
    return guide


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("adaptive", ["auto", True])
def test_terms_given_globals_against_the_closed_form(parallel, adaptive):
    num_samples, num_particles = (30, 500) if parallel else (3 if adaptive is True else 6, 200)
    found = integrated_log_likelihood(
        TRUTH.model, TRUTH.guide, X, num_samples=num_samples, num_particles=num_particles, adaptive=adaptive,
        parallel=parallel, **QUIET,
    )  # fmt: skip
    assert found.shape == (num_samples, 9)
    z = (found - TRUTH.log_given(X, found.globals["m"])) / found.standard_error
    assert z.abs().max() < 5
    # the errors are as large as they say; with fixed counts of a mixture, draws vary less than that
    assert (0.6 if adaptive is True else 0.8) < z.std() < 1.2
    assert not found.doubtful.any()
    assert f"log p(x_n|θ_s) of 9 data points at {num_samples} draws of 'm'" in repr(found)
    assert type(found + 1) is torch.Tensor


def test_weights_of_the_globals_give_the_joint_evidence():
    found = integrated_log_likelihood(TRUTH.model, TRUTH.guide, X, num_samples=2000, num_particles=200, **QUIET)
    weight = found.log_weight.exp()
    error = weight.std() / weight.mean() / 2000**0.5
    estimate = found.log_weight.logsumexp(0) - torch.tensor(2000.0).log()
    assert (estimate - TRUTH.log_evidence(X)).abs() < 4.5 * error


def test_a_guide_that_draws_globals_and_locals_together():
    guide = joint_guide(X)
    found = integrated_log_likelihood(TRUTH.model, guide, X, num_samples=20, num_particles=400, **QUIET)
    assert ((found - TRUTH.log_given(X, found.globals["m"])) / found.standard_error).abs().max() < 5
    assert found.log_weight is None  # q(m) by itself is not known
    with pytest.raises(ValueError, match="adaptive=False: the guide draws globals and the latents of the data points"):
        integrated_log_likelihood(TRUTH.model, guide, X, adaptive=False, **QUIET)
    point = AutoDelta(TRUTH.model)
    point(X)
    with pytest.raises(ValueError, match="is a point"):
        integrated_log_likelihood(TRUTH.model, point, X, **QUIET)


def test_given_draws_and_new_data():
    """p(x_new|m) at the draws of another call; what is missing or uneven is named."""
    m, new = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.5, 4.0])
    found = integrated_log_likelihood(
        TRUTH.model, TRUTH.guide, new, draws={"m": m}, num_particles=2000, adaptive=True, **QUIET
    )
    assert ((found - TRUTH.log_given(new, m)) / found.standard_error).abs().max() < 5
    found = integrated_log_likelihood(TRUTH.model, None, new, draws={"m": m}, num_particles=2000, **QUIET)
    assert ((found - TRUTH.log_given(new, m)) / found.standard_error).abs().max() < 5
    with pytest.raises(ValueError, match="guide: expected one that draws the globals, got None"):
        integrated_log_likelihood(TRUTH.model, None, new, **QUIET)
    with pytest.raises(ValueError, match=r"draws: expected draws of the sites \['m'\], missing \['m'\]"):
        integrated_log_likelihood(TRUTH.model, TRUTH.guide, new, draws={"k": m}, **QUIET)


def test_without_latents_inside_the_terms_are_exact():
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m.sum(-1), 1.0), obs=x)

    guide = AutoNormal(model)
    guide(X)
    found = integrated_log_likelihood(model, guide, X, num_samples=7, **QUIET)
    expected = dist.Normal(found.globals["m"].sum(-1, keepdim=True), 1.0).log_prob(X)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected.double())
    assert not found.standard_error.any()
    assert not found.doubtful.any()


def test_discrete_latents_inside_are_summed_out():
    @config_enumerate
    def model(x):
        means = pyro.sample("means", dist.Normal(torch.tensor([-1.0, 2.0]), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Normal(means[..., y] if means.dim() == 1 else pick(means, y), 1.0), obs=x)

    def pick(means, y):
        return sum(torch.where(y == i, means[..., i], torch.zeros(())) for i in range(2))

    def guide(x):
        pyro.sample("means", dist.Normal(torch.tensor([-1.0, 2.0]), 0.5).to_event(1))

    for parallel in (True, False):
        found = integrated_log_likelihood(model, guide, X, num_samples=6, parallel=parallel, **QUIET)
        terms = dist.Normal(found.globals["means"][:, None], 1.0).log_prob(X[:, None])
        expected = (terms + torch.tensor([0.4, 0.6]).log()).logsumexp(-1)
        torch.testing.assert_close(found.as_subclass(torch.Tensor), expected.double(), atol=1e-5, rtol=1e-5)


def test_groups_in_a_plate_of_their_own_are_globals_of_the_data_plate():
    """Group effects g_j, two plates side by side, and an observation outside of the data plate."""
    group = torch.arange(9) % 3

    def model(x):
        with pyro.plate("groups", 3):
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(g, 1.0), obs=torch.tensor([0.5, -1.0, 2.0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(g[..., group], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("groups", 3):
            g = pyro.sample("g", dist.Normal(torch.tensor([0.3, 0.0, 0.8]), 0.6))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((g[..., group] + 4 * x) / 5, 0.5))

    found = integrated_log_likelihood(model, guide, X, num_samples=400, num_particles=300, **QUIET)
    assert found.globals["g"].shape == (400, 3)
    expected = dist.Normal(found.globals["g"][:, group], 1.25**0.5).log_prob(X)
    assert ((found - expected) / found.standard_error).abs().max() < 5.5
    # log p(x, y) by the Gaussian of all observations
    loads = torch.cat([torch.eye(3), torch.eye(3)[group]]).double()
    noise = torch.cat([torch.ones(3), torch.full((9,), 1.25)]).double().diag()
    data = torch.cat([torch.tensor([0.5, -1.0, 2.0]), X]).double()
    exact = dist.MultivariateNormal(torch.zeros(12).double(), loads @ loads.T + noise).log_prob(data)
    joint = adaptive_importance_sampling(model, guide, X, plate=None, num_particles=1000, **QUIET)
    assert (joint.log_evidence - exact).abs() < 4.5 * joint.standard_error
    assert joint.effective_sample_size > 400


def test_latents_outside_are_named_and_fixed_ones_are_constants():
    for tool in (importance_sampling, adaptive_importance_sampling):
        with pytest.raises(ValueError, match=r"site 'm' of the guide is outside plate 'data'"):
            tool(TRUTH.model, TRUTH.guide, X, **QUIET)
    fixed = {"m": torch.tensor(0.4)}
    pair = (poutine.condition(TRUTH.model, fixed), poutine.condition(TRUTH.guide, fixed))
    exact = TRUTH.log_given(X, torch.tensor([0.4]))[0]
    for tool in (importance_sampling, adaptive_importance_sampling):
        found = tool(*pair, X, num_particles=1000, **QUIET)
        assert ((found.log_evidence - exact) / found.standard_error.clamp(min=1e-6)).abs().max() < 5


def test_an_observation_outside_that_depends_on_latents_inside_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("total", dist.Normal(z.sum(-1, keepdim=True).squeeze(-1), 1.0), obs=torch.tensor(1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    with pytest.raises(ValueError, match="site 'total' is outside plate 'data', and depends on latents inside"):
        importance_sampling(model, guide, X, parallel=False, **QUIET)


@pytest.mark.parametrize("size", [600, 2400])
def test_joint_evidence_of_many_latents(size):
    torch.manual_seed(1)
    x = torch.randn(size) * 1.4 + 0.3
    guide = AutoNormal(TRUTH.model)
    guide(x)
    found = adaptive_importance_sampling(TRUTH.model, guide, x, plate=None, num_particles=300, **QUIET)
    assert (found.log_evidence - TRUTH.log_evidence(x)).abs() < 4.5 * found.standard_error
    assert found.standard_error < 0.1


@pytest.mark.parametrize("plate", ["data", None])
def test_posterior_draws_of_globals_and_locals(plate):
    draws = draw_posterior(TRUTH.model, TRUTH.guide, X, num_samples=4000, num_particles=6000, plate=plate, **QUIET)
    assert draws["m"].shape == (4000,)
    assert draws["z"].shape == (4000, 9)
    loc, scale = TRUTH.posterior_m(X)
    assert abs(draws["m"].mean() - loc) < 5 * scale / 4000**0.5
    assert abs(draws["m"].std() / scale - 1) < 5 * (2 * 4000) ** -0.5
    weight = TRUTH.b**-2 / (TRUTH.a**-2 + TRUTH.b**-2)
    expected = (1 - weight) * loc + weight * X
    variance = 1 / (TRUTH.a**-2 + TRUTH.b**-2) + (1 - weight) ** 2 * scale**2
    assert ((draws["z"].mean(0) - expected) / (variance / 4000).sqrt()).abs().max() < 5
    correlation = torch.corrcoef(torch.stack([draws["m"], draws["z"][:, 3]]))[0, 1]
    assert abs(correlation - (1 - weight) * scale / variance.sqrt()) < 5 / 4000**0.5
    assert draws.pareto_khat.shape == (1,)
    assert draws.pareto_khat < draws.threshold
    assert "Posterior draws of m (4000,), z (4000, 9), resampled from 6000 particles" in repr(draws)


@pytest.mark.parametrize("method", ["adaptive", "annealed", "importance", "prior"])
def test_posterior_draws_of_each_point(method):
    """A positive latent, against quadrature."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.0 * x, 0.8))

    x, grid = torch.tensor([0.3, 1.0, 2.5]), torch.linspace(1e-4, 12, 20_000).double()[:, None]
    weight = (dist.LogNormal(0.0, 1.0).log_prob(grid) + dist.Normal(grid, 0.5).log_prob(x)).softmax(0)
    mean = (weight * grid).sum(0)
    sd = (weight * (grid - mean).square()).sum(0).sqrt()
    particles = 64 if method == "annealed" else 3000
    draws = draw_posterior(model, guide, x, num_samples=2000, num_particles=particles, method=method, **QUIET)
    ess = draws.effective_sample_size.clamp(max=2000)
    error = sd * (1 / ess + 1 / 2000).sqrt()
    assert ((draws["z"].mean(0) - mean) / error).abs().max() < 4.5
    assert ((draws["z"].std(0) / sd - 1) / (1 / ess + 1 / 2000).sqrt()).abs().max() < 4.5
    with pytest.raises(ValueError, match="method: expected one of 'adaptive'"):
        draw_posterior(model, guide, x, method="nuts")


def test_particles_hold_the_sites_of_the_model_only():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    guide = AutoNormal(model)
    guide(X.abs())
    assert draw_particles(model, guide, X.abs(), num_particles=3).latents.keys() == {"z"}


@pytest.mark.parametrize("adaptive", [False, "auto"])
def test_a_plate_that_subsamples_data_of_its_own(adaptive):
    """All of its rows have a log p(x_n|θ), not those of one pass."""
    x = torch.linspace(-2, 3, 12)

    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 12, subsample_size=4) as rows:
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x[rows])

    def guide():
        m = pyro.sample("m", dist.Normal(0.5, 0.4))
        with pyro.plate("data", 12, subsample_size=4) as rows:
            pyro.sample("z", dist.Normal((m + 2 * x[rows]) / 3, 0.9))

    found = integrated_log_likelihood(model, guide, num_samples=5, num_particles=2000, adaptive=adaptive, **QUIET)
    exact = dist.Normal(found.globals["m"][:, None], 1.49**0.5).log_prob(x)
    assert found.shape == (5, 12)
    assert ((found - exact) / found.standard_error).abs().max() < 5


@pytest.mark.parametrize("parallel", [True, False])
def test_a_sequential_plate_with_a_latent_outside(parallel):
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(m, 1.2))
            pyro.sample(f"x_{i}", dist.Normal(z, 0.7), obs=x[i])

    def guide(x):
        m = pyro.sample("m", dist.Normal(0.5, 0.5))
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z_{i}", dist.Normal((m + 3 * x[i]) / 4, 0.8))

    x, options = X[:4], {"num_samples": 3, "num_particles": 100, "parallel": parallel}
    for adaptive in (False, "auto"):
        found = integrated_log_likelihood(model, guide, x, adaptive=adaptive, **options, **QUIET)
        assert ((found - TRUTH.log_given(x, found.globals["m"])) / found.standard_error).abs().max() < 5
    for tool in (
        lambda: integrated_log_likelihood(model, guide, x, adaptive=True, **options, **QUIET),
        lambda: draw_posterior(model, guide, x, parallel=parallel, **QUIET),
        lambda: from_pyro_svi(model, guide, x, num_samples=5, parallel=parallel, **QUIET),
    ):
        with pytest.raises(ValueError, match="plate 'data' is a Python loop"):
            tool()


def test_many_latents_of_a_point_are_drawn_by_the_guide_alone():
    """Nothing comes from the prior then, and weights are not bounded."""

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m.unsqueeze(-1).expand(*m.shape, 9), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.mean(-1), 0.5), obs=x)

    def guide(x):
        m = pyro.sample("m", dist.Normal(0.5, 0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(m.unsqueeze(-1).expand(*m.shape, 9), 1.0).to_event(1))

    found = integrated_log_likelihood(model, guide, X, num_samples=4, num_particles=2000, **QUIET)
    exact = dist.Normal(found.globals["m"][:, None], (0.25 + 1 / 9) ** 0.5).log_prob(X)
    assert not found.bounded
    assert ((found - exact) / found.standard_error)[~found.doubtful].abs().max() < 5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_data_are_looked_at_before_the_joint_evidence(bad):
    x = X.clone()
    x[3] = bad
    with pytest.raises(ValueError, match="infinite, the first at row 3"):
        adaptive_importance_sampling(TRUTH.model, TRUTH.guide, x, plate=None, **QUIET)
