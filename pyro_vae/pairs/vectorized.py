"""A check that many particles at once give what each of them gives alone.

Particles take a dimension of their own, left of those of the pair's plates. Code that counts dimensions from the right
does not see it; `softmax(z, 1)` or `z[:, 0]` then mean another dimension than they did, and may go on without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.pairs.handlers import SetSubsample, SetValues
from pyro_vae.pairs.modes import evaluation_mode, fork_random_state
from pyro_vae.pairs.sites import sample_sites, site_log_prob
from pyro_vae.pairs.supports import bijection
from pyro_vae.pairs.untouched import Untouched

__all__ = ["PARTICLE_PLATE", "check_vectorized"]

TOGETHER = 4  # particles: of those that a branch or a maximum over all of them leaves as they are, there may be one

PARTICLE_PLATE = "num_particles_vectorized"  # as Pyro's own vectorized ELBOs call it
ADVICE = (
    "Many particles run at once, in a dimension left of the plates, as under Trace_ELBO(vectorize_particles=True). Try "
    "to count dimensions from the right (z[..., 0], softmax(-1)), and to expand what is concatenated with a latent "
    "value to its batch shape."
)


def check_vectorized(
    pair: tuple[Callable, Callable],
    args: tuple,
    kwargs: dict,
    looks: Sequence[poutine.Trace],
    width: int,
    subsamples: dict[str, Tensor],
) -> None:
    """Runs a pair for some particles together, and again for each of them alone, and compares.

    Args:
        pair: the guide and the model.
        args: what both are called with; some rows will do.
        kwargs: the same.
        looks: traces of both, for whatever rows, without particles.
        width: batch dimensions under the plate of particles.
        subsamples: {plate: indices} of plates that draw some, the same in both runs.

    Raises:
        ValueError: the pair does not run for several, or one of its sites has another log-probability then.
    """
    values: dict[str, Tensor] = {}
    with (
        fork_random_state(),
        torch.no_grad(),
        evaluation_mode(*pair),
        pyro.validation_enabled(False),
        poutine.block(),
        SetSubsample(subsamples),
        Untouched(*pair),
    ):
        for role, function, look in zip(("guide", "model"), pair, looks, strict=True):
            plate = pyro.plate(PARTICLE_PLATE, TOGETHER, dim=-width)
            try:
                together = _sites(plate(function), values, args, kwargs)
            except Exception as error:
                reason = str(error).strip().partition("\n")[0]
                raise ValueError(f"the {role} does not run for two particles at once: {reason}. {ADVICE}") from error
            drawn = {name: site for name, site in together.items() if not site["is_observed"]}
            new = {name: _mirrored(site, width) for name, site in drawn.items() if name not in values}
            if new:
                values |= new
                together = _sites(plate(function), values, args, kwargs)
            events = {name: len(site["fn"].event_shape) for name, site in drawn.items()}
            for k in range(TOGETHER):
                own = {}
                for name, event in events.items():
                    one = _one(values[name], width + event, k)
                    dims = look.nodes[name]["value"].dim() if name in look.nodes else one.dim()
                    own[name] = one.reshape(one.shape[one.dim() - dims :])  # what is left of them has size one
                _compare(role, function, together, own, (args, kwargs), (width, k))


def _compare(
    role: str, function: Callable, together: dict, own: dict[str, Tensor], arguments: tuple, at: tuple[int, int]
) -> None:
    """Raises ValueError if sites have other log-probabilities for a particle alone than beside others."""
    alone = _sites(function, own, *arguments)
    for name in together.keys() & alone.keys():
        expected, got = _log_prob(alone[name]), _log_prob(together[name])
        if expected is None or got is None:
            continue
        difference = _one(got, *at).sum() - expected.sum()
        if difference.abs() > 1e-3 * (1 + expected.abs().sum()):
            again = _log_prob(_sites(function, own, *arguments)[name])
            if torch.equal(again, expected):  # else chance makes the difference
                raise ValueError(
                    f"site {name!r} of the {role} has another log-probability for one particle alone than for the "
                    f"same particle beside others. {ADVICE}"
                )


def _sites(function: Callable, values: dict[str, Tensor], args: tuple, kwargs: dict) -> dict[str, dict]:
    with SetValues(values):
        return sample_sites(poutine.trace(function).get_trace(*args, **kwargs))


def _mirrored(site: dict, width: int) -> Tensor:
    """Values of which every second particle is the one before it, mirrored at the middle of the support, if it has one:
    of such a pair, a branch that asks for a sign goes to both sides."""
    value, fn = site["value"], site["fn"]
    axis = value.dim() - width - len(fn.event_shape)
    try:
        transform = bijection(site["name"], fn)
        if axis != 0 or len(value) != TOGETHER or not value.is_floating_point():
            return value
        mirrored = transform(-transform.inv(value))
    except Exception:  # discrete, or without a bijection, or one that depends on the particle
        return value
    odd = (torch.arange(TOGETHER, device=value.device) % 2 == 1).reshape(-1, *(1,) * (value.dim() - 1))
    return torch.where(odd & mirrored.roll(1, 0).isfinite(), mirrored.roll(1, 0), value)


def _one(value: Tensor, width: int, k: int) -> Tensor:
    """Of one particle; particles are the dimension that is `width` from the right, if it is there."""
    return value.select(-width, k) if value.dim() >= width and value.shape[-width] > 1 else value


def _log_prob(site: dict) -> Tensor | None:
    """log p of a site; None where it has none that could be compared."""
    if isinstance(site["fn"], dist.Delta):
        return None
    try:
        value = site_log_prob(site)
    except Exception:  # flows that cannot be inverted; wrong shapes, which the tools speak about
        return None
    return value if torch.isfinite(value).all() else None
