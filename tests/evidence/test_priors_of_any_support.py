"""Priors that are mixtures, or lie on a sphere, in the estimators that need unconstrained latents."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import ProjectedNormalReparam

from pyro_vae import adaptive_importance_sampling, annealed_importance_sampling, importance_sampling
from pyro_vae.distributions import GaussianMixture
from pyro_vae.pairs.supports import inside_support, support_of

X = torch.tensor([0.1, 0.5, 1.0])
ESTIMATORS = {
    "adaptive": lambda *a: adaptive_importance_sampling(*a, num_particles=20_000, progress=False),
    "annealed": lambda *a: annealed_importance_sampling(*a, num_particles=1000, num_temperatures=15, progress=False),
    "from the prior": lambda *a: annealed_importance_sampling(
        *a, num_particles=1000, num_temperatures=15, start="prior", progress=False
    ),
}
estimators = pytest.mark.parametrize("estimator", ESTIMATORS)
TWO = torch.tensor([0.3, 0.7])


def mixture(components):
    return dist.MixtureSameFamily(dist.Categorical(TWO), components)


MIXTURES = {
    "Normals": (mixture(dist.Normal(torch.tensor([-1.0, 1.0]), 0.5)), -12.0, 12.0),
    "StudentTs": (mixture(dist.StudentT(5.0, torch.tensor([-1.0, 1.0]), 0.5)), -400.0, 400.0),
    "LogNormals": (mixture(dist.LogNormal(torch.tensor([-1.0, 0.5]), 0.5)), 0.0, 40.0),
    "Betas": (mixture(dist.Beta(torch.tensor([2.0, 5.0]), 3.0)), 0.0, 1.0),
    "AffineBetas": (mixture(dist.AffineBeta(torch.tensor([1.0, 3.0]), 1.0, -1.0, 3.0)), -1.0, 2.0),
    "Uniforms": (mixture(dist.Uniform(torch.tensor([-0.5, -0.5]), torch.tensor([2.0, 2.0]))), -0.5, 2.0),
    "Paretos": (mixture(dist.Pareto(torch.tensor([0.3, 0.3]), torch.tensor([2.0, 6.0]))), 0.3, 300.0),
}


def pair(prior, image=lambda z: z):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(image(z), 0.4), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior)

    return model, guide


@estimators
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_whose_components_have_one_support(name, estimator):
    prior, low, high = MIXTURES[name]
    evidence = ESTIMATORS[estimator](*pair(prior), X)
    edges = torch.linspace(low, high, 200_001, dtype=torch.float64)
    z = (edges[1:] + edges[:-1]) / 2
    log_joint = prior.log_prob(z) + dist.Normal(z, 0.4).log_prob(X.double().unsqueeze(1))
    exact = log_joint.logsumexp(1) + math.log((high - low) / 200_000)
    error = (evidence.log_evidence - exact).abs()
    assert (error < 5 * evidence.standard_error + 1e-4).all(), (error, evidence.standard_error)


@estimators
@pytest.mark.parametrize("family", ["GaussianMixture", "diagonal", "MixtureOfDiagNormals", "MultivariateNormal"])
def test_mixtures_of_gaussians_over_vectors(family, estimator):
    """log p(x) of x ~ N(z₁, 0.4²) needs the first coordinate of the prior alone."""
    loc = torch.tensor([[-1.0, 2.0], [1.0, 0.0]])
    priors = {
        "diagonal": lambda: mixture(dist.Normal(loc, 0.5).to_event(1)),
        "MixtureOfDiagNormals": lambda: dist.MixtureOfDiagNormals(loc, torch.full((2, 2), 0.5), TWO.log()),
        "MultivariateNormal": lambda: mixture(dist.MultivariateNormal(loc, 0.25 * torch.eye(2))),
    }
    if family == "GaussianMixture":
        module = GaussianMixture(2, 2)
        with torch.no_grad():
            module.loc.copy_(loc)
            module.logits.copy_(TWO.log())
            prior, scale = module(), 1.0
    else:
        prior, scale = priors[family](), 0.5
    evidence = ESTIMATORS[estimator](*pair(prior, lambda z: z[..., 0]), X)
    exact = dist.MixtureSameFamily(dist.Categorical(TWO), dist.Normal(loc[:, 0], (scale**2 + 0.4**2) ** 0.5))
    error = (evidence.log_evidence - exact.log_prob(X)).abs()
    assert (error < 5 * evidence.standard_error).all(), (error, evidence.standard_error)


def test_the_support_of_a_mixture():
    uniforms = dist.Uniform(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]), torch.tensor(4.0))
    support = support_of(mixture(uniforms))
    assert support.lower_bound.tolist() == [0.0, 1.0, 2.0]
    assert inside_support(mixture(uniforms), torch.full((3,), 1.5)).tolist() == [True, True, False]
    box = mixture(dist.Uniform(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 3.0).to_event(1))
    assert support_of(box).base_constraint.lower_bound.tolist() == [0.0, 1.0]
    inside = inside_support(box, torch.tensor([[0.5, 2.0], [0.5, 0.5]]))
    assert inside.tolist() == [True, False]


REFUSED = {
    "a sphere": (dist.ProjectedNormal(torch.ones(3)), "got the support Sphere"),
    "other intervals": (mixture(dist.Uniform(torch.tensor([0.0, 0.5]), 1.0)), "got a mixture of components whose supp"),
    "other rays": (mixture(dist.Pareto(torch.tensor([0.3, 0.4]), 2.0)), "got a mixture of components whose supports"),
    "spheres": (mixture(dist.ProjectedNormal(torch.eye(3)[:2])), "got a mixture of components whose supports"),
}


@estimators
@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_in_one_sentence(name, estimator):
    """Where, expected, got, try; and what is advised works."""
    prior, got = REFUSED[name]
    dims = tuple(range(-len(prior.event_shape), 0))
    model, guide = pair(prior, lambda z: z.sum(dims) if dims else z)
    with pytest.raises(ValueError, match=r"site 'z': \w+ cannot be mapped .* expect .* Try importance_samp") as error:
        ESTIMATORS[estimator](model, guide, X)
    assert error.match(got)
    assert importance_sampling(model, guide, X, num_particles=100, progress=False).log_evidence.isfinite().all()


@estimators
def test_a_sphere_by_a_function_of_normals(estimator):
    """The advice for a sphere: p(x) is that of importance sampling on the sphere itself."""
    prior = dist.ProjectedNormal(torch.tensor([1.0, 2.0, 0.0]))
    model, guide = pair(prior, lambda z: z[..., 0])
    truth = importance_sampling(model, guide, X, num_particles=100_000, progress=False)
    free = poutine.reparam(model, {"z": ProjectedNormalReparam()})

    def of_normals(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z_normal", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    evidence = ESTIMATORS[estimator](free, of_normals, X)
    spread = (evidence.standard_error.square() + truth.standard_error.square()).sqrt()
    assert ((evidence.log_evidence - truth.log_evidence).abs() < 5 * spread).all()
