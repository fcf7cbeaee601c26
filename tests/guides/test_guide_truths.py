"""Trained guides against posteriors that are known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import nn

from pyro_vae import ImportanceWeightedELBO, draw_particles, fit
from pyro_vae.evidence.adaptive import fit_gaussians
from pyro_vae.evidence.density import LatentDensity
from pyro_vae.guides import AmortizedFlow, AmortizedMultivariateNormal
from pyro_vae.networks import MLP
from pyro_vae.particles.sampler import ParticleSampler


def trained(model, guide, *data, num_epochs, learning_rate, batch_size=50):
    loss = ImportanceWeightedELBO(2, doubly_reparameterized=True)  # without noise where q is exact
    fit(
        *(model, guide, data if len(data) > 1 else data[0]),
        num_epochs=num_epochs,
        batch_size=batch_size,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=learning_rate),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs),
        loss=loss,
        seed=0,
        compile=False,
        progress=False,
    )
    return guide


def elbo(model, guide, x):
    with torch.no_grad():
        return draw_particles(model, guide, x, num_particles=2000, seed=1).log_weight.double().mean(0)


def test_full_covariance_across_sites_is_the_exact_posterior():
    """z₁ ~ N(0, 1), z₂ ~ N(z₁, 1), x = W z + noise: mean and covariance within 1 %."""
    weight = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    prior = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    covariance = torch.linalg.inv(torch.linalg.inv(prior) + weight.T @ weight / 0.49)

    def model(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(0.0, 1.0))
            second = pyro.sample("second", dist.Normal(first, 1.0))
            mean = torch.stack([first, second], -1) @ weight.T
            pyro.sample("x", dist.Normal(mean, 0.7).to_event(1), obs=x)

    torch.manual_seed(1)
    x = torch.randn(400, 2) @ torch.linalg.cholesky(prior).T @ weight.T + 0.7 * torch.randn(400, 4)
    guide = trained(model, AmortizedMultivariateNormal(model, nn.Identity()), x, num_epochs=50, learning_rate=0.05)
    q = guide.get_posterior(x)
    error = (q.mean - x @ weight @ covariance / 0.49) / covariance.diagonal().sqrt()
    assert error.abs().max() < 0.01
    assert (q.covariance_matrix / covariance - 1).abs().max() < 0.01


def test_a_simplex_against_the_dirichlet():
    """p ~ Dirichlet, counts ~ Multinomial: KL(q‖p) per row, and the moments, of rows that were not trained on."""
    concentration = torch.tensor([2.0, 3.0, 4.0])

    def model(counts):
        with pyro.plate("data", len(counts)):
            p = pyro.sample("p", dist.Dirichlet(concentration))
            pyro.sample("counts", dist.Multinomial(30, p, validate_args=False), obs=counts)

    torch.manual_seed(0)
    p = dist.Dirichlet(concentration).sample((600,))
    counts = torch.stack([torch.bincount(row.multinomial(30, True), minlength=3) for row in p]).float()
    network = MLP(3, [32])
    guide = AmortizedFlow(model, network, inputs=lambda counts: (counts + 1).log())
    trained(model, guide, counts[:500], num_epochs=32, learning_rate=0.02)
    held_out = counts[500:]
    gap = dist.DirichletMultinomial(concentration, 30).log_prob(held_out).double() - elbo(model, guide, held_out)
    assert -0.01 < gap.mean() < 0.02, gap.mean()
    exact = dist.Dirichlet(concentration + held_out)
    draws = guide.sample_posterior(held_out, num_samples=2000, seed=0)["p"]
    scale = exact.variance.sqrt()
    assert ((draws.mean(0) - exact.mean) / scale).square().mean().sqrt() < 0.12
    assert (draws.std(0) / scale - 1).square().mean().sqrt() < 0.08


@pytest.mark.parametrize(
    ("make", "largest_gap", "largest_error"),
    [(AmortizedFlow, 0.05, 0.08), (AmortizedMultivariateNormal, 0.2, 0.3)],
)
def test_a_simplex_against_quadrature(make, largest_gap, largest_error):
    """p ~ Dirichlet, x ~ N(p₁ + 2 p₂, 0.2): a ridge across the triangle, against sums over a grid of it. No Gaussian
    in the coordinates of a simplex has this shape, but the flow does."""
    concentration, slope = torch.tensor([1.5, 2.0, 2.5]), torch.tensor([1.0, 2.0, 0.0])

    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Dirichlet(concentration))
            pyro.sample("x", dist.Normal((p * slope).sum(-1), 0.2), obs=x)

    torch.manual_seed(0)
    data = dist.Normal((dist.Dirichlet(concentration).sample((500,)) * slope).sum(-1), 0.2).sample()
    guide = trained(model, make(model, MLP(1, [32])), data, num_epochs=22, learning_rate=0.02)
    x = torch.linspace(0.2, 1.5, 8)
    cells = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    first, share = torch.cartesian_prod(cells, cells).T  # p₂ = share (1 − p₁)
    p = torch.stack([first, share * (1 - first), (1 - share) * (1 - first)], -1)
    log_p = dist.Dirichlet(concentration.double()).log_prob(p) + (1 - first).log()
    log_p = log_p + dist.Normal((p * slope).sum(-1), 0.2).log_prob(x.double().unsqueeze(-1))
    log_evidence, weight = log_p.logsumexp(1) - math.log(len(p)), log_p.softmax(1)
    mean = weight @ p
    sd = (weight @ p.square() - mean.square()).sqrt()
    gap = log_evidence - elbo(model, guide, x)
    draws = guide.sample_posterior(x, num_samples=4000, seed=0)["p"]
    error, ratio = (draws.mean(0) - mean) / sd, draws.std(0) / sd - 1
    assert gap.min() > -0.02
    assert gap.mean() < largest_gap
    assert error.square().mean().sqrt() < largest_error
    assert ratio.square().mean().sqrt() < largest_error


def test_a_flow_bends_where_the_best_gaussian_cannot():
    """x = z₂ + z₁² + noise: KL(q‖p) of every row below that of the Gaussian that is best for this row."""

    def model(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(0.0, 1.0))
            second = pyro.sample("second", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(second + first**2, 0.3), obs=x)

    torch.manual_seed(0)
    guide = AmortizedFlow(model, MLP(1, [32]))
    trained(model, guide, torch.linspace(-2.0, 1.2, 400), num_epochs=40, learning_rate=0.02)
    x = torch.linspace(-1.5, 1.0, 12)
    grid = torch.linspace(-7, 7, 1401, dtype=torch.float64)
    log_joint = dist.Normal(grid**2, 1.09**0.5).log_prob(x.double()[:, None]) + dist.Normal(0.0, 1.0).log_prob(grid)
    log_p = log_joint.logsumexp(1) + math.log(0.01)

    with torch.no_grad():
        density = LatentDensity(ParticleSampler(model, AmortizedMultivariateNormal(model, MLP(1, [8])), (x,), {}))
        best = fit_gaussians(density, num_steps=40, step_size=0.3)
        u = best(best.noise(2000))
        gaussian = (sum(density.log_joint(u)) - best.proposal().log_prob(u, ())).double().mean(0)
    flow = log_p - elbo(model, guide, x)
    assert (flow > -0.02).all()
    assert (flow < log_p - gaussian - 0.05).all(), (flow, log_p - gaussian)


def test_locals_that_are_conditioned_on_globals():
    """μ ~ N(0, 2²), z_n ~ N(μ, 1), x_n ~ N(z_n, ½²): exact with q(z_n|x_n, μ), not with q(z_n|x_n)."""
    x = torch.tensor([[1.0], [2.0], [3.0]])

    def model(x):
        centre = pyro.sample("centre", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(centre, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])

    covariance = 4.0 * torch.ones(3, 3) + 1.25 * torch.eye(3)
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x[:, 0])
    gaps = []
    for given in (["centre"], []):
        pyro.clear_param_store()
        torch.manual_seed(0)
        guide = AmortizedMultivariateNormal(model, nn.Identity(), outside=AutoMultivariateNormal, given=given)
        fit(
            *(model, guide, x),
            num_epochs=200,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1),
            scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200),
            loss=Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1),
            seed=0,
            compile=False,
            progress=False,
        )
        objective = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
        gaps.append(exact + objective.loss(model, guide, x))
    assert -0.02 < gaps[0] < 0.03
    # the best q(μ) Π q(z_n) has the diagonal blocks of the precision: ½ (Σ log Λ_ii − log |Λ|)
    precision = torch.diag(torch.tensor([3.25, 5.0, 5.0, 5.0]))
    precision[0, 1:] = precision[1:, 0] = -1.0
    assert abs(gaps[1] - 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))) < 0.05


def test_the_rows_that_a_plate_drew_are_read():
    """A model that holds all of its data, and a plate that draws rows of these."""
    data = torch.arange(20.0).unsqueeze(-1)

    def model(x):
        with pyro.plate("data", len(x), subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(0.0, 10.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index, 0])

    guide = AmortizedMultivariateNormal(model, nn.Identity())
    guide(data)
    with torch.no_grad():
        for p in guide.head.parameters():
            p.zero_()
        guide.head.head.weight[0], guide.centre[0], guide.spread[0] = 1.0, 0.0, 1.0
    trace = poutine.trace(guide).get_trace(data)
    index = trace.nodes["data"]["value"]
    assert torch.equal(trace.nodes["z"]["fn"].loc, index.float())
    assert len(set(index.tolist())) == 5
