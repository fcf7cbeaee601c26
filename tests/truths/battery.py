"""The battery: pairs with a guide that is off on purpose, displaced or a plain regression, and too wide."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor


class Truth(NamedTuple):
    """A pair, the shape of one of its data points, and log p(x) of rows of these."""

    model: Callable
    guide: Callable
    shape: tuple[int, ...]
    log_evidence: Callable[[Tensor], Tensor]


def linear_gaussian(latent: int, size: int, *, noise: float = 0.7, displace: float = 0.3, widen: float = 1.2) -> Truth:
    """z ~ N(0, I), x ~ N(W z, s² I): log N(x; 0, W Wᵀ + s² I)."""
    weight = torch.randn(size, latent, generator=torch.Generator().manual_seed(1))
    covariance = torch.linalg.inv(weight.T @ weight / noise**2 + torch.eye(latent))
    tril = torch.linalg.cholesky(covariance)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T, noise).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        loc = x @ weight @ covariance / noise**2 + displace / math.sqrt(latent) * tril.sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=widen * tril))

    def log_evidence(x: Tensor) -> Tensor:
        total = weight.double() @ weight.double().T + noise**2 * torch.eye(size, dtype=torch.float64)
        return dist.MultivariateNormal(torch.zeros(size, dtype=torch.float64), total).log_prob(x.double())

    return Truth(model, guide, (size,), log_evidence)


def by_quadrature(likelihood: Callable[[Tensor], Any], size: int, latent: int) -> Truth:
    """z ~ N(0, I) in one or two dimensions, x ~ likelihood(z); the guide is a regression of z on x."""
    grid, cell = _grid(latent)

    def log_joint(x: Tensor) -> Tensor:  # (N, points)
        log_prior = dist.Normal(0.0, 1.0).log_prob(grid).sum(-1)
        return likelihood(grid).log_prob(x.double().unsqueeze(-2)) + log_prior

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", likelihood(z), obs=x)

    regression = _Regression(model, ["z"], (size,))

    def guide(x: Tensor) -> None:
        loc, scale = regression(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return Truth(model, guide, (size,), lambda x: log_joint(x).logsumexp(-1) + cell)


def two_levels(size: int = 4) -> Truth:
    """z2 ~ N(0, 1), z1 ~ N(tanh 2 z2, ½²), x ~ N(w z1, 0.7²): two sites, the second guide given the first."""
    grid, cell = _grid(2)
    weight = torch.linspace(-1, 1.5, size)

    def log_joint(x: Tensor) -> Tensor:
        z2, z1 = grid.unbind(-1)
        log_prior = dist.Normal(0.0, 1.0).log_prob(z2) + dist.Normal(torch.tanh(2 * z2), 0.5).log_prob(z1)
        return log_prior + dist.Normal(z1[:, None] * weight, 0.7).to_event(1).log_prob(x.double().unsqueeze(-2))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(torch.tanh(2 * z2), 0.5))
            pyro.sample("x", dist.Normal(z1.unsqueeze(-1) * weight, 0.7).to_event(1), obs=x)

    regression = _Regression(model, ["z2", "z1"], (size,))

    def guide(x: Tensor) -> None:
        loc, scale = regression(x)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(loc[:, 0], scale[0]))
            pyro.sample("z1", dist.Normal(loc[:, 1] + 0.2 * (z2 - loc[:, 0]), scale[1]))

    return Truth(model, guide, (size,), lambda x: log_joint(x).logsumexp(-1) + cell)


def bernoulli_mixture(size: int = 20, num_components: int = 5, *, enumerate_guide: bool = False) -> Truth:
    """y ~ Categorical, x ~ Bernoulli(p_y): log Σ_y p(y) p(x|y); the guide has the posterior's square root."""
    logits = torch.randn(num_components, size, generator=torch.Generator().manual_seed(2))

    def log_joint(x: Tensor) -> Tensor:
        return dist.Bernoulli(logits=logits).to_event(1).log_prob(x.unsqueeze(-2)) - math.log(num_components)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=torch.zeros(num_components)))
            pyro.sample("x", dist.Bernoulli(logits=logits[y]).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=log_joint(x) / 2))

    guide = config_enumerate(guide) if enumerate_guide else guide
    return Truth(model, guide, (size,), lambda x: log_joint(x).double().logsumexp(-1))


def mixture_with_latents(size: int = 8, num_components: int = 3) -> Truth:
    """y ~ Categorical, z ~ N(m_y, 1), x ~ Bernoulli(w z + b_y): y is summed out, of the guide there is but z."""
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(size, generator=generator), torch.randn(num_components, size, generator=generator)
    mean = torch.tensor([-2.0, 0.0, 2.0])
    grid, cell = _grid(1)

    def log_joint(x: Tensor) -> Tensor:
        log_prior = dist.Normal(mean, 1.0).log_prob(grid) - math.log(num_components)  # (points, components)
        logits = grid.unsqueeze(-1) * weight + bias
        log_likelihood = dist.Bernoulli(logits=logits).to_event(1).log_prob(x.double()[..., None, None, :])
        return (log_prior + log_likelihood).logsumexp(-1)

    @config_enumerate
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=torch.zeros(num_components)))
            z = pyro.sample("z", dist.Normal(mean[y], 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z.unsqueeze(-1) * weight + bias[y]).to_event(1), obs=x)

    regression = _Regression(model, ["z"], (size,))

    def guide(x: Tensor) -> None:
        loc, scale = regression(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc[:, 0], scale[0]))

    return Truth(model, guide, (size,), lambda x: log_joint(x).logsumexp(-1) + cell)


class _Regression:
    """A guide's location and scale: least squares of latents on functions of x in simulations, 1.2 times too wide."""

    def __init__(self, model: Callable, names: list[str], shape: tuple[int, ...]) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            trace = poutine.trace(poutine.uncondition(model)).get_trace(torch.zeros(20_000, *shape))
        value = {name: trace.nodes[name]["value"].reshape(20_000, -1) for name in [*names, "x"]}
        z, features = torch.cat([value[name] for name in names], -1), self.features(value["x"])
        # of binary data some features are the same line; in float32 their least squares are left to rounding
        self.weight = (torch.linalg.pinv(features.double(), rtol=1e-8) @ z.double()).float()
        self.scale = 1.2 * (z - features @ self.weight).std(0)

    @staticmethod
    def features(x: Tensor) -> Tensor:
        bounded = torch.tanh(x / 2)
        return torch.cat([torch.ones(len(x), 1), x.clamp(-5, 5), bounded, bounded[:, :1] * bounded], -1)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.features(x) @ self.weight, self.scale


def _grid(latent: int) -> tuple[Tensor, float]:
    """Points (M, latent) on [−8, 8]^latent, float64, and the log of a cell's volume."""
    axis = torch.linspace(-8, 8, 1001 if latent == 1 else 161, dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * latent).reshape(-1, latent), latent * math.log(axis[1] - axis[0])


def _affine(z: Tensor, size: int, seed: int) -> Tensor:
    weight = torch.randn(z.shape[-1], size, generator=torch.Generator().manual_seed(seed))
    return z @ weight.to(z)


TRUTHS: dict[str, Callable[[], Truth]] = {
    "linear Gaussian, 1 latent": lambda: linear_gaussian(1, 3),
    "linear Gaussian, 5 latents": lambda: linear_gaussian(5, 10),
    "linear Gaussian, 20 latents": lambda: linear_gaussian(20, 30, displace=0.2, widen=1.1),
    "sine curve, 1 latent": lambda: by_quadrature(
        lambda z: dist.Normal(torch.sin(_affine(z, 3, 4)) + 0.5 * _affine(z, 3, 5), 0.5).to_event(1), 3, 1
    ),
    "Bernoulli network, 2 latents": lambda: by_quadrature(
        lambda z: dist.Bernoulli(logits=2 * _affine(torch.tanh(_affine(z, 6, 6)), 12, 7)).to_event(1), 12, 2
    ),
    "Poisson, 2 latents": lambda: by_quadrature(
        lambda z: dist.Poisson(torch.exp(0.7 * _affine(z, 5, 8) + 0.5)).to_event(1), 5, 2
    ),
    "Student-t, 2 latents": lambda: by_quadrature(
        lambda z: dist.StudentT(3.0, _affine(z, 4, 9), 0.5).to_event(1), 4, 2
    ),
    "two levels": two_levels,
    "Bernoulli mixture": bernoulli_mixture,
    "Bernoulli mixture, enumerated": lambda: bernoulli_mixture(enumerate_guide=True),
    "mixture with latents, enumerated": mixture_with_latents,
}
