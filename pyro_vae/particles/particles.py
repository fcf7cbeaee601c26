"""`Particles`: K weighted draws for each of N data points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Particles", "chosen", "concatenate"]


@dataclass(frozen=True)
class Particles:
    """K weighted draws for each of N data points.

    Attributes:
        latents: {site: (K, N, *inner plates, *event)}.
        log_prior: log p(z), (K, N), nats.
        log_likelihood: log p(x|z), (K, N), nats.
        log_posterior: log q(z|x), (K, N), nats.
    """

    latents: dict[str, Tensor]
    log_prior: Tensor
    log_likelihood: Tensor
    log_posterior: Tensor

    @property
    def log_weight(self) -> Tensor:
        """log p(z) + log p(x|z) − log q(z|x), (K, N), nats; E exp(log_weight) = p(x)."""
        return self.log_prior + self.log_likelihood - self.log_posterior


def concatenate(parts: list[Particles]) -> Particles:
    """The same numbers of particles of different data points, together."""
    latents = {name: torch.cat([p.latents[name] for p in parts], 1) for name in parts[0].latents}
    rest = ("log_prior", "log_likelihood", "log_posterior")
    return Particles(latents, *(torch.cat([getattr(p, field) for p in parts], 1) for field in rest))


def chosen(value: Tensor, index: Tensor) -> Tensor:
    """Of values of K particles (K, N or 1, …) those with the indices (S, N), (S, N, …)."""
    value = value.expand(len(value), index.shape[1], *value.shape[2:])
    index = index.reshape(*index.shape, *(1,) * (value.dim() - 2)).expand(-1, -1, *value.shape[2:])
    return value.gather(0, index)
