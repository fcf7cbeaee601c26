r"""Refinement: q(z|x) of given rows by a few steps of optimisation for each, from where an amortized guide puts it.

An amortized guide predicts all rows by one network. What that costs a row is its amortization gap; a Gaussian of its
own closes it, at the price of some gradients (semi-amortized inference: Kim, Wiseman, Miller, Sontag & Rush 2018,
*Semi-Amortized Variational Autoencoders*). `pyro_vae.evidence.local_fit` has the equations of the fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import check_count, checked
from pyro_vae.evidence.adaptive import FIT_TOGETHER
from pyro_vae.evidence.density import LatentDensity
from pyro_vae.evidence.guide_gaussian import around_draws, at_globals, gaussian_of, num_draws
from pyro_vae.evidence.joint import JointDensity
from pyro_vae.evidence.local_fit import Locals, averaged, better_of, fit_locals, log_weights, split
from pyro_vae.evidence.refined_guide import RefinedGuide, Refinement
from pyro_vae.evidence.structured import Arrow
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.threads import one_thread
from pyro_vae.pairs.validity import check_density, is_factored
from pyro_vae.particles.outside import draw_outside
from pyro_vae.particles.sampler import ParticleSampler
from pyro_vae.progress import progress_bar

__all__ = ["refine"]

GLOBAL_DRAWS = 1000  # of the latents outside of the plate, whose moments stand for q(θ) in the fit


@one_thread
@checked
@seeded
def refine(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_steps: int = 8,
    num_particles: int = 400,
    plate: str = "data",
    parallel: bool | str = "auto",
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> RefinedGuide:
    """Fits a Gaussian to the posterior of each row, starting at a guide; the result is a Pyro guide for these rows.

    The Gaussians are over all unconstrained latents of a row, with full covariance, whatever the supports. Discrete
    latents that are marked for enumeration are summed out. Latents outside of the plate keep their q(θ), which the
    result runs; q(z|x, θ) has a mean that is linear in the unconstrained θ, and is fitted under q(θ).

    A row at which the steps do not help, by draws of their own, keeps its start. A guide that is no Gaussian (a flow)
    may be better than the best Gaussian: `gap` is below zero there, and `print` counts these rows.

    Args:
        model: a Pyro model with the data points in a plate.
        guide: its guide, amortized or not.
        *args: what both are called with: the result belongs to these rows.
        num_steps: natural-gradient steps of full size, and as many that average over their noise; each takes
            2 max(32, D + G + 8) gradients of the log-joint.
        num_particles: fresh draws that say what was gained.
        plate: name of the plate of data points.
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        progress: show a progress bar, if on a terminal.
        **kwargs: what both are called with.

    Returns:
        `RefinedGuide`, for `importance_sampling`, `draw_particles`, `draw_posterior`, `SVI` and all else that takes a
        guide on these rows.

    Raises:
        ValueError: as `adaptive_importance_sampling`; a plate that subsamples; a guide whose latents inside and outside
            of the plate have one joint density.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_vae import importance_sampling
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the posterior's mean is x/2: 0.3 too far, which costs 0.3² nats
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2 + 0.3, 0.5**0.5))
        >>> x = torch.linspace(-2.0, 2.0, 100)
        >>> refined = refine(model, guide, x, seed=0, progress=False)
        >>> round(refined.gap.mean().item(), 2)
        0.09
        >>> evidence = importance_sampling(model, refined, x[:10], num_particles=50, progress=False)
        >>> bool((evidence.effective_sample_size > 49.9).all())
        True
    """
    check_count("num_steps", num_steps)
    sampler = ParticleSampler(model, guide, args, kwargs, plate=plate, parallel=parallel, outside=True)
    sampler.layout.check_vectorized("refine")
    check_density(sampler.pair)
    if sampler.rows.fixed is not None:
        raise ValueError(
            f"refine: plate {plate!r} draws {sampler.rows.fixed} of {sampler.num_points} data points by itself; "
            "expected the rows to refine. Try to call model and guide on these, without subsample_size."
        )
    with torch.no_grad(), evaluation_mode(model, guide):
        sampler.check()
        outside = sampler.pair.outside(sampler.pair.look.model).values()
        if not all(site["is_observed"] for site in outside):
            return _refine_given_globals(sampler, num_steps, num_particles)
        parts = []
        rows, counts = sampler.chunks(num_particles, together=FIT_TOGETHER)
        with progress_bar(sampler.num_points, "refinement", progress) as bar:
            for r in rows:
                parts.append(_refine_rows(sampler, r, counts, num_steps))
                bar.update(len(parts[-1].gap))
        q, *columns = zip(*parts, strict=True)
        local = (torch.cat([getattr(part, name) for part in q]) for name in ("local_loc", "slope", "local_scale_tril"))
        return RefinedGuide(sampler, Refinement(Arrow(q[0].loc, q[0].scale_tril, *local), *map(torch.cat, columns)), ())


def _refine_rows(sampler: ParticleSampler, rows: slice, counts: list[int], num_steps: int) -> Refinement:
    density = LatentDensity(sampler, rows)
    if density.masked:
        raise ValueError(
            f"refine: latent sites {density.masked} are masked. Where a latent is masked, it has no posterior to fit a "
            "Gaussian to. Try the guide as it is."
        )
    start, exact = gaussian_of(density)
    locals_ = Locals(lambda _, u: sum(density.log_joint(u)), counts)  # type: ignore[arg-type, return-value]
    q, helped = better_of(locals_, fit_locals(locals_, start, num_steps=num_steps), start)

    def gained(count: int) -> Tensor:
        return log_weights(locals_, q, q.draw_globals(count)) - sampler.log_weight(count, rows, check=False)

    gap, error = (value.masked_fill(exact & ~helped, 0.0) for value in averaged(gained, counts))
    return Refinement(q, gap, error, ~helped, exact)


def _refine_given_globals(sampler: ParticleSampler, num_steps: int, num_particles: int) -> RefinedGuide:
    if not is_factored(sampler.pair):
        raise ValueError(
            "refine: the guide has one joint density of latents inside and outside of the plate; expected "
            "q(θ) q(z|x, θ). Try an amortized guide of pyro_vae.guides, or AutoNormal."
        )
    density = JointDensity(sampler)
    at_once = max(1, sampler.cells // sampler.num_points)
    locals_ = Locals(lambda g, u: density.log_joint(g, u)[1], split(num_particles, at_once))
    total = num_draws(density.dim + density.global_dim)
    g, u = (torch.cat(part) for part in zip(*map(density.draw, split(total, at_once)), strict=True))
    start = around_draws(g, u)
    start = at_globals(start, density.globals_of(draw_outside(sampler, GLOBAL_DRAWS).values, GLOBAL_DRAWS))
    q, helped = better_of(locals_, fit_locals(locals_, start, num_steps=num_steps), start)

    def gained(count: int) -> Tensor:
        values = draw_outside(sampler, count).values
        with sampler.given(values):
            log_weight = sampler.log_weight(count, check=False)
        return log_weights(locals_, q, density.globals_of(values, count)) - log_weight

    gap, error = averaged(gained, locals_.counts)
    found = Refinement(q, gap, error, ~helped, torch.zeros_like(helped))
    return RefinedGuide(sampler, found, tuple(density.outside))
