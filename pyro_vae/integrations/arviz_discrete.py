"""Discrete latents that a guide leaves to enumeration: draws of them, exact given the others."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from torch import Tensor

from pyro_vae.integrations.arviz_sites import Variable
from pyro_vae.pairs.handlers import SetSubsample
from pyro_vae.pairs.vectorized import PARTICLE_PLATE
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["draw_summed"]


def draw_summed(
    sampler: ParticleSampler, values: dict[str, Tensor], variables: dict[str, Variable], num_particles: int, rows: slice
) -> dict[str, Tensor]:
    """Draws of the latents that the guide leaves to enumeration, exact given the values of the others."""
    names, width = sampler.pair.summed, sampler.layout.width
    args, kwargs = sampler.rows.cut(rows)
    indices = {} if sampler.rows.fixed is None else {sampler.layout.plate: sampler.rows.subsample(rows)}

    def draw(given: dict[str, Tensor], nesting: int, plate: Any) -> dict[str, Tensor]:
        model = poutine.infer_config(
            poutine.condition(sampler.model, given),
            lambda site: {"enumerate": "parallel" if site["name"] in names else None},
        )
        inferred = infer_discrete(plate(model), first_available_dim=-1 - nesting)
        with pyro.validation_enabled(False), poutine.block(), SetSubsample(indices):
            nodes = poutine.trace(inferred).get_trace(*args, **kwargs).nodes
        return {name: nodes[name]["value"] for name in names}

    if not sampler.serial:
        return draw(values, width, pyro.plate(PARTICLE_PLATE, num_particles, dim=-width))
    single: dict[str, list[Tensor]] = {name: [] for name in names}
    for k in range(num_particles):
        given = {name: _right(value[k], variables[name].dims) for name, value in values.items()}
        for name, value in draw(given, width - 1, lambda model: model).items():
            single[name].append(_right(value, width - 1 + variables[name].event_dim))
    return {name: torch.stack(parts) for name, parts in single.items()}


def _right(value: Tensor, dims: int) -> Tensor:
    """A value with this many dimensions: others on its left have size one."""
    return value.reshape((1,) * (dims - value.dim()) + value.shape[max(0, value.dim() - dims) :])
