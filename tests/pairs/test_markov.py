"""Discrete chains under `pyro.markov`, summed out: log p(x) by the forward algorithm, and by a sum over all paths."""

from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

from pyro_vae import adaptive_importance_sampling, importance_sampling, prior_sampling

INITIAL = torch.tensor([0.6, 0.4])
TRANSITION = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
SECOND = torch.tensor([[[0.9, 0.1], [0.4, 0.6]], [[0.2, 0.8], [0.7, 0.3]]])  # p(y_t | y_{t−2}, y_{t−1})
LOC = torch.tensor([-1.0, 1.5])
LENGTH = 5


@pytest.fixture
def x():
    return torch.randn(7, LENGTH, generator=torch.Generator().manual_seed(0))


def chain(t, past):
    if t == 0:
        return INITIAL
    return TRANSITION[past[-1]]


def second_order(t, past):
    return chain(t, past) if t < 2 else SECOND[past[-2], past[-1]]


def make_model(probabilities, history, observe_last=False, factor=False):
    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            if factor:
                pyro.factor("factor", 0.5 * x[:, 0])
            past = []
            for t in pyro.markov(range(x.shape[-1]), history=history):
                past.append(pyro.sample(f"y{t}", dist.Categorical(probabilities(t, past))))
                if not observe_last or t == x.shape[-1] - 1:
                    pyro.sample(f"x{t}", dist.Normal(LOC[past[-1]], 1.0), obs=x[:, t])

    return model


def forward(x, shift=0.0):
    """log p(x) of the chain of first order, whose emissions are N(LOC[y] + shift, 1)."""
    emission = dist.Normal(LOC + torch.as_tensor(shift)[..., None, None], 1.0).log_prob(x[..., None])
    alpha = INITIAL.log() + emission[..., 0, :]
    for t in range(1, x.shape[-1]):
        alpha = (alpha[..., None] + TRANSITION.log()).logsumexp(-2) + emission[..., t, :]
    return alpha.logsumexp(-1)


def all_paths(x, probabilities, observed):
    total = []
    for path in product(range(2), repeat=x.shape[-1]):
        log_p = torch.zeros(len(x))
        for t, y in enumerate(path):
            log_p = log_p + probabilities(t, list(path[:t]))[y].log()
            if t in observed:
                log_p = log_p + dist.Normal(LOC[y], 1.0).log_prob(x[:, t])
        total.append(log_p)
    return torch.stack(total).logsumexp(0)


@pytest.mark.parametrize("compile", [False, "auto", True])
def test_a_hidden_markov_model_is_exact(x, compile):
    if compile is True:
        x = x[:, :3]  # the time that generating code takes grows with the chain
    model = make_model(chain, 1)
    torch.testing.assert_close(forward(x), all_paths(x, chain, range(LENGTH)))
    options = {"num_particles": 60, "chunk_size": 7, "compile": compile, "progress": False}
    evidence = prior_sampling(model, None, x, **options)  # nothing is left to draw
    torch.testing.assert_close(evidence.log_evidence, forward(x).double(), rtol=1e-5, atol=1e-5)

    def guide(x):
        pass

    for other in () if compile is True else (guide, make_model(chain, 1)):
        evidence = importance_sampling(model, other, x, **options)
        torch.testing.assert_close(evidence.log_evidence, forward(x).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("observe_last", [False, True])
@pytest.mark.parametrize("history", [2, 3])
def test_a_chain_of_second_order_is_exact(x, history, observe_last):
    observed = [LENGTH - 1] if observe_last else range(LENGTH)
    model = make_model(second_order, history, observe_last)
    evidence = prior_sampling(model, None, x, num_particles=3, progress=False)
    torch.testing.assert_close(
        evidence.log_evidence, all_paths(x, second_order, observed).double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("where", ["before", "inside"])
@pytest.mark.parametrize("estimator", ["prior", "importance", "adaptive"])
def test_a_chain_beside_a_continuous_latent_meets_quadrature(x, estimator, where):
    """z ~ N(0, 1) shifts all of a chain's emissions; it is drawn before the chain, or in its first step."""

    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0)) if where == "before" else None
            y = None
            for t in pyro.markov(range(LENGTH)):
                y = pyro.sample(f"y{t}", dist.Categorical(INITIAL if y is None else TRANSITION[y]))
                if z is None:
                    z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample(f"x{t}", dist.Normal(LOC[y] + z, 1.0), obs=x[:, t])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(1) / 2, 0.9))

    grid = torch.linspace(-8, 8, 801, dtype=torch.float64)
    log_joint = dist.Normal(0.0, 1.0).log_prob(grid)[:, None] + forward(x.double(), grid[:, None])
    exact = log_joint.logsumexp(0) + (grid[1] - grid[0]).log()
    torch.manual_seed(0)
    if estimator == "prior":
        evidence = prior_sampling(model, None, x, num_particles=20_000, progress=False)
    elif estimator == "importance":
        evidence = importance_sampling(model, guide, x, num_particles=5000, progress=False)
    else:
        evidence = adaptive_importance_sampling(model, guide, x, num_particles=2000, progress=False)
    z = (evidence.log_evidence - exact) / evidence.standard_error
    assert 0.1 < z.abs().max() < 4.5
    assert z.square().mean() < 3


def test_chains_side_by_side_in_an_inner_plate_are_exact(x):
    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("sequences", 3, dim=-1):
            y = None
            for t in pyro.markov(range(LENGTH)):
                y = pyro.sample(f"y{t}", dist.Categorical(INITIAL if y is None else TRANSITION[y]))
                pyro.sample(f"x{t}", dist.Normal(LOC[y], 1.0), obs=x[..., t])

    x = torch.stack([x, x.flip(1), 0.5 * x], 1)  # (rows, sequences, steps)
    evidence = prior_sampling(model, None, x, num_particles=3, progress=False)
    torch.testing.assert_close(evidence.log_evidence, forward(x).sum(1).double(), rtol=1e-5, atol=1e-5)


def test_a_factor_of_the_model_beside_a_chain_counts_once(x):
    model = make_model(chain, 1, factor=True)
    evidence = prior_sampling(model, None, x, num_particles=3, progress=False)
    torch.testing.assert_close(evidence.log_evidence, (forward(x) + 0.5 * x[:, 0]).double(), rtol=1e-5, atol=1e-5)
