r"""Fits a Gaussian to the posterior of the latents of each data point, given those outside of the plate.

For globals θ ~ q(θ) with mean m and covariance L Lᵀ in unconstrained coordinates g, and locals u_n,

    q(u_n|g) = N(a_n + B_n (g − m), C_n C_nᵀ)   maximises   E_q(g) E_q(u_n|g) [log p(u_n, x_n|g) − log q(u_n|g)],

by natural-gradient steps of size ρ: with f = log p(u_n, x_n|g) and its expected Hessian H in the coordinates ε of the
current Gaussian, g = m + L ε_g and u_n = a_n + B_n L ε_g + C_n ε_n,

    P = (1 − ρ) I + ρ |H_nn|,   C ← C P^(−½),   a ← a + ρ C P⁻¹ E ∇_n f,   B ← B + ρ C P⁻¹ H_ng L⁻¹,

|H| with the absolute eigenvalues, as in `pyro_vae.evidence.arrow`. Without globals, B has no columns. First steps have
ρ = 0.7; as many with ρ = 1/2, 1/3, … follow, which average over the noise of the draws.

The best diagonal Gaussian has the diagonal of |H_nn| in P for the scales, and Newton's step for the mean; at the
optimum,

    E ∇_n f = 0,   1/s_d² = −E ∂²f/∂u_d².
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, sqrt

import torch
from torch import Tensor

from pyro_vae.evidence.structured import Arrow, normal, times

__all__ = ["Locals", "averaged", "better_of", "fit_locals", "log_weights", "split", "triangular"]

FIRST_STEP = 0.7  # ρ
FEWEST_DRAWS = 32  # pairs ±ε of a step
SPARE_DRAWS = 8  # pairs more than there are slopes
COMPARED = 200  # draws that tell which of two Gaussians has the larger ELBO
FLATTEST = 0.02  # curvature in the coordinates ε that Newton's step of a diagonal Gaussian divides by, at least


@dataclass(frozen=True)
class Locals:
    """What the fit needs of a model.

    Attributes:
        log_joint: g (K, Dg) and u (K, N, D) -> log p(u_n, x_n|g), (K, N), nats, differentiable in u.
        counts: numbers of draws for passes in bounded memory.
    """

    log_joint: Callable[[Tensor, Tensor], Tensor]
    counts: list[int]

    def gradient(self, g: Tensor, u: Tensor) -> Tensor:
        """∇_u log p(u_n, x_n|g), (K, N, D)."""
        found, size = [], max(1, max(self.counts) // 2)  # what is kept for the way back takes memory too
        for some_g, some_u in zip(g.split(size), u.split(size), strict=True):
            with torch.enable_grad():
                leaf = some_u.detach().requires_grad_()
                found.append(torch.autograd.grad(self.log_joint(some_g, leaf).sum(), leaf)[0])
        return torch.cat(found)


def fit_locals(density: Locals, start: Arrow, *, num_steps: int = 8, diagonal: bool = False) -> Arrow:
    """Fits q(u_n|g), by the equations at the top of this module; q(g) stays as it is.

    Args:
        density: the density of the locals.
        start: where the steps start.
        num_steps: number of steps of full size, and of those that average after them.
        diagonal: whether C_n is to be diagonal.

    Returns:
        `Arrow`. A point whose gradients are not finite keeps its start.
    """
    sizes = [FIRST_STEP] * num_steps + [1 / (k + 2) for k in range(num_steps)]
    current = start
    for size in sizes:
        current = _step(density, current, start, size, False)
    if diagonal:  # of a Gaussian posterior, the best one has its mean, and the diagonal of its precision
        precision = torch.linalg.inv(current.local_scale_tril).square().sum(-2)
        current = start = replace(current, local_scale_tril=torch.diag_embed(precision.rsqrt()))
        for size in sizes:
            current = _step(density, current, start, size, True)
    return current


def better_of(density: Locals, q: Arrow, start: Arrow) -> tuple[Arrow, Tensor]:
    """Of each row the one with the larger ELBO, by the same noise, and at which rows this is the first, (N,), bool."""
    # whitened pairs ±ε: small differences are of second order in the ELBO, and of first in the noise of free draws
    noise, local_noise = (torch.cat([part, -part]) for part in _noise(q, COMPARED // 2))
    g, difference = q.loc + noise @ q.scale_tril.mT, torch.zeros((), dtype=torch.double, device=q.loc.device)
    size = max(density.counts)
    for some_g, some_noise in zip(g.split(size), local_noise.split(size), strict=True):
        for sign, one in ((1, q), (-1, start)):
            u = one.locals_at(some_noise, some_g)
            value = density.log_joint(some_g, u) - one.log_prob_locals(u, some_g)
            difference = difference + sign * value.double().sum(0)
    first = difference > 0  # not if NaN
    each = first[:, None, None]
    return replace(
        q,
        local_loc=torch.where(first[:, None], q.local_loc, start.local_loc),
        slope=torch.where(each, q.slope, start.slope),
        local_scale_tril=torch.where(each, q.local_scale_tril, start.local_scale_tril),
    ), first


def log_weights(density: Locals, q: Arrow, g: Tensor) -> Tensor:
    """log p(u_n, x_n|g) − log q(u_n|g) at new draws u given g (K, Dg), (K, N), nats: their mean is the ELBO."""
    u = q.draw_locals(g)
    return density.log_joint(g, u) - q.log_prob_locals(u, g)


def averaged(draw: Callable[[int], Tensor], counts: list[int]) -> tuple[Tensor, Tensor]:
    """Mean of draws that `draw` gives for a count, (count, N), and its standard error, each (N,), float64."""
    shift, sums, count = None, [], sum(counts)
    for k in counts:
        value = draw(k).double()
        shift = (
            value.mean(0).nan_to_num(0.0, 0.0, 0.0) if shift is None else shift
        )  # so that nothing is lost in squares
        sums.append(((value - shift).sum(0), (value - shift).square().sum(0)))
    mean, square = (torch.stack(column).sum(0) / count for column in zip(*sums, strict=True))
    return shift + mean, ((square - mean.square()).clamp(min=0) / max(count - 1, 1)).sqrt()


def split(total: int, most: int) -> list[int]:
    """Counts of at most `most` that sum to `total`."""
    whole, rest = divmod(total, most)
    return [most] * whole + [rest] * (rest > 0)


def triangular(root: Tensor) -> Tensor:
    """The lower triangular square root of `root` rootᵀ, (N, D, D), without squaring."""
    r = torch.linalg.qr(root.mT).R
    return (r * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)).mT


def _step(density: Locals, q: Arrow, start: Arrow, size: float, diagonal: bool) -> Arrow:
    noise, local_noise = _noise(q, FEWEST_DRAWS)
    half = len(noise)
    shift = noise @ q.scale_tril.mT
    local_shift = times(q.slope, shift) + times(q.local_scale_tril, local_noise)
    g = torch.cat([q.loc + shift, q.loc - shift])
    u = torch.cat([q.local_loc + local_shift, q.local_loc - local_shift])
    gradient = times(q.local_scale_tril.mT, density.gradient(g, u))
    usable = gradient.isfinite().all(-1).all(0)
    gradient = gradient.where(usable[:, None], 0)

    mean, (plus, minus) = gradient.mean(0), gradient.chunk(2)
    odd, even = (plus - minus) / 2, (plus + minus) / 2 - mean
    hessian = torch.einsum("kni,knj->nij", odd, local_noise) / half
    across = torch.einsum("kni,kj->nij", odd, noise) / half
    odd = odd - times(hessian, local_noise) - times(across, noise)
    # how far, in typical draws, a linear model of the gradient may be trusted: 1 or more, infinite if it is exact
    error = (even.square().sum(-1) + odd.square().sum(-1)).mean(0)
    reach = (0.5 * (hessian.square().sum((-2, -1)) / error).sqrt()).nan_to_num(1.0, posinf=inf).clamp(min=1.0)

    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    if diagonal:
        precision = 1 - size + size * hessian.diagonal(dim1=-2, dim2=-1).abs()
        root = torch.diag_embed(precision.clamp(0.25, 16.0).rsqrt())
        inverse = vectors / values.abs().clamp(min=FLATTEST).unsqueeze(-2) @ vectors.mT
    else:
        values = (1 - size + size * values.abs()).clamp(min=0.25).unsqueeze(-2)
        root = vectors * values.clamp(max=16.0).rsqrt() @ vectors.mT  # symmetric: rounding does not turn the noise
        inverse = vectors / values @ vectors.mT
    step = _limited(size * times(inverse, mean.unsqueeze(0))[0], reach)
    turn = _limited(size * (inverse @ across).mT, reach.unsqueeze(-1)).mT
    each = usable[:, None, None]
    return replace(
        q,
        local_loc=torch.where(usable[:, None], q.local_loc + times(q.local_scale_tril, step[None])[0], start.local_loc),
        slope=torch.where(each, q.slope + q.local_scale_tril @ turn @ torch.linalg.inv(q.scale_tril), start.slope),
        local_scale_tril=torch.where(each, q.local_scale_tril @ root, start.local_scale_tril),
    )


def _noise(q: Arrow, fewest: int) -> tuple[Tensor, Tensor]:
    """ε of the globals (K, Dg) and of the locals (K, N, D), with second moments I together, K at least `fewest`."""
    (num_points, dim), outside = q.local_loc.shape, len(q.loc)
    count = max(fewest, outside + dim + SPARE_DRAWS)
    noise = normal(q.loc, count, 1, outside).expand(-1, num_points, -1)
    noise = _whitened(torch.cat([noise, normal(q.loc, count, num_points, dim)], -1))
    return noise[:, 0, :outside], noise[..., outside:]


def _whitened(draws: Tensor) -> Tensor:
    """Linear combinations of draws (K, N, D) with second moments I; the first depend on the first alone."""
    root = torch.linalg.cholesky(torch.einsum("kni,knj->nij", draws, draws) / len(draws))
    return times(torch.linalg.inv(root), draws)


def _limited(step: Tensor, reach: Tensor) -> Tensor:
    """A step in the coordinates ε, no longer than `reach` times a typical draw."""
    longest = reach * sqrt(step.shape[-1])
    return step * (longest / step.norm(dim=-1).clamp(min=1e-30)).clamp(max=1.0).unsqueeze(-1)
