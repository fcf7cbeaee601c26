"""What a user writes, for the type checker: the names of the contract, with the types that they take and return."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyro_vae
from pyro_vae import (
    VAE,
    CompiledELBO,
    Evidence,
    FitResult,
    Particles,
    adaptive_importance_sampling,
    annealed_importance_sampling,
    compare,
    draw_particles,
    fit,
    importance_sampling,
    prior_sampling,
)
from pyro_vae.distributions import (
    ConditionalBernoulli,
    ConditionalMultivariateNormal,
    ConditionalNormal,
    StandardNormal,
)
from pyro_vae.networks import MLP


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


x: Tensor = torch.randn(100, 8)
vae = VAE(
    prior=StandardNormal(2),
    likelihood=ConditionalNormal(MLP(2, [16]), 8),
    posterior=ConditionalMultivariateNormal(MLP(8, [16]), 2),
    name="vae",
)
other = VAE(StandardNormal(2), ConditionalBernoulli(MLP(2, []), (2, 2)), ConditionalNormal(MLP((2, 2), []), 2))
result: FitResult = fit(vae.model, vae.guide, x, num_epochs=2, batch_size=16, loss=Trace_ELBO(), seed=0, compile=False)
last: float = result.loss[-1]
new: Tensor = vae.generate(5)
restored: Tensor = vae.reconstruct(x, mean=True)
particles: Particles = draw_particles(model, guide, x[:, 0], num_particles=3, plate="data")
log_weight: Tensor = particles.log_weight
evidence: Evidence = importance_sampling(model, guide, x[:, 0], num_particles=100)
error: Tensor = evidence.standard_error
best = compare(
    {
        "prior": prior_sampling(model, None, x[:, 0], num_particles=100),
        "adaptive": adaptive_importance_sampling(model, guide, x[:, 0], num_particles=100),
        "annealed": annealed_importance_sampling(model, guide, x[:, 0], num_particles=4, num_temperatures=10),
    }
)
loss = CompiledELBO(Trace_ELBO(), backend="eager")
version: str = pyro_vae.__version__


def wrong() -> None:
    """Never called: what the type checker must find, or `warn_unused_ignores` finds the comment."""
    fit(vae.model, vae.guide, x, num_epochs="two")  # type: ignore[arg-type]
    importance_sampling(x, guide, x)  # type: ignore[arg-type]
    draw_particles(model, guide, x, num_particles=2).log_weights  # type: ignore[attr-defined]  # noqa: B018
    ConditionalNormal(MLP(2, [16]), "eight")  # type: ignore[arg-type]
    result.losses  # type: ignore[attr-defined]  # noqa: B018
