r"""A Gaussian over global and local latents, locals independent of each other given the globals.

Global latents g (Dg numbers) and local latents u_n (D numbers for each of N data points) have

    q(g, u) = N(g; m, L Lᵀ) Π_n N(u_n; a_n + B_n (g − m), C_n C_nᵀ).

Its precision matrix is an arrow: a block for the globals, one for each point, and those between. Work and memory are
linear in N, where a dense covariance of 6000 latents has 36 million entries.

The fit is variational, by natural-gradient steps as in `pyro_vae.evidence.adaptive`. With f = log p(g, u, x) and H its
expected Hessian in the coordinates ε of the current Gaussian, g = m + L ε_g and u_n = a_n + B_n L ε_g + C_n ε_n, a step
of size ρ is

    P_n = (1 − ρ) I − ρ H_nn,                          C_n ← C_n P_n^(−½),    a_n ← a_n + ρ C_n P_n⁻¹ E ∇_n f + B_n Δm,
                                                       B_n ← B_n + ρ C_n P_n⁻¹ H_ng L⁻¹,
    Λ = (1 − ρ) I − ρ (H_gg − Σ_n H_gn H_nn⁻¹ H_ng),   L ← L Λ^(−½),   m ← m + ρ L Λ⁻¹ E (∇_g − Σ_n H_gn H_nn⁻¹ ∇_n) f.

It damps p(g|x) and p(u_n|g, x) by themselves, rather than the joint precision: a mean of two joint precisions of which
one lacks the blocks between locals and globals would be far too narrow for the globals. Both rest at the same point.

That point is too narrow for globals that scale the locals: C_n does not depend on g, and N points that do not fit speak
against each other value of g. So the last steps fit N(m, L Lᵀ) to p(g|x) itself, the locals of each point integrated by
importance sampling from q(u_n|g): by Fisher's identity, with weights w_nk = p(u_nk, x_n|g) / q(u_nk|g),

    ∇ log p(g, x) = ∇ log p(g) + Σ_n Σ_k w_nk ∇_g log p(u_nk, x_n|g) / Σ_k w_nk.

The blocks of H are regressions of gradients on draws. The draws come in pairs ±ε and are made orthonormal for each
point, Σ_k (ε_g, ε_n)(ε_g, ε_n)ᵀ = K I. Then the sum over N points in the gradient of the globals does not disturb its
slope, and all is exact if f is a polynomial of degree three in which each term has the globals and one point's locals.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log, pi, sqrt
from typing import Protocol

import torch
from torch import Tensor

from pyro_vae.evidence.proposals import Gaussians

__all__ = ["Arrow", "JointDensity", "fit_arrow", "good_width"]

FIRST_DRAWS = 100  # of the guide, whose moments start the fit
FIRST_SCALE = 0.1  # standard deviation at the start where the guide has none, as an AutoDelta
MOST_INTEGRATED = 12  # steps
SPARE_DRAWS = 8  # pairs of draws more than there are slopes: their residuals give the error of the slopes
MOST_WIDE = 1.05  # factor of the standard deviations in few dimensions, as in `adaptive`


class JointDensity(Protocol):
    """What the fit needs of a model with Dg global latents and D local ones at each of N points, all unconstrained."""

    global_dim: int
    dim: int
    num_points: int

    def draw(self, num_particles: int) -> tuple[Tensor, Tensor]:
        """g (K, Dg) and u (K, N, D) from the guide; NaN where not defined."""

    def log_joint(self, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(g) (K,) and log p(u_n, x_n|g) (K, N), differentiable in g."""

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
        return self.loc + _noise(self.loc, num_draws, len(self.loc)) @ self.scale_tril.mT

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
        return Arrow(self.loc, self.scale_tril, self.local_loc[rows], self.slope[rows], self.local_scale_tril[rows])


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

    The top of this module has the equations. A step takes 2 max(16, Dg + D + 8) gradients of the log-joint. Up to twelve
    integrated steps follow, until one moves the globals by less than a quarter of a standard deviation; each takes
    4 max(8, Dg + 4) max(16, D + 8) gradients more.

    Args:
        density: the density of the latents.
        num_steps: number of natural-gradient steps for the joint density.
        step_size: ρ, in (0, 1].

    Returns:
        `Arrow`. A point whose gradients are not finite keeps the moments of the guide, and so do the globals in the
        first steps; in the integrated ones they stay where they are.
    """
    current = start = _start(density)
    for _ in range(num_steps):
        blocks = _regress(density, current)
        current = _move_globals(_move_locals(current, blocks, start, step_size), blocks.marginal, start, step_size)
    if not (density.global_dim and density.dim):  # nothing to integrate, or for nothing
        return current
    for i in range(MOST_INTEGRATED):
        before = current = _move_locals(current, _regress(density, current), start, step_size)
        current = _move_globals(current, _integrate(density, current), current, step_size)
        moved = torch.linalg.solve(current.scale_tril, current.loc - before.loc).square().mean().sqrt()
        if i >= 2 and moved < 0.25:
            break
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
class _Marginal:
    """Expected gradient and Hessian of log p(g|x) in the coordinates ε_g, or of the Gaussian with the Hessian of f."""

    mean: Tensor  # (Dg,)
    hessian: Tensor  # (Dg, Dg)
    reach: Tensor  # ()

    @classmethod
    def of(cls, gradient: Tensor, noise: Tensor) -> _Marginal:
        """From gradients (2 K, Dg) at ε_g = ±noise (K, Dg)."""
        mean, even, odd = _even_and_odd(gradient)
        slope = odd.mT @ noise / len(noise)
        return cls(mean, _symmetric(slope), _reach(even, odd - noise @ slope.mT, slope))


@dataclass(frozen=True)
class _Blocks:
    """Of the locals, and between locals and globals; zero at points that are not usable."""

    local_mean: Tensor  # (N, D)
    nn: Tensor  # (N, D, D)
    ng: Tensor  # (N, D, Dg)
    local_reach: Tensor  # (N,)
    usable: Tensor  # (N,), bool
    marginal: _Marginal


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
    usable = local_gradient.isfinite().all(-1).all(0)
    local_gradient = local_gradient.where(usable[:, None], 0)

    mean, even, odd = _even_and_odd(local_gradient)
    nn = torch.einsum("kni,knj->nij", odd, local_noise) / half
    ng = torch.einsum("kni,kj->nij", odd, noise) / half
    odd = odd - _times(nn, local_noise) - _times(ng, noise)
    reach = _reach(even, odd, torch.cat([nn, ng], -1))

    profile = _roots(_symmetric(nn), 1.0)[1]  # (−H_nn)⁻¹
    # the error of a slope does not average out in its square: summed over the points, it would widen the globals
    error = torch.einsum("nij,kni,knj->", profile, odd, odd) / (half * (half - slopes))
    along = _Marginal.of(gradient + torch.einsum("nji,kni->kj", ng.mT @ profile, local_gradient), noise)
    marginal = _Marginal(along.mean, along.hessian - error * torch.eye(len(q.loc)).to(error), along.reach)
    return _Blocks(mean, _symmetric(nn), ng, reach, usable, marginal)


def _integrate(density: JointDensity, q: Arrow) -> _Marginal:
    """Regresses gradients of log p(g, x) on draws of q(g), all with the same ε_n: their noise is the same, too."""
    noise = _whitened(_noise(q.loc, max(8, len(q.loc) + SPARE_DRAWS // 2), 1, len(q.loc)))[:, 0]
    half = _whitened(_noise(q.loc, max(16, density.dim + SPARE_DRAWS), *q.local_loc.shape))
    local_noise = torch.cat([half, -half])
    shift = _times(q.local_scale_tril, local_noise)
    log_q = -0.5 * local_noise.square().sum(-1)  # up to a constant
    gradients = []
    for g in (q.loc + torch.cat([noise, -noise]) @ q.scale_tril.mT).split(1):
        u = q.given(g) + shift
        with torch.enable_grad():
            g = g.detach().requires_grad_()
            prior, conditional = density.log_joint(g.expand(len(u), -1), u)
            value = prior.mean() + (conditional - log_q).logsumexp(0).sum()
            gradients.append(torch.autograd.grad(value, g)[0])
    return _Marginal.of(torch.cat(gradients) @ q.scale_tril, noise)


def _move_locals(q: Arrow, blocks: _Blocks, start: Arrow, size: float) -> Arrow:
    root, inverse = _roots(blocks.nn, size)
    step = _limited(size * (inverse @ blocks.local_mean.unsqueeze(-1)).squeeze(-1), blocks.local_reach)
    loc = q.local_loc + (q.local_scale_tril @ step.unsqueeze(-1)).squeeze(-1)
    turn = _limited((size * inverse @ blocks.ng).mT, blocks.local_reach.unsqueeze(-1)).mT
    slope = q.slope + q.local_scale_tril @ turn @ torch.linalg.inv(q.scale_tril)
    usable = blocks.usable[:, None, None]
    return Arrow(
        q.loc,
        q.scale_tril,
        torch.where(blocks.usable[:, None], loc, start.local_loc),
        torch.where(usable, slope, start.slope),
        torch.where(usable, q.local_scale_tril @ root, start.local_scale_tril),
    )


def _move_globals(q: Arrow, marginal: _Marginal, start: Arrow, size: float) -> Arrow:
    loc, scale_tril = start.loc, start.scale_tril
    if marginal.hessian.isfinite().all() and marginal.mean.isfinite().all():
        root, inverse = _roots(marginal.hessian, size)
        loc = q.loc + q.scale_tril @ _limited(size * inverse @ marginal.mean, marginal.reach)
        scale_tril = q.scale_tril @ root
    return Arrow(loc, scale_tril, q.local_loc + q.slope @ (loc - q.loc), q.slope, q.local_scale_tril)


def _even_and_odd(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over pairs of draws ±ε, and what is even in ε and odd in ε around it."""
    plus, minus = gradient.chunk(2)
    mean = gradient.mean(0)
    return mean, (plus + minus) / 2 - mean, (plus - minus) / 2


def _reach(even: Tensor, residual: Tensor, slope: Tensor) -> Tensor:
    """How far, in typical draws, a linear model of the gradient may be trusted: 1 or more, infinite if it is exact."""
    error = (even.square().sum(-1) + residual.square().sum(-1)).mean(0)
    return (0.5 * (slope.square().sum((-2, -1)) / error).sqrt()).nan_to_num(1.0, posinf=inf).clamp(min=1.0)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _roots(hessian: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """P^(−½) and P⁻¹ of P = (1 − ρ) I − ρ H, with eigenvalues of at least ¼; for P^(−½), of at most 16 also.

    A step at most doubles a standard deviation, and at most quarters it.
    """
    identity = torch.eye(hessian.shape[-1]).to(hessian)
    values, vectors = torch.linalg.eigh((1 - size) * identity - size * hessian)
    values = values.clamp(min=0.25).unsqueeze(-2)
    return vectors * values.clamp(max=16.0).rsqrt(), vectors / values @ vectors.mT


def _limited(step: Tensor, reach: Tensor) -> Tensor:
    """A step in the coordinates ε, no longer than `reach` times a typical draw."""
    longest = reach * sqrt(step.shape[-1])
    return step * (longest / step.norm(dim=-1).clamp(min=1e-30)).clamp(max=1.0).unsqueeze(-1)


def _orthonormal(count: int, q: Arrow) -> tuple[Tensor, Tensor]:
    """ε_g (count, Dg) and ε_n (count, N, D), with Σ_k (ε_g, ε_n)(ε_g, ε_n)ᵀ = count I for each point."""
    noise = _whitened(_noise(q.loc, count, 1, len(q.loc)))[:, 0]
    local_noise = _noise(q.loc, count, *q.local_loc.shape)
    local_noise = local_noise - torch.einsum("ki,li,lnj->knj", noise, noise, local_noise) / count
    return noise, _whitened(local_noise)


def _noise(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device)


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
