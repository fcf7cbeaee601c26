"""Simulated data: draws of (z, x) from a model, as arguments that its guide and the estimators take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.arguments import checked
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.simulated import check_generates, observed_arguments, with_simulated
from pyro_vae.pairs.sites import sample_sites
from pyro_vae.pairs.threads import one_thread
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["Simulation", "look_at_observed", "simulate"]


@dataclass(frozen=True)
class Simulation:
    """Data from a model, and the latents that they came from.

    Attributes:
        args, kwargs: what model and guide were called with, observed values replaced by simulated ones.
        latents: {site: (N, *inner plates, *event)}, exact draws from the posterior given these data.
    """

    args: tuple
    kwargs: dict[str, Any]
    latents: dict[str, Tensor]


@one_thread
@checked
@seeded
def simulate(
    model: Callable,
    guide: Callable,
    *args: Any,
    plate: str | None = "data",
    parallel: bool | str = "auto",
    seed: int | None = None,
    **kwargs: Any,
) -> Simulation:
    """Draws z* ~ p(z), x ~ p(x|z*) as many times as there are data points, and puts x in the place of the data.

    Args:
        model: a Pyro model, which observes some of its arguments as they are, or reshaped.
        guide: its guide.
        *args: what both are called with.
        plate: name of the plate of data points.
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        **kwargs: what both are called with.

    Returns:
        `Simulation`.

    Raises:
        ValueError: an observed value that is none of the arguments, or an argument that the model observes and also
            reads.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x, 0.1))
        >>> simulation = simulate(model, guide, torch.zeros(1000))
        >>> round((simulation.args[0] - simulation.latents["z"]).std().item(), 1)
        0.1
    """
    sampler = ParticleSampler(model, guide, args, kwargs, plate=plate, parallel=parallel)
    args, kwargs = sampler.pair.args, sampler.pair.kwargs  # arrays as tensors
    with torch.no_grad(), evaluation_mode(model, guide):
        keys, drawn = look_at_observed(sampler, args, kwargs)
    latents = {name: sampler.layout.align(drawn[name])[0] for name in sampler.pair.latents}
    return Simulation(*with_simulated(args, kwargs, keys, drawn), latents)


def look_at_observed(
    sampler: ParticleSampler, args: tuple, kwargs: dict[str, Any], rows: slice | None = None
) -> tuple[dict[str, list[int | str]], dict[str, dict]]:
    """The arguments that each site observes, and the sites of a draw from the model.

    Args:
        sampler: of the pair, which runs on these arguments.
        args: of the model.
        kwargs: of the model.
        rows: of the sampler.

    Raises:
        ValueError: as `simulate`.
    """
    observed = {n: s for n, s in sample_sites(sampler.traces(1, rows)[1]).items() if s["is_observed"]}
    drawn = sample_sites(sampler.run(poutine.uncondition(sampler.model), 1, rows))
    keys = observed_arguments(observed, drawn, args, kwargs)
    values = {name: site["value"] for name, site in drawn.items() if name not in observed}
    with sampler.rows.using(*with_simulated(args, kwargs, keys, drawn)):
        check_generates(drawn, sample_sites(sampler.run(sampler.model, 1, rows, values=values)))
    return keys, drawn
