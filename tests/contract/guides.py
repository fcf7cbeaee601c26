"""Guides and models for the laws of `test_guides.py`; a new guide adds its line to `GUIDES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.guides import AmortizedFlow, AmortizedMultivariateNormal, AmortizedNormal

GUIDES = {"normal": AmortizedNormal, "full": AmortizedMultivariateNormal, "flow": AmortizedFlow}


class Case(NamedTuple):
    """A model, its arguments, what the network reads, and log p(x) of each row where it is known."""

    model: Callable
    args: tuple
    width: int
    inputs: Callable | None = None
    log_evidence: Tensor | None = None
    network: Callable[[], nn.Module] | None = None


def vector(x: Tensor) -> None:
    """z ~ N(0, I₂), x = W z + noise: log p(x) in closed form."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT.T, 0.7).to_event(1), obs=x)


WEIGHT = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.2, -1.0]])


def conjugates(counts: Tensor, hits: Tensor, votes: Tensor, items: Tensor) -> None:
    """A positive, a bounded, a simplex latent and three positive ones in a plate inside the row, each conjugate."""
    with pyro.plate("data", len(counts), dim=-1):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        share = pyro.sample("share", dist.Beta(2.0, 3.0))
        mix = pyro.sample("mix", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        pyro.sample("counts", dist.Poisson(rate), obs=counts)
        pyro.sample("hits", dist.Binomial(10, share), obs=hits)
        pyro.sample("votes", dist.Multinomial(6, mix, validate_args=False), obs=votes)
        with pyro.plate("items", 3, dim=-2):
            each = pyro.sample("each", dist.Gamma(3.0, 2.0))
            pyro.sample("item", dist.Poisson(each), obs=items.T)


def _conjugates() -> Case:
    generator = torch.Generator().manual_seed(0)
    counts, items = (torch.poisson(torch.full(shape, 2.0), generator=generator) for shape in ((6,), (6, 3)))
    hits = torch.tensor([0.0, 2.0, 3.0, 5.0, 8.0, 4.0])
    votes = torch.tensor([[1.0, 2, 3], [0, 0, 6], [2, 2, 2], [3, 2, 1], [0, 3, 3], [1, 1, 4]])
    known = (
        dist.GammaPoisson(2.0, 1.0).log_prob(counts)
        + dist.BetaBinomial(2.0, 3.0, 10).log_prob(hits)
        + dist.DirichletMultinomial(torch.tensor([1.0, 2.0, 3.0]), 6).log_prob(votes)
        + dist.GammaPoisson(3.0, 2.0).log_prob(items).sum(-1)
    )
    return Case(conjugates, (counts, hits, votes, items), 8, _side_by_side, known)


def _side_by_side(counts: Tensor, hits: Tensor, votes: Tensor, items: Tensor) -> Tensor:
    return torch.cat([counts[:, None], hits[:, None], votes, items], -1)


def within(x: Tensor) -> None:
    """A support that depends on another latent: b ~ U(0, 1), a ~ U(0, b), x ~ N(a + b, 0.2)."""
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", dist.Uniform(0.0, 1.0))
        a = pyro.sample("a", dist.Uniform(torch.zeros_like(b), b))
        pyro.sample("x", dist.Normal(a + b, 0.2), obs=x)


def _within() -> Case:
    x = torch.linspace(0.0, 2.0, 6)
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    b, share = grid[:, None], grid[None, :]
    log_p = dist.Normal(b * (1 + share), 0.2).log_prob(x.double()[:, None, None])
    return Case(within, (x,), 1, None, log_p.flatten(1).logsumexp(1) - 2 * torch.tensor(1000.0).log())


def mixture(x: Tensor) -> None:
    """y ~ Bernoulli, left to enumeration; z ~ N(±2, 1), x ~ N(z, 0.5)."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(4 * y - 2, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def _mixture() -> Case:
    x = torch.linspace(-3.0, 3.0, 6)
    parts = [dist.Normal(loc, 1.25**0.5).log_prob(x) for loc in (2.0, -2.0)]
    log_p = torch.logaddexp(parts[0] + torch.tensor(0.3).log(), parts[1] + torch.tensor(0.7).log())
    return Case(mixture, (x,), 1, None, log_p)


def masked(x: Tensor, there: Tensor) -> None:
    """Rows of different length: z_t ~ N(0, 1), x_t ~ N(z_t, 1) for the elements of a row that are there."""
    with pyro.plate("data", len(x), dim=-1), pyro.plate("time", 4, dim=-2), pyro.poutine.mask(mask=there.T):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)


def _filled(x: Tensor, there: Tensor) -> Tensor:
    return x * there


def _masked() -> Case:
    there = torch.arange(4) < torch.tensor([4, 3, 2, 1, 4, 2])[:, None]
    x = torch.linspace(-2.0, 2.0, 24).reshape(6, 4)
    log_p = (dist.Normal(0.0, 2**0.5).log_prob(x) * there).sum(-1)
    return Case(masked, (x, there), 4, _filled, log_p)


def _vector() -> Case:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    covariance = WEIGHT @ WEIGHT.T + 0.49 * torch.eye(3)
    return Case(vector, (x,), 3, None, dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x))


class Reader(nn.Module):
    """Reads a sequence of (value, whether it is there) for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(2, 8, batch_first=True)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        return self.recurrent(torch.stack([x * there, there], -1))[1][0]


def series(x: Tensor, there: Tensor) -> None:
    """z ~ N(0, 1), x_t ~ N(z, 1) for the elements of a row that are there: one latent, rows of different length."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("time", 4, dim=-2), pyro.poutine.mask(mask=there.T):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)


def _series() -> Case:
    case = _masked()
    x, there = case.args
    number, total = there.sum(1), (x * there).sum(1)
    log_p = (dist.Normal(0.0, 1.0).log_prob(x) * there).sum(1)  # log N(x; 0, I + 1 1ᵀ) of as many as are there
    log_p = log_p + 0.5 * total**2 / (1 + number) - 0.5 * (1.0 + number).log()
    return Case(series, case.args, 4, _both, log_p, Reader)


def _both(x: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    return x, there


def groups(x: Tensor) -> None:
    """Latents outside of the plate, and a correlation matrix for each row."""
    centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
    with pyro.plate("two", 2, dim=-2):
        spread = pyro.sample("spread", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", 12, subsample_size=len(x), dim=-1):
        tril = pyro.sample("tril", dist.LKJCholesky(2, 2.0))
        mean = pyro.sample("mean", dist.Normal(centre.unsqueeze(-1) + torch.zeros(2), 1.0).to_event(1))
        scale = tril * spread.unsqueeze(-1).transpose(-3, -2).unsqueeze(-3)
        pyro.sample("x", dist.MultivariateNormal(mean, scale_tril=scale), obs=x)


CASES: dict[str, Callable[[], Case]] = {
    "vector": _vector,
    "conjugates": _conjugates,
    "within": _within,
    "mixture": _mixture,
    "masked": _masked,
    "series": _series,
    "groups": lambda: Case(groups, (torch.randn(6, 2, generator=torch.Generator().manual_seed(2)),), 2),
}


def make(guide: str, case: Case) -> Any:
    """One with weights of order one, after its first call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = nn.Sequential(nn.Linear(case.width, 8), nn.Tanh()) if case.network is None else case.network()
        made = GUIDES[guide](case.model, network, inputs=case.inputs)
        with pyro.poutine.block():
            made(*case.args)
        with torch.no_grad():
            for p in made.head.parameters():
                p.add_(0.1 * torch.randn_like(p))
            heads = [site.flow.transforms[-1].head for site in made.head] if guide == "flow" else [made.head.head]
            for head in heads:  # as wide as the prior or wider
                size = len(head.bias) // 2 if guide == "flow" else made.latents.dim
                head.bias[size : 2 * size] = 0.7
    return made
