"""Latents of any support: E_q p(z)/q(z) = 1 for a prior that is normalised, or a refusal that says why."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.distributions import transforms as T
from test_guide_errors import guides

from pyro_vae import importance_sampling
from pyro_vae.distributions.truncated import TruncatedNormal
from pyro_vae.guides import AmortizedFlow, AmortizedMultivariateNormal, AmortizedNormal
from pyro_vae.networks import MLP
from pyro_vae.pairs.supports import support_of

ROWS = 4
LOW = torch.arange(float(ROWS))


class Cut(dist.TorchDistribution):
    """A positive and a real number side by side, whose support is a `constraints.cat`."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.independent(constraints.cat([constraints.positive, constraints.real], -1, [1, 1]), 1)
    has_rsample = True

    def __init__(self, batch_shape=()):
        super().__init__(torch.Size(batch_shape), torch.Size((2,)), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Cut(batch_shape)

    def rsample(self, sample_shape=()):
        u = torch.randn(torch.Size(sample_shape) + self.batch_shape + (2,))
        return torch.stack([u[..., 0].exp(), u[..., 1]], -1)

    def log_prob(self, value):
        return dist.LogNormal(0.0, 1.0).log_prob(value[..., 0]) + dist.Normal(0.0, 1.0).log_prob(value[..., 1])


def moved(base, *transforms):
    return dist.TransformedDistribution(base, list(transforms))


PRIORS = {
    "StudentT": lambda: dist.StudentT(5.0, 1.0, 2.0),
    "AsymmetricLaplace": lambda: dist.AsymmetricLaplace(0.0, 1.0, 2.0),
    "HalfCauchy": lambda: dist.HalfCauchy(1.0),
    "Pareto, of each row": lambda: dist.Pareto(1.0 + LOW, 3.0),
    "Uniform, of each row": lambda: dist.Uniform(LOW, 1.0 + 2.0 * LOW),
    "TruncatedNormal, of each row": lambda: TruncatedNormal(0.0, 1.0, low=0.3 * LOW - 1.0),
    "InverseGamma": lambda: dist.InverseGamma(3.0, 2.0),
    "AffineBeta": lambda: dist.AffineBeta(2.0, 3.0, LOW, 1.0 + LOW),
    "Kumaraswamy": lambda: dist.Kumaraswamy(2.0, 3.0),
    "VonMises": lambda: dist.VonMises(0.5, 2.0),
    "ordered": lambda: moved(dist.Normal(torch.zeros(3), 1.0).to_event(1), T.OrderedTransform()),
    "LKJCholesky": lambda: dist.LKJCholesky(3, 2.0),
    "LKJCholesky, two": lambda: dist.LKJCholesky(2, torch.tensor([1.0, 2.0])).to_event(1),
    "Dirichlet, many": lambda: dist.Dirichlet(torch.full((12,), 3.0)),
    "Dirichlet, two": lambda: dist.Dirichlet(torch.ones(2, 3)).to_event(1),
    "Gamma, three": lambda: dist.Gamma(torch.tensor([2.0, 3.0, 4.0]), 1.0).to_event(1),
    "a matrix": lambda: dist.Normal(torch.zeros(2, 3), 1.0).to_event(2),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(
        torch.zeros(3), torch.ones(3, 1), torch.ones(3)
    ),
    "LogisticNormal": lambda: dist.LogisticNormal(torch.zeros(2), torch.ones(2)),
    "RelaxedOneHotCategorical": lambda: dist.RelaxedOneHotCategorical(torch.tensor(1.0), probs=torch.ones(3) / 3),
    "MixtureSameFamily": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Gamma(torch.tensor([2.0, 5.0]), 1.0)
    ),
    "cat": Cut,
    "shifted": lambda: moved(dist.Gamma(2.0, 1.0), T.AffineTransform(3.0, 1.0)),
    "turned, of each row": lambda: moved(dist.Gamma(2.0, 1.0).expand([ROWS]), T.AffineTransform(LOW, -1.0 - LOW)),
    "scaled sigmoid": lambda: moved(dist.Normal(0.0, 1.0), T.SigmoidTransform(), T.AffineTransform(LOW, 2.0)),
    "scaled twice": lambda: moved(
        dist.Beta(2.0 * torch.ones(2), 1.0).to_event(1),
        T.AffineTransform(1.0, torch.tensor([1.0, -2.0]), event_dim=1),
        T.AffineTransform(0.0, -1.0, event_dim=1),
    ),
}


def model_of(prior):
    def model(x):
        with pyro.plate("data", ROWS):
            pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    return model


# the coordinates are those of any guide; that of independent ones draws them in a way of its own, whatever the prior
INDEPENDENT = ("StudentT", "Pareto, of each row", "Dirichlet, two", "cat")
CASES = [(make, name) for make in (AmortizedMultivariateNormal, AmortizedFlow) for name in PRIORS]
CASES += [(AmortizedNormal, name) for name in INDEPENDENT]


@pytest.mark.parametrize(("make", "name"), CASES)
def test_the_prior_is_normalised_under_the_guide(make, name):
    """The density that q has at a draw is that of the draw."""
    prior, x = PRIORS[name], torch.zeros(ROWS)
    model = model_of(prior)
    torch.manual_seed(0)
    guide = make(model, MLP(1, [4]))
    guide(x)
    heads = [site.flow.transforms[-1].head for site in guide.head] if make is AmortizedFlow else [guide.head.head]
    with torch.no_grad():  # as wide as the prior
        for head in heads:
            size = len(head.bias) // 2 if make is AmortizedFlow else guide.latents.dim
            head.bias[size : 2 * size] = 0.5
    # draws of the prior too, where q has to have a density as well: weights are bounded, whatever the tails
    found = importance_sampling(model, guide, x, num_particles=2000, defensive=0.3, seed=0, progress=False)
    error = found.log_evidence - dist.Normal(0.0, 1.0).log_prob(x)
    assert (error.abs() < 4.5 * found.standard_error).all(), error / found.standard_error
    assert (found.standard_error < 0.05).all()
    draws = guide.sample_posterior(x, num_samples=20, seed=0)["z"]
    assert support_of(prior().expand([ROWS])).check(draws).all()


@guides
@pytest.mark.filterwarnings("ignore:Singular sample")  # of torch's Wishart
@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (lambda: dist.ProjectedNormal(torch.ones(3)), "ProjectedNormal cannot be mapped"),
        (lambda: dist.VonMises3D(torch.tensor([0.0, 0.0, 3.0])), "one of its distributions has no sampler"),
        (lambda: dist.Wishart(torch.tensor(9.0), torch.eye(2)), "Wishart cannot be mapped"),
        (lambda: dist.LKJ(3, 2.0), "cannot be drawn from: Subclass LKJ.*expand"),
        (lambda: dist.OneHotCategorical(torch.ones(3)), "site 'z' is discrete"),
        (lambda: dist.ZeroInflatedPoisson(torch.tensor(2.0), gate=torch.tensor(0.3)), "site 'z' is discrete"),
    ],
    ids=["sphere", "VonMises3D", "Wishart", "LKJ", "OneHotCategorical", "ZeroInflatedPoisson"],
)
def test_what_has_no_coordinates_is_refused(make, prior, message):
    with pytest.raises(ValueError, match=f"(?s){make.__name__}: .*{message}.*Try"):
        make(model_of(prior), MLP(1, [4]))(torch.zeros(ROWS))


def test_bounds_on_different_sides_are_not_known():
    """Some rows are bounded below, others above, which no constraint says: torch's own answer stays."""
    prior = moved(dist.Gamma(2.0, 1.0).expand([2]), T.AffineTransform(0.0, torch.tensor([1.0, -1.0])))
    assert support_of(prior) is constraints.real
    assert AmortizedNormal(model_of(PRIORS["shifted"]), MLP(1, [4]))(torch.zeros(ROWS))["z"].min() > 3
