r"""Adaptive importance sampling: a Gaussian with full covariance is fitted to the posterior of every data point.

The fit is variational: N(m, S) maximises E log p(x, u) + entropy, and at the optimum

    E ∇ log p(x, u) = 0,    S⁻¹ = −E ∇² log p(x, u).

Natural-gradient steps of size ρ lead there,

    S⁻¹ ← (1 − ρ) S⁻¹ − ρ E ∇² log p(x, u),    m ← m + ρ S E ∇ log p(x, u).

A linear regression of gradients on draws estimates the expected Hessian (Salimans & Knowles 2013, *Fixed-Form
Variational Posterior Approximation through Stochastic Linear Regression*); for a Gaussian posterior, D + 1 gradients
determine it exactly. The steps are made in the coordinates ε of the current Gaussian, u = m + C ε with S = C Cᵀ, and
for all data points at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import checked
from pyro_vae.evidence.collect import collect
from pyro_vae.evidence.density import LatentDensity
from pyro_vae.evidence.evidence import Evidence
from pyro_vae.evidence.joint_draws import JointDraws
from pyro_vae.evidence.portions import Portions
from pyro_vae.evidence.proposals import Gaussians, from_guide, from_prior, mixture_draws, shares
from pyro_vae.pairs.libraries import warn
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.threads import one_thread
from pyro_vae.pairs.validity import check_density
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["FIRST_DRAWS", "adapted_draws", "adaptive_importance_sampling", "fit_gaussians"]

FIRST_DRAWS = 100  # of the guide, whose moments start the fit, and of each component, to find its share
FIT_TOGETHER = 200  # the fit of one row makes as many tensors at a time as this many weights
RIDGE = 0.2  # ridge penalty of the regression, towards the current covariance, in units of one draw
WIDEN = 1.05  # factor of the fitted standard deviations: tails that are too light cost more than heavy ones
LEAST_SHARE = 0.15  # each component gets at least this share of the draws


@one_thread
@checked
@seeded
def adaptive_importance_sampling(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int = 3000,
    num_steps: int = 8,
    plate: str | None = "data",
    smooth: bool = False,
    correction: str | None = None,
    exact_draw: Mapping[str, Tensor] | None = None,
    chunk_size: int | None = None,
    parallel: bool | str = "auto",
    seed: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Evidence:
    """Estimates log p(x) of each data point by importance sampling from a Gaussian that is fitted to its posterior.

    The fit starts at q(z|x). It fits a full-covariance Gaussian over the unconstrained latents of each point (see the
    top of this module). Fresh particles are then drawn from a mixture of this Gaussian, q and the prior. The shares of
    the mixture are fitted too, and each is at least 15 %. The estimate uses none of the draws of the fits, so that it
    remains a lower bound in expectation. As each component has a fixed count of draws, it varies less than its standard
    error says, which takes them as independent: errors of about 0.6 times that size were seen.

    Use it if the k-hat of `importance_sampling` is too large: an amortized q is seldom the best Gaussian for a point,
    and can be far from it on points outside the training data. If a posterior has several separate modes, the Gaussian
    finds one of them; q and, in few dimensions, the prior must cover the others.

    With `plate=None`, where all observed sites are in a plate, data points are independent given the latents outside of
    it. The fit is then an arrow (`pyro_vae.evidence.arrow`), linear in N, and each particle is a draw of the latents
    outside, with an unbiased estimate of p(x_n|θ) for each point (`pyro_vae.evidence.joint_draws`).

    A fit takes `num_steps` × max(16, D + 14) gradients of the log-joint, each of which costs as much as about three
    weights, and 300 weights. Its own arithmetic is of order D³ for each point and step. Continuous latents may have any
    support. Discrete latents must be marked by `pyro.infer.config_enumerate`, and are summed out. If q has auxiliary
    variables that are no unconstrained coordinates of its latents, or is a flow without an inverse, its density is not
    known; the fit then starts at q, but q is not a part of the mixture.

    References:
        Salimans & Knowles (2013), Bayesian Analysis 8(4), section 4.
        Owen & Zhou (2000), Safe and effective importance sampling, section 2.

    Args:
        model: as in `importance_sampling`.
        guide: its guide, where the fit starts.
        *args: what both are called with, as in `importance_sampling`.
        num_particles: K ≥ 1, number of draws after the fit.
        num_steps: number of natural-gradient steps in the fit.
        plate: name of the plate of data points; None for the joint evidence of all data.
        smooth: Pareto smoothing, as in `importance_sampling`.
        correction: how to correct the bias: None, "delta" or "jackknife", as in `importance_sampling`.
        exact_draw: {site: (N, *inner plates, *event)}, exact posterior draws, which make the estimate an upper bound.
        chunk_size: particles × rows in one pass.
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        checkpoint: as in `importance_sampling`.
        progress: show a progress bar, if on a terminal.
        **kwargs: what both are called with.

    Returns:
        `Evidence`; log_evidence (N,) in nats is a lower bound in expectation, unless an option above says otherwise.

    Raises:
        ValueError: as in `importance_sampling`; a discrete latent is not marked for enumeration.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
        >>> def guide(x):  # far too wide
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        >>> pyro.set_rng_seed(0)
        >>> evidence = adaptive_importance_sampling(model, guide, torch.tensor([0.0, 2.0]), num_particles=1000)
        >>> exact = dist.Normal(0.0, 1.01**0.5).log_prob(torch.tensor([0.0, 2.0]))
        >>> bool(((evidence.log_evidence - exact).abs() < 4 * evidence.standard_error).all())
        True
    """
    portions = Portions(model, guide, args, kwargs, plate, exact_draw, checkpoint)
    sampler = ParticleSampler(model, guide, portions.args, portions.kwargs, plate=plate, parallel=parallel)

    joint = None
    if plate is None and exact_draw is None:
        check_density(sampler.pair)
        sampler.check()
        with torch.no_grad(), evaluation_mode(model, guide):
            joint = JointDraws.of(sampler, num_steps)

    def prepare(rows: slice) -> Callable[[int], Tensor]:
        if joint is not None:
            return joint.log_weights(num_particles)
        density = LatentDensity(sampler, rows)
        draw = adapted_draws(density, num_particles, num_steps, density.exact(exact_draw))
        return lambda count: draw(count)[0]

    return collect(
        sampler,
        prepare,
        num_particles,
        method="adaptive_importance_sampling",
        exact=exact_draw is not None,
        bounded=True,
        smooth=smooth,
        correction=correction,
        chunk_size=chunk_size,
        together=FIT_TOGETHER,
        progress=progress,
        portions=portions,
        checkpoint=checkpoint,
        options={"seed": None if seed is None else int(seed), "plate": plate, "num_steps": num_steps},
    )


def adapted_draws(
    density: LatentDensity, num_particles: int, num_steps: int = 8, exact: Tensor | None = None
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Draws from the mixture of a fitted Gaussian, the prior and the guide, as `mixture_draws` has them."""
    warn_of_cost(density.dim, density.sampler.num_points, num_steps)
    fitted = fit_gaussians(density, num_steps=num_steps)
    proposals = [Gaussians(fitted.loc, WIDEN * fitted.scale_tril).proposal(), from_prior(density)]
    if density.knows_guide:
        proposals.append(from_guide(density))
    share = shares(density, proposals, num_draws=FIRST_DRAWS, least=LEAST_SHARE)
    others = (share[1:] * num_particles).long()
    counts = torch.cat([num_particles - others.sum(0, keepdim=True), others])
    return mixture_draws(density, proposals, counts, exact)


def warn_of_cost(dim: int, num_points: int, num_steps: int) -> None:
    """Warns before a fit of full covariances that takes longer than minutes."""
    minutes = num_steps * num_points * (dim / 2000) ** 3 / 2  # a solve and an eigendecomposition in each step
    if minutes > 2:
        warn(
            f"adaptive_importance_sampling: a full covariance of {dim} latents takes about {minutes:.0f} minutes to "
            "fit. A plate around all that is observed would be used: latents inside it are independent given the rest."
        )


def fit_gaussians(density: LatentDensity, *, num_steps: int = 8, step_size: float = 0.7) -> Gaussians:
    """Fits N(m, S) to the posterior of each data point, starting at the moments of the guide.

    The top of this module has the equations.

    Args:
        density: the density of the latents.
        num_steps: number of natural-gradient steps.
        step_size: ρ, in (0, 1].

    Returns:
        `Gaussians`. If the fit of a point fails because gradients are not finite, the point keeps the moments of the
        guide.

    Raises:
        ValueError: a latent is masked.
    """
    if density.masked:
        raise ValueError(
            f"latent sites {density.masked} are masked. Where a latent is masked, it has no posterior to fit a "
            "Gaussian to. Try importance_sampling, or annealed_importance_sampling from the guide."
        )
    current = start = Gaussians.around(density.draw(FIRST_DRAWS))
    size = density.dim
    identity = torch.eye(size).to(start.loc)
    half = (max(16, size + 14) + 1) // 2
    for _ in range(num_steps):
        noise = current.noise(half)
        noise = torch.cat([noise, -noise])  # makes the mean gradient of a quadratic exact
        gradient = torch.einsum("nij,kni->knj", current.scale_tril, density.gradient(current(noise)))
        mean = gradient.mean(0)
        ridge = RIDGE * len(noise) * identity
        covariance = torch.einsum("kni,knj->nij", noise, noise) + ridge
        slope = torch.linalg.solve_ex(covariance, torch.einsum("kni,knj->nij", noise, gradient - mean) - ridge).result
        precision = (1 - step_size) * identity - step_size * (slope + slope.mT) / 2
        usable = precision.isfinite().flatten(1).all(1) & mean.isfinite().all(1)
        values, vectors = torch.linalg.eigh(torch.where(usable[:, None, None], precision, identity))
        values = values.clamp(0.25, 16.0)  # a step at most doubles a standard deviation, and at most quarters it
        step = torch.einsum("nij,nj->ni", vectors, torch.einsum("nij,ni->nj", vectors, mean) / values) * step_size
        step = step * (sqrt(size) / step.norm(dim=-1, keepdim=True)).clamp(max=1.0)  # no farther than a typical draw
        new = Gaussians(current(step.unsqueeze(0))[0], current.scale_tril @ (vectors * values.rsqrt().unsqueeze(-2)))
        current = Gaussians(
            torch.where(usable[:, None], new.loc, start.loc),
            torch.where(usable[:, None, None], new.scale_tril, start.scale_tril),
        )
    return current
