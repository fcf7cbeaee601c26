r"""q(u|x) of each row's latents as a chain over sites, q(u|x) = Π_i q(u_i|u_<i, x).

Each factor is the distribution of one site, so that the site has a density at any value. A Gaussian with u = μ + L ε, L
lower triangular, has the factors

    q(u_i|u_<i, x) = N(μ_i + Σ_{j<i} L_ij ε_j, L_ii L_iiᵀ),    ε_j = L_jj⁻¹ (u_j − μ_j − Σ_{k<j} L_jk ε_k),

over blocks of sites; those of a flow are flows of their own, whose context includes u_<i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_vae.distributions.gaussians import MultivariateNormal

__all__ = ["Chain", "Chained", "FlowChain", "FullChain", "MeanFieldChain", "solve"]


class Chain(Protocol):
    """The factors of one row's latents, one site after the other."""

    def next(self, start: int, stop: int) -> Any:
        """q(u_i|u_<i, x) of the coordinates from `start` to `stop`, with batch shape (*particles, N)."""

    def observe(self, u: Tensor) -> None:
        """Takes the value of these coordinates, (*particles, N, stop − start)."""

    def joint(self, sizes: Sequence[int]) -> Any:
        """q(u|x) of all coordinates, of sites of these sizes; of a chain that has not begun."""


class MeanFieldChain:
    """Independent coordinates.

    Args:
        loc: μ, (*particles, N, D).
        scale: σ, (*particles, N, D).
    """

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale

    def next(self, start: int, stop: int) -> Any:
        return dist.Normal(self.loc[..., start:stop], self.scale[..., start:stop]).to_event(1)

    def observe(self, u: Tensor) -> None:
        pass

    def joint(self, sizes: Sequence[int]) -> Any:
        return dist.Normal(self.loc, self.scale).to_event(1)


class FullChain:
    """A Gaussian with full covariance.

    Args:
        loc: μ, (*particles, N, D).
        scale_tril: L, (*particles, N, D, D), lower triangular.
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        self.loc, self.scale_tril = loc, scale_tril
        self._noise: list[Tensor] = []
        self._factor: tuple[Tensor, Tensor] | None = None

    def next(self, start: int, stop: int) -> Any:
        loc, scale_tril = self.loc[..., start:stop], self.scale_tril[..., start:stop, start:stop]
        for at, noise in zip(self._starts(), self._noise, strict=True):
            block = self.scale_tril[..., start:stop, at : at + noise.shape[-1]]
            loc = loc + (block @ noise.unsqueeze(-1)).squeeze(-1)
        self._factor = loc, scale_tril
        return MultivariateNormal(loc, scale_tril, validate_args=False)

    def observe(self, u: Tensor) -> None:
        loc, scale_tril = self._factor
        done = sum(noise.shape[-1] for noise in self._noise) + u.shape[-1]
        if done < self.loc.shape[-1]:  # after the last one nobody asks
            self._noise.append(solve(scale_tril, u - loc))

    def joint(self, sizes: Sequence[int]) -> Any:
        return MultivariateNormal(self.loc, self.scale_tril, validate_args=False)

    def _starts(self) -> list[int]:
        sizes = [noise.shape[-1] for noise in self._noise]
        return [sum(sizes[:i]) for i in range(len(sizes))]


class FlowChain:
    """A flow for each site, given features of the row and the sites before it.

    Args:
        features: (*particles, N, F).
        flows: for each site, a function: context (*particles, N, F + coordinates before) -> q(u_i|context).
        centre, spread: of each coordinate, (D,): units in which the context has those before.
    """

    def __init__(self, features: Tensor, flows: Sequence[Callable], centre: Tensor, spread: Tensor) -> None:
        self.context, self._all = features, flows
        self._flows = iter(flows)
        self._units = centre, spread
        self._slice = slice(0, 0)

    def next(self, start: int, stop: int) -> Any:
        self._slice = slice(start, stop)
        return next(self._flows)(self.context)

    def observe(self, u: Tensor) -> None:
        centre, spread = (t[self._slice] for t in self._units)
        v, batch = (u - centre) / spread, torch.broadcast_shapes(self.context.shape[:-1], u.shape[:-1])
        self.context = torch.cat([self.context.expand(*batch, -1), v.expand(*batch, -1)], -1)

    def joint(self, sizes: Sequence[int]) -> Any:
        features = self.context
        return Chained(lambda: FlowChain(features, self._all, *self._units), sizes, features.shape[:-1])


class Chained(dist.TorchDistribution):
    """The joint distribution of all coordinates u of a chain, of batch shape (N,).

    Args:
        make: makes a new chain.
        sizes: of the sites.
        batch_shape: (N,), or with particles to the left.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, make: Callable[[], Chain], sizes: Sequence[int], batch_shape: Size) -> None:
        self._make, self._sizes = make, list(sizes)
        super().__init__(Size(batch_shape), Size([sum(sizes)]), validate_args=False)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Chained:
        return Chained(self._make, self._sizes, batch_shape)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:
        batch, chain, parts = Size(sample_shape) + self.batch_shape, self._make(), []
        for start, stop in self._slices():
            parts.append(chain.next(start, stop).expand(batch).rsample())
            chain.observe(parts[-1])
        return torch.cat(parts, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        chain, total = self._make(), value.new_zeros(())
        for start, stop in self._slices():
            part = value[..., start:stop]
            total = total + chain.next(start, stop).log_prob(part)
            chain.observe(part)
        return total

    def _slices(self) -> list[tuple[int, int]]:
        stops = [sum(self._sizes[: i + 1]) for i in range(len(self._sizes))]
        return [(stop - size, stop) for stop, size in zip(stops, self._sizes, strict=True)]


def solve(scale_tril: Tensor, value: Tensor) -> Tensor:
    """L⁻¹ v of L (…, N, D, D) and v (*particles, N, D)."""
    if scale_tril.dim() > 3 or value.dim() < 3:
        return torch.linalg.solve_triangular(scale_tril, value.unsqueeze(-1), upper=False).squeeze(-1)
    # particles are columns of one solve for each row, so that L is not copied for each of them
    columns = value.flatten(0, -3).permute(1, 2, 0)
    noise = torch.linalg.solve_triangular(scale_tril, columns, upper=False)
    return noise.permute(2, 0, 1).reshape(*value.shape[:-2], *noise.shape[:2])
