r"""The latents of a model's data points, as one vector u_n ∈ R^D for each.

A site in the data plate has the coordinates of its support's bijection, those of inner plates one after the other; the
sites follow each other as in the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from pyro_vae.pairs.supports import bijection

__all__ = ["Latent", "Latents", "coordinates_outside"]


@dataclass(frozen=True)
class Latent:
    """One latent site of the data points.

    Attributes:
        name: of the site.
        start: of its coordinates in u.
        shape: of its coordinates: unconstrained values have other event shapes than values.
        dim: of the data plate, negative.
        inner: dims of plates inside a data point, from left to right.
        sizes: of these.
        nesting: dimensions that the plates of the model take; what is to the left belongs to particles.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    dim: int
    inner: tuple[int, ...]
    sizes: tuple[int, ...]
    nesting: int

    @property
    def size(self) -> int:
        return prod(self.sizes) * prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.size

    def to_rows(self, u: Tensor) -> Tensor:
        """(*particles, *plates, *shape) as (*particles, N, size)."""
        batch = u.shape[: u.dim() - len(self.shape)]
        if self.dim == -1 and not self.inner and batch[-self.nesting :] == batch[self.dim :] and len(self.shape) == 1:
            return u  # the same object: a distribution knows its own draws
        u = u.reshape((1,) * (self.nesting - len(batch)) + u.shape)
        left = u.dim() - len(self.shape) - self.nesting
        own = [left + self.nesting + d for d in (self.dim, *self.inner)]
        rest = [left + i for i in range(self.nesting) if left + i not in own]  # of size one
        event = range(left + self.nesting, u.dim())
        u = u.permute(*range(left), *own, *event, *rest)
        return u.reshape(*u.shape[: left + 1], self.size)

    def from_rows(self, u: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """(*particles, N, size) as (*particles, *plates, *shape); with `shape`, (*particles, N, *shape) likewise."""
        inner, event = (self.inner, self.shape) if shape is None else ((), shape)
        left = u.dim() - 2 if shape is None else u.dim() - 1 - len(event)
        if not inner and self.nesting == 1 and (shape is not None or len(event) == 1):
            return u
        if shape is None:
            u = u.reshape(*u.shape[:-1], *self.sizes, *event)
        rest = [d for d in range(-self.nesting, 0) if d not in (self.dim, *inner)]
        u = u[(..., *(None for _ in rest))]
        where = {d: left + i for i, d in enumerate((self.dim, *inner))} | {
            d: u.dim() - len(rest) + i for i, d in enumerate(rest)
        }
        first = left + 1 + len(inner)
        u = u.permute(*range(left), *(where[d] for d in range(-self.nesting, 0)), *range(first, first + len(event)))
        surplus = 0 if left else self.nesting + min(self.dim, *inner, 0)  # without particles, no more than its plates
        return u[(0,) * surplus]


@dataclass(frozen=True)
class Latents:
    """The latents of a model.

    Attributes:
        inside: the plate, in the order of the model.
        outside: names of continuous latents outside of it.
        left_out: names of discrete latents that are summed out.
        centre, spread: of each coordinate of u under the prior, (D,).
        given_centre, given_spread: the same of the latents outside that q is conditioned on, (G,).
    """

    inside: tuple[Latent, ...]
    outside: tuple[str, ...]
    left_out: tuple[str, ...]
    centre: Tensor
    spread: Tensor
    given_centre: Tensor
    given_spread: Tensor

    @property
    def dim(self) -> int:
        return self.inside[-1].stop

    @property
    def nesting(self) -> int:
        """Dimensions that the plates of the model take."""
        return self.inside[0].nesting


def coordinates_outside(name: str, fn: Any, value: Tensor, nesting: int) -> Tensor:
    """Unconstrained values of a site outside of the plate as (*particles, 1, size)."""
    batch = value.shape[: value.dim() - len(fn.event_shape)]
    return bijection(name, fn).inv(value).reshape(*batch[: max(0, len(batch) - nesting)], 1, -1)
