r"""The Gaussian that a guide is, or the one with its moments, for the latents of each data point.

If q(u|x) is a Gaussian in the unconstrained coordinates u, the gradient of its log-density is linear in u,

    ∇ log q(u|x) = −S⁻¹ (u − m),

so that a regression of D + 1 gradients on draws gives m and S to rounding, whatever the guide is made of, and its
residuals say whether it is one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_vae.evidence.density import LatentDensity
from pyro_vae.evidence.local_fit import triangular
from pyro_vae.evidence.proposals import Gaussians
from pyro_vae.evidence.structured import Arrow

__all__ = ["around_draws", "at_globals", "gaussian_of", "is_diagonal", "num_draws"]

FEWEST_DRAWS = 200  # whose moments stand for those of a guide
TOLERANCE = 1e-3  # of the residuals, relative to the gradients
CORRELATION = 0.01  # partial correlations up to which a Gaussian is taken for diagonal


def gaussian_of(density: LatentDensity) -> tuple[Arrow, Tensor]:
    """The Gaussian of each row's q(u|x), and whether q is this one, (N,), bool; where it is not, the one with the
    moments of draws."""
    draws = density.draw(num_draws(density.dim))
    moments = around_draws(draws.new_zeros(len(draws), 0), draws)
    exact = torch.zeros(draws.shape[1], dtype=torch.bool, device=draws.device)
    if not density.knows_guide:
        return moments, exact
    u = draws[: 2 * density.dim + 16]
    gradient = _gradient(density, u)
    if gradient is None:
        return moments, exact
    u, gradient = u.double(), gradient.double()
    center, scale = u.mean(0), u.std(0)
    x, y = (u - center) / scale, gradient * scale
    slope = torch.linalg.solve_ex(_outer(x, x), _outer(x, y - y.mean(0))).result
    residual = y - y.mean(0) - torch.einsum("kni,nij->knj", x, slope)
    precision = -(slope + slope.mT) / 2
    size = y.square().mean((0, 2)).sqrt()
    exact = residual.abs().amax((0, 2)) < TOLERANCE * size  # not if NaN
    exact &= (slope - slope.mT).abs().amax((1, 2)) < TOLERANCE * slope.abs().amax((1, 2))
    identity = torch.eye(density.dim).to(precision)
    root, info = torch.linalg.cholesky_ex(torch.where(exact[:, None, None], precision, identity))
    exact &= info == 0
    inverse = torch.linalg.inv(torch.where(exact[:, None, None], root, identity)).mT  # S = inverse inverseᵀ
    loc = center + scale * torch.einsum("nij,nkj,nk->ni", inverse, inverse, y.mean(0))
    found = loc.to(draws), (scale.unsqueeze(-1) * inverse).to(draws)
    loc = torch.where(exact[:, None], found[0], moments.local_loc)
    scale_tril = torch.where(exact[:, None, None], found[1], moments.local_scale_tril)
    return _without_globals(loc, scale_tril), exact


def _gradient(density: LatentDensity, u: Tensor) -> Tensor | None:
    """∇ log q(u|x), (K, N, D); None where there is none."""
    with torch.enable_grad():
        leaf = u.detach().nan_to_num().requires_grad_()
        log_q = density.log_all(leaf)[2]
        return torch.autograd.grad(log_q.sum(), leaf, allow_unused=True)[0] if log_q.requires_grad else None


def is_diagonal(q: Arrow, exact: Tensor) -> bool:
    """Whether all rows are Gaussians with diagonal covariance."""
    root = torch.linalg.inv(q.local_scale_tril)
    precision = root.mT @ root
    scale = precision.diagonal(dim1=-2, dim2=-1).rsqrt()
    partial = (precision * scale.unsqueeze(-1) * scale.unsqueeze(-2)).tril(-1).abs()
    return bool(exact.all()) and bool((partial < CORRELATION).all())


def num_draws(dim: int) -> int:
    """How many draws have moments that will do for a start."""
    return max(FEWEST_DRAWS, 4 * dim)


def around_draws(g: Tensor, u: Tensor) -> Arrow:
    """With the moments of draws g (K, Dg) and u (K, N, D): the means of u given g by regression."""
    u = torch.where(u.isfinite(), u, Gaussians.around(u).loc)
    loc, center = g.mean(0), u.mean(0)
    root = _root((g - loc).unsqueeze(1))[0]
    inverse = torch.linalg.inv(root)
    noise = (g - loc) @ inverse.mT
    across = torch.einsum("kj,kni->nij", noise, u - center) / len(g)
    rest = u - center - torch.einsum("nij,kj->kni", across, noise)
    return Arrow(loc, root, center, across @ inverse, _root(rest))


def at_globals(q: Arrow, g: Tensor) -> Arrow:
    """With the moments of other draws g (K, Dg) for q(g)."""
    loc = g.mean(0)
    return replace(q, loc=loc, scale_tril=_root((g - loc).unsqueeze(1))[0], local_loc=q.given(loc.unsqueeze(0))[0])


def _without_globals(loc: Tensor, scale_tril: Tensor) -> Arrow:
    none = loc.new_zeros(0)
    return Arrow(none, loc.new_zeros(0, 0), loc, loc.new_zeros(*loc.shape, 0), scale_tril)


def _root(rest: Tensor) -> Tensor:
    """A square root of the second moments of draws (K, N, D), (N, D, D); never singular."""
    std = rest.square().mean(0).sqrt()
    root = triangular(rest.permute(1, 2, 0) / len(rest) ** 0.5)
    return root + torch.diag_embed(1e-4 * std + torch.finfo(rest.dtype).tiny)


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("kni,knj->nij", x, y)
