"""Simulated data: draws of (z, x) from a model, as arguments that its guide and the estimators take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.sites import sample_sites, site_log_prob
from pyro_vae.pairs.threads import one_thread
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["Simulation", "simulate"]


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
    with torch.no_grad(), evaluation_mode(model, guide):
        observed = {n: s for n, s in sample_sites(sampler.traces(1)[1]).items() if s["is_observed"]}
        drawn = sample_sites(sampler.run(poutine.uncondition(model), 1))
    latents = {name: sampler.layout.align(drawn[name])[0] for name in sampler.pair.latents}
    inputs = {i: a for i, a in [*enumerate(args), *kwargs.items()] if isinstance(a, Tensor)}
    replaced: dict[Any, Tensor] = {}
    for name, site in observed.items():
        value = site["value"]
        keys = [
            key
            for key, a in inputs.items()
            if a.data_ptr() == value.data_ptr() and a.numel() == value.numel() == drawn[name]["value"].numel()
        ]
        if not keys:
            raise ValueError(
                f"site {name!r}: its observed value is none of the arguments, so that it is not known where to put a "
                "simulated one. Try a model that observes an argument as it is, or simulate by hand and pass "
                "exact_draw={site: draws} to an estimator."
            )
        replaced |= {key: drawn[name]["value"].reshape(inputs[key].shape).to(inputs[key].dtype) for key in keys}
    new = tuple(replaced.get(i, a) for i, a in enumerate(args)), {n: replaced.get(n, a) for n, a in kwargs.items()}
    _check_generates(sampler, drawn, new)
    return Simulation(*new, latents)


def _check_generates(sampler: ParticleSampler, drawn: dict[str, dict], arguments: tuple[tuple, dict]) -> None:
    """Raises ValueError where sites have other distributions with the simulated arguments than they were drawn from."""
    values = {name: site["value"] for name, site in drawn.items() if not site["infer"].get("was_observed")}
    with torch.no_grad(), evaluation_mode(sampler.model), sampler.rows.using(*arguments):
        sites = sample_sites(sampler.run(sampler.model, 1, values=values))
    for name in sites.keys() & drawn.keys():
        before, after = (site_log_prob({**s, "value": drawn[name]["value"]}) for s in (drawn[name], sites[name]))
        before, after = torch.broadcast_tensors(before, after)
        if not torch.allclose(before, after, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"site {name!r}: its distribution depends on an argument that the model observes, so that data drawn "
                "in its place are no draw from the model. Try to pass what the model reads (a mean of x, its "
                "last step) as an argument of its own, or to simulate by hand."
            )
