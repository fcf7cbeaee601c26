"""Pairs whose weights would look fine and mean nothing are refused: points, extra draws, masks that differ."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)

from pyro_vae import (
    adaptive_importance_sampling,
    annealed_importance_sampling,
    draw_particles,
    from_pyro_svi,
    importance_sampling,
    impute,
    prior_sampling,
)

X = torch.linspace(-1.0, 1.0, 6)
ESTIMATORS = [importance_sampling, adaptive_importance_sampling, annealed_importance_sampling]


def two(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Gamma(2.0, 2.0))
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a + b * p[..., 0], 1.0), obs=x)


def a_list(first, second):
    guide = AutoGuideList(two)
    guide.append(first(poutine.block(two, expose=["a"])))
    guide.append(second(poutine.block(two, expose=["b", "p"])))
    return guide


POINTS = {
    "AutoDelta": lambda: AutoDelta(two),
    "AutoLaplaceApproximation": lambda: AutoLaplaceApproximation(two),
    "a list with a point": lambda: a_list(AutoDelta, AutoDiagonalNormal),
    "a list with a point at its end": lambda: a_list(AutoDiagonalNormal, AutoDelta),
    "a structure with a point": lambda: AutoStructured(
        two, conditionals={"a": "delta", "b": "normal", "p": "normal"}, dependencies={}
    ),
}
DENSITIES = {
    "AutoNormal": lambda: AutoNormal(two),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(two),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(two),
    "AutoLowRankMultivariateNormal": lambda: AutoLowRankMultivariateNormal(two),
    "AutoIAFNormal": lambda: AutoIAFNormal(two),
    "a list": lambda: a_list(AutoNormal, AutoDiagonalNormal),
    "a structure": lambda: AutoStructured(
        two, conditionals={"a": "normal", "b": "normal", "p": "mvn"}, dependencies={}
    ),
}


def trained(guide):
    svi = SVI(two, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(150):
        svi.step(X)
    return guide


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", POINTS)
def test_points_are_refused(name, estimator):
    guide = POINTS[name]()
    guide(X)
    with pytest.raises(ValueError, match=r"of the guide is a point \(Delta\), which has no density"):
        estimator(two, guide, X, plate=None, progress=False)


def test_images_of_auxiliary_draws_agree():
    """Different guides estimate one number, which the prior gives without any of them."""
    truth = prior_sampling(two, None, X, num_particles=200_000, plate=None, progress=False)
    for name, make in DENSITIES.items():
        pyro.clear_param_store()
        guide = trained(make())
        evidence = importance_sampling(two, guide, X, num_particles=100_000, plate=None, progress=False)
        error = (evidence.standard_error.square() + truth.standard_error.square()).sqrt()
        assert (evidence.log_evidence - truth.log_evidence).abs() < 5 * error, name
        assert error < 0.1


def test_a_laplace_approximation_after_its_step_is_a_density():
    guide = trained(AutoLaplaceApproximation(two)).laplace_approximation(X)
    evidence = importance_sampling(two, guide, X, num_particles=100_000, plate=None, progress=False)
    truth = prior_sampling(two, None, X, num_particles=200_000, plate=None, progress=False)
    error = (evidence.standard_error.square() + truth.standard_error.square()).sqrt()
    assert (evidence.log_evidence - truth.log_evidence).abs() < 5 * error
    assert error < 0.03


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_draws_that_nothing_accounts_for_are_refused():
    """q(u) q(z|u) with u in no model: the weights integrate over u as well, and have no mean."""

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(u, 1.0))

    with pytest.raises(ValueError, match=r"draws 5 numbers in auxiliary sites \('u'\), and 0 in latents"):
        importance_sampling(model, guide, X, progress=False)


def test_a_latent_that_is_a_function_of_another_is_refused():
    def sums(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("y", dist.Delta(2 * z))

    with pytest.raises(ValueError, match="'y' of the guide is a point"):
        importance_sampling(sums, guide, X, progress=False)


MASK = torch.tensor([True, False, True, True, True, False])


def masked_model(x, mask):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=mask)


def masked_guide(mask_of_latent):
    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(mask, x / 2, 0), torch.where(mask, 0.5**0.5, 1.0)))
            with poutine.mask(mask=mask_of_latent(mask)):
                pyro.sample("x_unobserved", dist.Normal(x, 1.0))

    return guide


@pytest.mark.parametrize("options", [{}, {"defensive": 0.3}])
def test_masks_that_differ_are_refused_by_name(options):
    with pytest.raises(ValueError, match=r"site 'x_unobserved' is masked differently in model and"):
        importance_sampling(masked_model, masked_guide(torch.ones_like), X, MASK, progress=False, **options)


def test_masks_that_differ_in_a_later_row_are_found():
    x, mask = X.repeat(50), torch.ones(300, dtype=torch.bool)

    def masked(x, mask):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    evidence = importance_sampling(masked, guide, x, mask, num_particles=100, progress=False)
    torch.testing.assert_close(evidence.log_evidence.float(), dist.Normal(0.0, 2**0.5).log_prob(x))
    mask[150] = False
    with pytest.raises(ValueError, match="site 'z' is masked differently"):
        importance_sampling(masked, guide, x, mask, num_particles=100, progress=False)


@pytest.mark.parametrize("seed", range(20))
def test_the_check_for_particles_under_subsampling_plates(seed):
    """It compares under one subsample: what counts from the left is refused, and what is right goes through."""
    torch.manual_seed(seed)

    def pair(axis):
        def model(x):
            with pyro.plate("data", 8, subsample_size=3) as rows:
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z.cumsum(axis)[..., -1], 1.0), obs=x[rows])

        def guide(x):
            with pyro.plate("data", 8, subsample_size=3) as rows:
                pyro.sample("z", dist.Normal(x[rows].unsqueeze(-1).expand(-1, 3) / 4, 1.0).to_event(1))

        return model, guide

    x = torch.randn(8)
    importance_sampling(*pair(-1), x, num_particles=10, progress=False)
    with pytest.raises(ValueError, match="another log-probability for one particle alone"):
        importance_sampling(*pair(1), x, num_particles=10, parallel=True, progress=False)


def test_a_right_pair_is_never_refused_by_chance():
    def model(x):
        with pyro.plate("data", 2, subsample_size=1) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("data", 2, subsample_size=1) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))

    x = torch.tensor([0.0, 3.0])
    for seed in range(50):
        torch.manual_seed(seed)
        evidence = importance_sampling(model, guide, x, num_particles=10, progress=False)
        torch.testing.assert_close(evidence.log_evidence.float(), dist.Normal(0.0, 2**0.5).log_prob(x))


def test_a_point_in_the_model_too_has_the_weight_one():
    def model(x):
        with pyro.plate("data", len(x)):
            shift = pyro.sample("shift", dist.Delta(torch.ones(len(x))))
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exact = dist.Normal(1.0, 2**0.5).log_prob(X)
    evidence = prior_sampling(model, None, X, num_particles=50_000, progress=False)
    assert ((evidence.log_evidence - exact).abs() < 5 * evidence.standard_error).all()


@pytest.mark.parametrize("tool", [draw_particles, impute, from_pyro_svi], ids=lambda f: f.__name__)
def test_points_are_refused_by_whatever_weighs_draws(tool):
    def point(x):
        loc = pyro.param("loc", lambda: torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(loc))

    number = {"num_samples" if tool is from_pyro_svi else "num_particles": 10}
    with pytest.raises(ValueError, match=r"site 'z' of the guide is a point \(Delta\)"):
        tool(model, point, X, **number)


def test_a_factor_counts_in_the_model_and_is_refused_in_the_guide():
    def weighted(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("likelihood", dist.Normal(z, 1.0).log_prob(x))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    def guide_with_factor(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
            pyro.factor("correction", z.square(), has_rsample=True)

    evidence = importance_sampling(weighted, guide, X, num_particles=10, progress=False)
    torch.testing.assert_close(evidence.log_evidence.float(), dist.Normal(0.0, 2**0.5).log_prob(X))
    with pytest.raises(ValueError, match=r"site 'correction' of the guide is a pyro.factor"):
        importance_sampling(weighted, guide_with_factor, X, num_particles=10, progress=False)


def test_a_mixture_of_points_is_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            points = dist.Delta(torch.stack([x, -x], -1))
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(len(x), 2)), points))

    with pytest.raises(ValueError, match=r"site 'z' of the guide is a point"):
        importance_sampling(model, guide, X, progress=False)


@pytest.mark.parametrize("mask_x", [True, False])
def test_a_masked_latent_that_the_likelihood_depends_on_is_refused(mask_x):
    """Masked with its data, a row counts nothing; without, p(x) would be an average over the guide."""

    def padded(x):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=MASK):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=MASK if mask_x else torch.tensor(True)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=MASK):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    if mask_x:
        evidence = importance_sampling(padded, guide, X, num_particles=100, progress=False)
        exact = dist.Normal(0.0, 2**0.5).log_prob(X) * MASK
        torch.testing.assert_close(evidence.log_evidence.float(), exact)
        return
    with pytest.raises(ValueError, match=r"latent sites \['z'\] are masked at some places, and other sites depend"):
        importance_sampling(padded, guide, X, num_particles=100, progress=False)
