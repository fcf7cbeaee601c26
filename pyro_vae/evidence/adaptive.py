r"""Adaptive importance sampling: a Gaussian with full covariance is fitted to the posterior of every data point.

The fit is variational, argmax over N(m, S) of E log p(x, u) + entropy, whose optimum satisfies

    E ∇ log p(x, u) = 0,    S⁻¹ = −E ∇² log p(x, u).

Natural-gradient steps of size ρ towards it, S⁻¹ ← (1 − ρ) S⁻¹ − ρ E ∇², m ← m + ρ S E ∇, take the expected Hessian
from a linear regression of gradients on draws (Salimans & Knowles 2013, *Fixed-Form Variational Posterior
Approximation through Stochastic Linear Regression*): for a Gaussian posterior D + 1 gradients give it exactly. All of
it happens in the coordinates u = m + C ε, S = C Cᵀ, of the current Gaussian, and for all data points at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evidence.collect import collect
from pyro_vae.evidence.density import LatentDensity
from pyro_vae.evidence.evidence import Evidence
from pyro_vae.evidence.proposals import Gaussians, from_guide, from_prior, mixture_weights, shares
from pyro_vae.pairs.checks import check_num_particles
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["FIRST_DRAWS", "adaptive_importance_sampling", "fit_gaussians"]

FIRST_DRAWS = 100  # of the guide, whose moments are the start; and of both components, to find their shares
FIT_TOGETHER = 200  # weights whose tensors a row's fit makes at a time
RIDGE = 0.2  # of the regression, towards the current covariance, in units of a draw's weight
WIDEN = 1.05  # of the fitted standard deviations: tails that are too light cost more than ones that are too heavy
LEAST_SHARE = 0.15  # of the draws, for each component


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
    progress: bool = True,
    **kwargs: Any,
) -> Evidence:
    """Estimates log p(x) of each data point by importance sampling from a Gaussian that is fitted to its posterior.

    Starts at q(z|x), fits a full-covariance Gaussian over the unconstrained latents of each point (see the top of this
    module), and draws fresh particles from a mixture of it, q and the prior, whose shares, each at least 15 %, are
    fitted too. The fits use other draws than the estimate, which so remains a lower bound in expectation. Use it where
    k-hat of `importance_sampling` is too large: an amortized q is seldom the best Gaussian for a point, and on points
    that were not trained on far from it. Of a posterior with several separate modes the Gaussian finds one; q and, in a
    few dimensions, the prior have to cover the others.

    A fit takes `num_steps` × max(16, D + 14) gradients of the log-joint, each the price of about three weights, and 300
    weights; its own arithmetic is of order D³ for each point and step. A continuous latent of any support will do;
    discrete ones are to be marked by `pyro.infer.config_enumerate`, and are summed out. A q with auxiliary variables,
    whose density is not known, is where the fit starts, but no part of the mixture.

    References:
        Salimans & Knowles (2013), Bayesian Analysis 8(4), section 4.
        Owen & Zhou (2000), Safe and effective importance sampling, section 2.

    Args:
        model: as in `importance_sampling`, whose other arguments are the same.
        guide: its guide, where the fit starts.
        *args: what both are called with.
        num_particles: K ≥ 1 draws after the fit.
        num_steps: natural-gradient steps of the fit.
        plate: name of the plate of data points; None for the joint evidence of all data.
        smooth: Pareto smoothing.
        correction: of the bias: None, "delta" or "jackknife".
        exact_draw: {site: (N, …)}, exact posterior draws, which make the estimate an upper bound.
        chunk_size: particles × rows of one pass.
        progress: show a progress bar, if on a terminal.
        **kwargs: what both are called with.

    Returns:
        `Evidence`; log_evidence (N,) in nats is a lower bound in expectation.

    Raises:
        ValueError: as `importance_sampling`; a discrete latent that is not marked for enumeration.

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
        >>> bool((evidence.effective_sample_size > 500).all())
        True
    """
    num_particles = check_num_particles(num_particles)
    sampler = ParticleSampler(model, guide, args, kwargs, plate=plate)

    def prepare(rows: slice) -> Callable[[int], Tensor]:
        density = LatentDensity(sampler, rows)
        fitted = fit_gaussians(density, num_steps=num_steps)
        proposals = [Gaussians(fitted.loc, WIDEN * fitted.scale_tril).proposal(), from_prior(density)]
        if density.knows_guide:
            proposals.append(from_guide(density))
        share = shares(density, proposals, num_draws=FIRST_DRAWS, least=LEAST_SHARE)
        others = (share[1:] * num_particles).long()
        counts = torch.cat([num_particles - others.sum(0, keepdim=True), others])
        return mixture_weights(density, proposals, counts, density.exact(exact_draw))

    return collect(
        sampler,
        prepare,
        num_particles,
        method="adaptive_importance_sampling",
        exact=exact_draw is not None,
        smooth=smooth,
        correction=correction,
        chunk_size=chunk_size,
        together=FIT_TOGETHER,
        progress=progress,
    )


def fit_gaussians(density: LatentDensity, *, num_steps: int = 8, step_size: float = 0.7) -> Gaussians:
    """Fits N(m, S) to the posterior of each data point, from the moments of the guide; see the top of this module.

    Args:
        density: of the latents.
        num_steps: natural-gradient steps.
        step_size: ρ, in (0, 1].

    Returns:
        `Gaussians`. A point whose fit fails, as gradients are not finite, keeps the moments of the guide.

    Raises:
        ValueError: masked latents.
    """
    if density.masked:
        raise ValueError(
            f"latent sites {density.masked} are masked; where they are, there is no posterior for a Gaussian to be "
            "fitted to. Try importance_sampling, or annealed_importance_sampling from the guide."
        )
    current = start = Gaussians.around(density.draw(FIRST_DRAWS))
    size = density.dim
    identity = torch.eye(size).to(start.loc)
    half = (max(16, size + 14) + 1) // 2
    for _ in range(num_steps):
        noise = current.noise(half)
        noise = torch.cat([noise, -noise])  # so that of a quadratic the mean gradient is exact
        gradient = torch.einsum("nij,kni->knj", current.scale_tril, density.gradient(current(noise)))
        mean = gradient.mean(0)
        ridge = RIDGE * len(noise) * identity
        covariance = torch.einsum("kni,knj->nij", noise, noise) + ridge
        slope = torch.linalg.solve_ex(covariance, torch.einsum("kni,knj->nij", noise, gradient - mean) - ridge).result
        precision = (1 - step_size) * identity - step_size * (slope + slope.mT) / 2
        usable = precision.isfinite().flatten(1).all(1) & mean.isfinite().all(1)
        values, vectors = torch.linalg.eigh(torch.where(usable[:, None, None], precision, identity))
        values = values.clamp(0.25, 16.0)  # a step changes no standard deviation by more than 2 or 1/4
        step = torch.einsum("nij,nj->ni", vectors, torch.einsum("nij,ni->nj", vectors, mean) / values) * step_size
        step = step * (sqrt(size) / step.norm(dim=-1, keepdim=True)).clamp(max=1.0)  # the mean goes as far as a draw
        new = Gaussians(current(step.unsqueeze(0))[0], current.scale_tril @ (vectors * values.rsqrt().unsqueeze(-2)))
        current = Gaussians(
            torch.where(usable[:, None], new.loc, start.loc),
            torch.where(usable[:, None, None], new.scale_tril, start.scale_tril),
        )
    return current
