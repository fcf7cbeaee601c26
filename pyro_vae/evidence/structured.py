r"""A Gaussian over global and local latents, locals independent of each other given the globals.

Global latents g (Dg numbers) and local latents u_n (D numbers for each of N data points) have

    q(g, u) = N(g; m, L Lᵀ) Π_n N(u_n; a_n + B_n (g − m), C_n(g) C_n(g)ᵀ),    C_n(g) = C_n diag(exp(R_n (g − m))).

With R = 0 it is jointly Gaussian, and its precision matrix is an arrow: a block for the globals, one for each point,
and those between. R is for globals that scale the locals. Work and memory are linear in N, where a dense covariance of
6000 latents has 36 million entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log, pi, sqrt

import torch
from torch import Tensor

__all__ = ["Arrow", "good_width", "normal", "stratified", "times"]

MOST_WIDE = 1.05  # factor of the standard deviations in few dimensions, as in `adaptive`


@dataclass(frozen=True)
class Arrow:
    """The Gaussian at the top of this module. Dg or D may be zero.

    Attributes:
        loc: m, (Dg,).
        scale_tril: L, (Dg, Dg), any square root of the covariance of the globals.
        local_loc: a_n, (N, D).
        slope: B_n, (N, D, Dg).
        local_scale_tril: C_n, (N, D, D), any square root of the covariance of u_n given the globals, at g = m.
        log_scale_slope: R_n, (N, D, Dg), by which the columns of C_n grow; None for zero.
    """

    loc: Tensor
    scale_tril: Tensor
    local_loc: Tensor
    slope: Tensor
    local_scale_tril: Tensor
    log_scale_slope: Tensor | None = None

    def draw_globals(self, num_draws: int) -> Tensor:
        """g, (S, Dg)."""
        return self.loc + normal(self.loc, num_draws, len(self.loc)) @ self.scale_tril.mT

    def log_prob_globals(self, g: Tensor) -> Tensor:
        """log q(g) of g (S, Dg), (S,)."""
        return _log_normal((g - self.loc) @ torch.linalg.inv(self.scale_tril).mT, self.scale_tril)

    def given(self, g: Tensor) -> Tensor:
        """Means of the locals given g (S, Dg), (S, N, D)."""
        return self.local_loc + times(self.slope, g - self.loc)

    def log_scale(self, g: Tensor) -> Tensor:
        """R_n (g − m) of g (S, Dg), (S, N, D), within ±2: far from m a line says nothing."""
        if self.log_scale_slope is None:
            return torch.zeros((), dtype=g.dtype, device=g.device).expand(len(g), *self.local_loc.shape)
        return times(self.log_scale_slope, g - self.loc).clamp(-2.0, 2.0)

    def locals_at(self, noise: Tensor, g: Tensor) -> Tensor:
        """u of ε (S, N, D) and g (S, Dg) or (1, Dg), (S, N, D)."""
        return self.given(g) + times(self.local_scale_tril, self.log_scale(g).exp() * noise)

    def draw_locals(self, g: Tensor) -> Tensor:
        """u given g (S, Dg), (S, N, D)."""
        return self.locals_at(normal(self.loc, len(g), *self.local_loc.shape), g)

    def log_prob_locals(self, u: Tensor, g: Tensor) -> Tensor:
        """log q(u_n|g) of u (S, N, D) and g (S, Dg), (S, N)."""
        log_scale = self.log_scale(g)
        noise = times(torch.linalg.inv(self.local_scale_tril), u - self.given(g)) * (-log_scale).exp()
        return _log_normal(noise, self.local_scale_tril) - log_scale.sum(-1)

    def widened(self, globals_by: float, locals_by: float) -> Arrow:
        """With the standard deviations of q(g) and of q(u_n|g) times these factors; see `good_width`."""
        scale, local_scale = globals_by * self.scale_tril, locals_by * self.local_scale_tril
        return replace(self, scale_tril=scale, local_scale_tril=local_scale)

    def points(self, rows: slice | Tensor) -> Arrow:
        """Of some of the data points."""
        slope = None if self.log_scale_slope is None else self.log_scale_slope[rows]
        local = self.local_loc[rows], self.slope[rows], self.local_scale_tril[rows]
        return Arrow(self.loc, self.scale_tril, *local, slope)


def good_width(dim: int, *, variance: float = 0.1) -> float:
    r"""By how much to widen a fitted Gaussian whose draws are weighed in `dim` dimensions at once.

    Where the posterior is the Gaussian, draws that are w times as wide have log-weights −½ (w² − 1) |ε|² + const, with

        variance = D (w² − 1)² / 2,   so that   w = (1 + (2 variance / D)^½)^½.

    A fixed w = 1.05 gives a standard deviation of 0.07 nats for one latent, and 5.6 nats for 6000. This width keeps the
    variance at 0.1, which costs a tenth of the draws, and is at most 1.05 (up to 19 dimensions).

    Args:
        dim: dimensions that one weight is made of. D where locals are integrated point by point given the globals, Dg
            for the globals then; Dg + N D for both if one weight is made of all latents.
        variance: of the log-weights.

    Returns:
        The factor of the standard deviations, from 1 to 1.05.

    Example:
        >>> [round(good_width(dim), 3) for dim in (1, 100, 6000)]
        [1.05, 1.022, 1.003]
    """
    return min(MOST_WIDE, sqrt(1 + sqrt(2 * variance / max(dim, 1))))


def normal(like: Tensor, *shape: int) -> Tensor:
    """Draws of N(0, 1)."""
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def stratified(like: Tensor, num_particles: int, num_points: int, dim: int) -> Tensor:
    """ε of N(0, I) in pairs ±ε, (K, N, D): Sobol points, shifted at random for each data point, so without bias.

    Means of smooth functions are more precise than with independent draws: best in few dimensions and for K/2 a power
    of two.
    """
    sobol = torch.quasirandom.SobolEngine(dim).draw(num_particles // 2, dtype=torch.float64).to(like.device)
    shift = torch.rand(num_points, dim, dtype=torch.float64, device=like.device)
    uniform = (sobol.unsqueeze(1) + shift).remainder(1.0).clamp(1e-15, 1 - 1e-15)
    noise = torch.special.ndtri(uniform).to(like)
    return torch.cat([noise, -noise])


def times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Matrices (N, I, J) times vectors (K, N, J) or (K, J), (K, N, I)."""
    return torch.einsum("nij,knj->kni" if vectors.dim() == 3 else "nij,kj->kni", matrices, vectors)


def _log_normal(noise: Tensor, root: Tensor) -> Tensor:
    """log N(x; 0, root rootᵀ) at x = root noise, (…)."""
    log_det = torch.linalg.slogdet(root).logabsdet
    return -0.5 * noise.square().sum(-1) - 0.5 * noise.shape[-1] * log(2 * pi) - log_det
