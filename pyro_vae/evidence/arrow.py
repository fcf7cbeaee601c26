r"""Fits an `Arrow`, a Gaussian over globals and locals with arrow-shaped precision, in work linear in the data.

The fit is variational, by natural-gradient steps as in `pyro_vae.evidence.adaptive`. With f = log p(g, u, x) and H its
expected Hessian in the coordinates ε of the current Gaussian, g = m + L ε_g and u_n = a_n + B_n L ε_g + C_n ε_n, a step
of size ρ is

    P_n = (1 − ρ) I − ρ H_nn,                          C_n ← C_n P_n^(−½),    a_n ← a_n + ρ C_n P_n⁻¹ E ∇_n f + B_n Δm,
                                                       B_n ← B_n + ρ C_n P_n⁻¹ H_ng L⁻¹,
    Λ = (1 − ρ) I − ρ (H_gg − Σ_n H_gn H_nn⁻¹ H_ng),   L ← L Λ^(−½),   m ← m + ρ L Λ⁻¹ E (∇_g − Σ_n H_gn H_nn⁻¹ ∇_n) f.

with |H| in place of −H, of the absolute eigenvalues: where the curvature has the wrong sign, q is too wide for it.
It damps p(g|x) and p(u_n|g, x) by themselves, rather than the joint precision: a mean of two joint precisions of which
one lacks the blocks between locals and globals would be far too narrow for the globals. Both rest at the same point.

That point is too narrow for globals that scale the locals, if R = 0: N points, whose spread does not follow g, speak
against each other value of it. So last steps follow, in which R_n is the slope of the log standard deviations given g,

    R_n L = −¼ (log P_n(m + L e_j) − log P_n(m − L e_j))_j,    P_n(g) the diagonal of −E_{q(u_n|g)} ∂²f/∂ε_n²,

and N(m, L Lᵀ) is fitted to p(g|x) itself, the locals of each point integrated by importance sampling from q(u_n|g): by
Fisher's identity, with weights w_nk = p(u_nk, x_n|g) / q(u_nk|g),

    ∇ log p(g, x) = ∇ log p(g) + Σ_n Σ_k w_nk ∇_g log p(u_nk, x_n|g) / Σ_k w_nk.

The blocks of H are regressions of gradients on draws. The draws come in pairs ±ε and are made orthonormal for each
point, Σ_k (ε_g, ε_n)(ε_g, ε_n)ᵀ = K I. Then the sum over N points in the gradient of the globals does not disturb its
slope, and all is exact if f is a polynomial of degree three in which each term has the globals and one point's locals.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, inf, log2, sqrt
from typing import Protocol

import torch
from torch import Tensor

from pyro_vae.evidence.proposals import Gaussians
from pyro_vae.evidence.structured import Arrow, good_width, normal, stratified, times

__all__ = ["Arrow", "JointLogDensity", "fit_arrow", "good_width"]

FIRST_DRAWS = 100  # of the guide, whose moments start the fit
FIRST_SCALE = 0.1  # standard deviation at the start where the guide has none, as an AutoDelta
MOST_INTEGRATED = 7  # steps
WORSE = 0.5  # nats, by which the bound on log p(x) may fall from one integrated step to another, as of noise
SPARE_DRAWS = 8  # pairs of draws more than there are slopes: their residuals give the error of the slopes


class JointLogDensity(Protocol):
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


def fit_arrow(density: JointLogDensity, *, num_steps: int = 8, step_size: float = 0.7) -> Arrow:
    """Fits an `Arrow` to the posterior of globals and locals, starting at the moments of the guide.

    The top of this module has the equations. A step takes 2 max(16, Dg + D + 8) gradients of the log-joint. Up to seven
    integrated steps follow, until the globals have settled; each takes about 4 max(8, Dg + 4) max(32, D + 8) gradients
    more. The last one at which the bound on log p(x) has not fallen is given back.

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
    best, largest = current, -inf
    for i in range(MOST_INTEGRATED):
        current = _with_scales(density, _move_locals(current, _regress(density, current), start, step_size))
        marginal, bound = _integrate(density, current)
        if not bound >= largest - WORSE:  # also if it is NaN
            break
        before, best, largest = best, current, max(bound, largest)
        if i >= 3 and _has_settled(before, best):
            break
        current = _move_globals(current, marginal, current, step_size)
    return best


def _has_settled(before: Arrow, after: Arrow) -> bool:
    """Whether the globals moved by less than a quarter of a standard deviation, and their variances by a fifth."""
    moved = torch.linalg.solve(after.scale_tril, after.loc - before.loc).square().mean()
    ratio = torch.linalg.solve(after.scale_tril, before.scale_tril)
    return bool(moved < 0.25**2) and bool((ratio @ ratio.mT - torch.eye(len(ratio)).to(ratio)).abs().max() < 0.2)


def _start(density: JointLogDensity) -> Arrow:
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


def _regress(density: JointLogDensity, q: Arrow) -> _Blocks:
    """Regresses gradients on draws of q: half of the difference of a pair ±ε has the slopes, its mean the means."""
    slopes = len(q.loc) + density.dim
    half = max(16, slopes + SPARE_DRAWS)
    noise, local_noise = _orthonormal(half, q)
    by_noise = q.slope @ q.scale_tril  # B_n L
    shift = noise @ q.scale_tril.mT
    local_shift = times(by_noise, noise) + times(q.local_scale_tril, local_noise)
    g = torch.cat([q.loc + shift, q.loc - shift])
    gradient, local_gradient = density.gradient(g, torch.cat([q.local_loc + local_shift, q.local_loc - local_shift]))
    gradient = gradient @ q.scale_tril + torch.einsum("nij,kni->kj", by_noise, local_gradient)
    local_gradient = times(q.local_scale_tril.mT, local_gradient)
    usable = local_gradient.isfinite().all(-1).all(0)
    local_gradient = local_gradient.where(usable[:, None], 0)

    mean, even, odd = _even_and_odd(local_gradient)
    nn = torch.einsum("kni,knj->nij", odd, local_noise) / half
    ng = torch.einsum("kni,kj->nij", odd, noise) / half
    odd = odd - times(nn, local_noise) - times(ng, noise)
    reach = _reach(even, odd, torch.cat([nn, ng], -1))

    profile = _roots(_symmetric(nn), 1.0)[1]  # (−H_nn)⁻¹
    # the error of a slope does not average out in its square: summed over the points, it would widen the globals
    error = torch.einsum("kni,kni->", odd, times(profile, odd)) / (half * (half - slopes))
    along = _Marginal.of(gradient + torch.einsum("nji,kni->kj", ng.mT @ profile, local_gradient), noise)
    marginal = _Marginal(along.mean, along.hessian - error * torch.eye(len(q.loc)).to(error), along.reach)
    return _Blocks(mean, _symmetric(nn), ng, reach, usable, marginal)


def _with_scales(density: JointLogDensity, q: Arrow) -> Arrow:
    """With R_n. The same ε_n at both ends, so that their noise does not add up over the points."""
    noise = _orthonormal(max(16, density.dim + SPARE_DRAWS), replace(q, loc=q.loc[:0]))[1]
    noise = torch.cat([noise, -noise])
    q, slopes = replace(q, log_scale_slope=None), []
    for step in q.scale_tril.mT:
        ends = []
        for g in (q.loc + step, q.loc - step):
            local = density.gradient(g.expand(len(noise), -1), q.locals_at(noise, g.unsqueeze(0)))[1]
            curvature = -(times(q.local_scale_tril.mT, local) * noise).mean(0)
            ends.append(curvature.clamp(0.25, 16.0).log())
        slopes.append((0.25 * (ends[1] - ends[0])).clamp(-0.5, 0.5).nan_to_num(0.0))
    return replace(q, log_scale_slope=torch.stack(slopes, -1) @ torch.linalg.inv(q.scale_tril))


def _integrate(density: JointLogDensity, q: Arrow) -> tuple[_Marginal, float]:
    """Regresses gradients of log p(g, x) on draws of q(g), all with the same ε_n: their noise is the same, too.

    Also gives E log p(g, x) − log q(g), up to a constant.
    """
    noise = _whitened(normal(q.loc, max(8, len(q.loc) + SPARE_DRAWS // 2), 1, len(q.loc)))[:, 0]
    count = 2 ** ceil(log2(max(32, density.dim + SPARE_DRAWS)))
    local_noise = _whitened(stratified(q.loc, 2 * count, *q.local_loc.shape))
    log_q = -0.5 * local_noise.square().sum(-1)  # up to a constant of each point
    gradients, values = [], []
    for g in (q.loc + torch.cat([noise, -noise]) @ q.scale_tril.mT).split(1):
        u = q.locals_at(local_noise, g)
        with torch.enable_grad():
            g = g.detach().requires_grad_()
            prior, conditional = density.log_joint(g.expand(len(u), -1), u)
            value = prior.mean() + (conditional - log_q).logsumexp(0).sum()
            gradients.append(torch.autograd.grad(value, g)[0])
        values.append(value.detach() + q.log_scale(g.detach()).sum())
    bound = torch.stack(values).double().mean() + torch.linalg.slogdet(q.scale_tril).logabsdet
    bound = bound + torch.linalg.slogdet(q.local_scale_tril).logabsdet.double().sum()
    return _Marginal.of(torch.cat(gradients) @ q.scale_tril, noise), bound.item()


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
    grown = q.log_scale(loc.unsqueeze(0))[0].exp().unsqueeze(-2)
    local_loc, local_scale_tril = q.given(loc.unsqueeze(0))[0], q.local_scale_tril * grown
    return Arrow(loc, scale_tril, local_loc, q.slope, local_scale_tril, q.log_scale_slope)


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
    """P^(−½) and P⁻¹ of P = (1 − ρ) I + ρ |H|, where |H| has the absolute eigenvalues, with eigenvalues of at least ¼.

    For P^(−½) they are at most 16, too: a step at most doubles a standard deviation, and at most quarters it. Where the
    curvature has the wrong sign, q is too wide for it, and the absolute value makes it narrower.
    """
    values, vectors = torch.linalg.eigh(hessian)
    values = (1 - size + size * values.abs()).clamp(min=0.25).unsqueeze(-2)
    return vectors * values.clamp(max=16.0).rsqrt(), vectors / values @ vectors.mT


def _limited(step: Tensor, reach: Tensor) -> Tensor:
    """A step in the coordinates ε, no longer than `reach` times a typical draw."""
    longest = reach * sqrt(step.shape[-1])
    return step * (longest / step.norm(dim=-1).clamp(min=1e-30)).clamp(max=1.0).unsqueeze(-1)


def _orthonormal(count: int, q: Arrow) -> tuple[Tensor, Tensor]:
    """ε_g (count, Dg) and ε_n (count, N, D), with Σ_k (ε_g, ε_n)(ε_g, ε_n)ᵀ = count I for each point."""
    noise = _whitened(normal(q.loc, count, 1, len(q.loc)))[:, 0]
    local_noise = normal(q.loc, count, *q.local_loc.shape)
    local_noise = local_noise - torch.einsum("ki,li,lnj->knj", noise, noise, local_noise) / count
    return noise, _whitened(local_noise)


def _whitened(draws: Tensor) -> Tensor:
    """Linear combinations of draws (K, N, D) with second moments I."""
    root = torch.linalg.cholesky(torch.einsum("kni,knj->nij", draws, draws) / len(draws))
    return times(torch.linalg.inv(root), draws)
