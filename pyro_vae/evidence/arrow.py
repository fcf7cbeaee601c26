r"""A Gaussian over global and local latents, locals independent of each other given the globals.

Global latents g (Dg numbers) and local latents u_n (D numbers for each of N data points) have

    q(g, u) = N(g; m, L Lᵀ) Π_n N(u_n; a_n + B_n (g − m), C_n C_nᵀ).

Its precision matrix is an arrow: a block for the globals, one for each point, and those between. Work and memory are
linear in N, where a dense covariance of 6000 latents has 36 million entries.

The fit is variational, by natural-gradient steps as in `pyro_vae.evidence.adaptive`. With f = log p(g, u, x) and H its
expected Hessian in the coordinates ε of the current Gaussian, g = m + L ε_g and u_n = a_n + B_n L ε_g + C_n ε_n, a step
of size ρ is

    P_n = (1 − ρ) I − ρ H_nn,                                            C_n ← C_n P_n^(−½)
    B_n ← B_n + ρ C_n P_n⁻¹ H_ng L⁻¹
    Λ = (1 − ρ) I − ρ (H_gg − Σ_n H_gn H_nn⁻¹ H_ng),                     L ← L Λ^(−½)
    m ← m + ρ L Λ⁻¹ E (∇_g − Σ_n H_gn H_nn⁻¹ ∇_n) f,                     a_n ← a_n + ρ C_n P_n⁻¹ E ∇_n f + B_n Δm.

It damps p(g|x) and p(u_n|g, x) by themselves, rather than the joint precision: a mean of two joint precisions of which
one lacks the N blocks between locals and globals would be far too narrow for the globals. Both rest at the same point.

The blocks of H are regressions of gradients on draws. The draws come in pairs ±ε and are made orthonormal for each
point, Σ_k (ε_g, ε_n)(ε_g, ε_n)ᵀ = K I. Then the sum over N points in the gradient of the globals does not disturb its
slope, and all is exact if f is a polynomial of degree three in which each term has the globals and one point's locals.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, pi, sqrt
from typing import Protocol

import torch
from torch import Tensor

from pyro_vae.evidence.proposals import Gaussians

__all__ = ["Arrow", "JointDensity", "fit_arrow", "good_width"]

FIRST_DRAWS = 100  # of the guide, whose moments start the fit
FIRST_SCALE = 0.1  # standard deviation at the start where the guide has none, as an AutoDelta
SPARE_DRAWS = 8  # pairs of draws more than there are slopes: their residuals give the error of the slopes
MOST_WIDE = 1.05  # factor of the standard deviations in few dimensions, as in `adaptive`


class JointDensity(Protocol):
    """What the fit needs of a model with Dg global latents and D local ones at each of N points, all unconstrained."""

    global_dim: int
    dim: int
    num_points: int

    def draw(self, num_particles: int) -> tuple[Tensor, Tensor]:
        """g (K, Dg) and u (K, N, D) from the guide; NaN where not defined."""

    def gradient(self, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of log p(g) + Σ_n log p(u_n, x_n|g), (K, Dg) and (K, N, D)."""


@dataclass(frozen=True)
class Arrow:
    """The Gaussian at the top of this module. Dg or D may be zero.

    Attributes:
        loc: m, (Dg,).
        scale_tril: L, (Dg, Dg), any square root of the covariance of the globals.
        local_loc: a_n, (N, D).
        slope: B_n, (N, D, Dg).
        local_scale_tril: C_n, (N, D, D), any square root of the covariance of u_n given the globals.
    """

    loc: Tensor
    scale_tril: Tensor
    local_loc: Tensor
    slope: Tensor
    local_scale_tril: Tensor

    def draw_globals(self, num_draws: int) -> Tensor:
        """g, (S, Dg)."""
        noise = torch.randn(num_draws, len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + noise @ self.scale_tril.mT

    def log_prob_globals(self, g: Tensor) -> Tensor:
        """log q(g) of g (S, Dg), (S,)."""
        return _log_normal((g - self.loc).unsqueeze(1), self.scale_tril.unsqueeze(0)).squeeze(1)

    def given(self, g: Tensor) -> Tensor:
        """Means of the locals given g (S, Dg), (S, N, D)."""
        return self.local_loc + _times(self.slope, g - self.loc)

    def draw_locals(self, g: Tensor) -> Tensor:
        """u given g (S, Dg), (S, N, D)."""
        mean = self.given(g)
        return mean + _times(self.local_scale_tril, torch.randn_like(mean))

    def log_prob_locals(self, u: Tensor, g: Tensor) -> Tensor:
        """log q(u_n|g) of u (S, N, D) and g (S, Dg), (S, N)."""
        return _log_normal(u - self.given(g), self.local_scale_tril)

    def widened(self, globals_by: float, locals_by: float) -> Arrow:
        """With the standard deviations of q(g) and of q(u_n|g) times these factors; see `good_width`."""
        scale, local_scale = globals_by * self.scale_tril, locals_by * self.local_scale_tril
        return Arrow(self.loc, scale, self.local_loc, self.slope, local_scale)

    def points(self, rows: slice | Tensor) -> Arrow:
        """Of some of the data points."""
        return Arrow(
            self.loc, self.scale_tril, self.local_loc[rows], self.slope[rows], self.local_scale_tril[rows]
        )


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


def fit_arrow(density: JointDensity, *, num_steps: int = 8, step_size: float = 0.7) -> Arrow:
    """Fits an `Arrow` to the posterior of globals and locals, starting at the moments of the guide.

    A step takes 2 max(16, Dg + D + 8) gradients of the log-joint. The top of this module has the equations.

    Args:
        density: the density of the latents.
        num_steps: number of natural-gradient steps.
        step_size: ρ, in (0, 1].

    Returns:
        `Arrow`. A point whose gradients are not finite keeps the moments of the guide, and so do the globals.
    """
    current = start = _start(density)
    for _ in range(num_steps):
        current = _step(density, current, start, step_size)
    return current


def _start(density: JointDensity) -> Arrow:
    g, u = density.draw(FIRST_DRAWS)
    first, locals_ = Gaussians.around(g.unsqueeze(1)), Gaussians.around(u)
    slope = u.new_zeros(*locals_.loc.shape, g.shape[-1])
    return Arrow(first.loc[0], _spread(first)[0], locals_.loc, slope, _spread(locals_))


def _spread(q: Gaussians) -> Tensor:
    std = q.scale_tril.diagonal(dim1=-2, dim2=-1)
    rounding = torch.finfo(std.dtype).eps * 100 * (1 + q.loc.abs())
    return torch.diag_embed(std.where(std > rounding, FIRST_SCALE))


@dataclass(frozen=True)
class _Blocks:
    """Expected gradients of f, and the blocks of its expected Hessian, in the coordinates ε; zero where not usable."""

    mean: Tensor  # (Dg,)
    local_mean: Tensor  # (N, D)
    gg: Tensor  # (Dg, Dg)
    nn: Tensor  # (N, D, D)
    ng: Tensor  # (N, D, Dg)
    error: Tensor  # covariance of each column of ng, (N, D, D)
    usable: Tensor  # (N,), bool


def _regress(density: JointDensity, q: Arrow) -> _Blocks:
    """Regresses gradients on draws of q: half of the difference of a pair ±ε has the slopes, its mean the means."""
    slopes = len(q.loc) + density.dim
    half = max(16, slopes + SPARE_DRAWS)
    noise, local_noise = _orthonormal(half, q)
    by_noise = q.slope @ q.scale_tril  # B_n L
    shift = noise @ q.scale_tril.mT
    local_shift = _times(by_noise, noise) + _times(q.local_scale_tril, local_noise)
    g = torch.cat([q.loc + shift, q.loc - shift])
    gradient, local_gradient = density.gradient(g, torch.cat([q.local_loc + local_shift, q.local_loc - local_shift]))
    gradient = gradient @ q.scale_tril + torch.einsum("nij,kni->kj", by_noise, local_gradient)
    local_gradient = _times(q.local_scale_tril.mT, local_gradient)

    odd, local_odd = ((x[:half] - x[half:]) / 2 for x in (gradient, local_gradient))
    nn = torch.einsum("kni,knj->nij", local_odd, local_noise) / half
    ng = torch.einsum("kni,kj->nij", local_odd, noise) / half
    residual = local_odd - _times(nn, local_noise) - _times(ng, noise)
    error = torch.einsum("kni,knj->nij", residual, residual) / (half * (half - slopes))
    local_mean = local_gradient.mean(0)
    usable = torch.cat([local_mean, error.flatten(1)], 1).isfinite().all(1)
    local_mean = local_mean.where(usable[:, None], 0)
    nn, ng, error = (x.where(usable[:, None, None], 0) for x in ((nn + nn.mT) / 2, ng, error))
    return _Blocks(gradient.mean(0), local_mean, odd.mT @ noise / half, nn, ng, error, usable)


def _step(density: JointDensity, q: Arrow, start: Arrow, size: float) -> Arrow:
    """One step of the size ρ, by the equations at the top of this module."""
    blocks = _regress(density, q)
    root, inverse = _roots(blocks.nn, size)
    local_step = _limited(size * torch.einsum("nij,nj->ni", inverse, blocks.local_mean))
    slope = q.slope + size * q.local_scale_tril @ inverse @ blocks.ng @ torch.linalg.inv(q.scale_tril)

    profile = _roots(blocks.nn, 1.0)[1]  # (−H_nn)⁻¹
    # the error of a slope does not average out in its square: summed over the points, it would widen the globals
    error = torch.einsum("nij,nij->", profile, blocks.error) * torch.eye(len(q.loc)).to(q.loc)
    hessian = blocks.gg + torch.einsum("nij,nik,nkl->jl", blocks.ng, profile, blocks.ng) - error
    mean = blocks.mean + torch.einsum("nij,nik,nk->j", blocks.ng, profile, blocks.local_mean)
    loc, scale_tril = start.loc, start.scale_tril
    if hessian.isfinite().all() and mean.isfinite().all():
        global_root, global_inverse = _roots((hessian + hessian.mT) / 2, size)
        loc = q.loc + q.scale_tril @ _limited(size * global_inverse @ mean)
        scale_tril = q.scale_tril @ global_root

    local_loc = q.local_loc + torch.einsum("nij,nj->ni", q.local_scale_tril, local_step) + slope @ (loc - q.loc)
    usable = blocks.usable[:, None, None]
    return Arrow(
        loc,
        scale_tril,
        torch.where(blocks.usable[:, None], local_loc, start.local_loc),
        torch.where(usable, slope, start.slope),
        torch.where(usable, q.local_scale_tril @ root, start.local_scale_tril),
    )


def _roots(hessian: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """P^(−½) and P⁻¹ of P = (1 − ρ) I − ρ H, with eigenvalues of at least ¼; for P^(−½), of at most 16 also.

    A step at most doubles a standard deviation, and at most quarters it.
    """
    identity = torch.eye(hessian.shape[-1]).to(hessian)
    values, vectors = torch.linalg.eigh((1 - size) * identity - size * hessian)
    values = values.clamp(min=0.25).unsqueeze(-2)
    return vectors * values.clamp(max=16.0).rsqrt(), vectors / values @ vectors.mT


def _limited(step: Tensor) -> Tensor:
    """A step in the coordinates ε, no longer than a typical draw."""
    return step * (sqrt(step.shape[-1]) / step.norm(dim=-1, keepdim=True)).clamp(max=1.0).nan_to_num(1.0)


def _orthonormal(count: int, q: Arrow) -> tuple[Tensor, Tensor]:
    """ε_g (count, Dg) and ε_n (count, N, D), with Σ_k (ε_g, ε_n)(ε_g, ε_n)ᵀ = count I for each point."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(count, *shape, dtype=q.loc.dtype, device=q.loc.device)

    noise = _whitened(draw(1, len(q.loc)))[:, 0]
    local_noise = draw(*q.local_loc.shape)
    local_noise = local_noise - torch.einsum("ki,li,lnj->knj", noise, noise, local_noise) / count
    return noise, _whitened(local_noise)


def _whitened(draws: Tensor) -> Tensor:
    """Linear combinations of draws (K, N, D) with second moments I."""
    root = torch.linalg.cholesky(torch.einsum("kni,knj->nij", draws, draws) / len(draws))
    return _times(torch.linalg.inv(root), draws)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Matrices (N, I, J) times vectors (K, N, J) or (K, J), (K, N, I)."""
    return torch.einsum("nij,knj->kni" if vectors.dim() == 3 else "nij,kj->kni", matrices, vectors)


def _log_normal(deviation: Tensor, root: Tensor) -> Tensor:
    """log N(deviation; 0, root rootᵀ) of (S, N, D), root (N, D, D), (S, N)."""
    noise = _times(torch.linalg.inv(root), deviation)
    log_det = torch.linalg.slogdet(root).logabsdet
    return -0.5 * noise.square().sum(-1) - 0.5 * noise.shape[-1] * log(2 * pi) - log_det
