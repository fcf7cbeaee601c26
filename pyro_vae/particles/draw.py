"""`draw_particles`: weighted draws of any pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro_vae.arguments import checked
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.threads import one_thread
from pyro_vae.pairs.validity import check_density
from pyro_vae.particles.particles import Particles
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["draw_particles"]


@one_thread
@checked
@seeded
def draw_particles(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int,
    plate: str | None = "data",
    parallel: bool | str = "auto",
    seed: int | None = None,
    **kwargs: Any,
) -> Particles:
    """Draws K weighted particles for each data point of a (model, guide) pair.

    Modules run in evaluation mode; gradients flow unless `torch.no_grad()` says otherwise. All K × N particles are
    held at once: for summaries of many, `importance_sampling` streams. They run at once, in a dimension left of the
    plates, or one at a time where a model or guide counts dimensions from the left.

    Args:
        model: a Pyro model, with the data points in a plate called `plate`, at any depth. Discrete latents that the
            guide leaves to it are summed out, if `pyro.infer.config_enumerate` marks them.
        guide: its guide, with the other latent sites. Its observed sites are auxiliary and left out of q.
        *args: what both are called with.
        num_particles: K ≥ 1.
        plate: name of the plate of data points; None takes all data as one point, N = 1, latents outside of plates
            included.
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        **kwargs: what both are called with.

    Returns:
        `Particles` with log-probabilities of shape (K, N) in nats, unscaled.

    Raises:
        ValueError: no such plate, a site outside it, model and guide with different latents, num_particles < 1,
            rows that are not finite or outside the support of their likelihood, a guide that puts mass on points.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the exact posterior: every weight is p(x)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> draw_particles(model, guide, torch.tensor([0.0, 2.0]), num_particles=3).log_weight[0]
        tensor([-1.2655, -2.2655])
    """
    sampler = ParticleSampler(model, guide, args, kwargs, plate=plate, parallel=parallel)
    check_density(sampler.pair)
    with evaluation_mode(model, guide):
        return sampler.draw(num_particles)
