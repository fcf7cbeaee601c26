r"""How far a guide's ELBO is from log p(x), and why: the family of q, or the network that predicts it.

With q*_n the best Gaussian for row n by itself, the inference gap is the sum of two (Cremer, Li & Duvenaud 2018,
*Inference Suboptimality in Variational Autoencoders*):

    log p(x_n) − ELBO[q_φ(z|x_n)]  =  log p(x_n) − ELBO[q*_n]  +  ELBO[q*_n] − ELBO[q_φ(z|x_n)].
                                      approximation gap           amortization gap
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import check_choice, checked
from pyro_vae.diagnostics.gaps_result import InferenceGaps
from pyro_vae.evidence.adaptive import FIT_TOGETHER, adaptive_importance_sampling
from pyro_vae.evidence.density import LatentDensity
from pyro_vae.evidence.guide_gaussian import gaussian_of, is_diagonal
from pyro_vae.evidence.local_fit import Locals, averaged, better_of, fit_locals, log_weights
from pyro_vae.evidence.structured import Arrow
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.threads import one_thread
from pyro_vae.pairs.validity import check_density
from pyro_vae.particles.sampler import ParticleSampler
from pyro_vae.progress import progress_bar

__all__ = ["inference_gaps"]

FAMILIES = ("diagonal", "full")


@one_thread
@checked
@seeded
def inference_gaps(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int = 1000,
    num_steps: int = 20,
    family: str | None = None,
    plate: str = "data",
    parallel: bool | str = "auto",
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> InferenceGaps:
    """Splits log p(x) − ELBO into the gap of the guide's family and the gap of its amortization, for each data point.

    The best Gaussian of each row is fitted over its unconstrained latents by natural-gradient steps, which average
    over their draws at the end; what it lacks still counts as approximation gap. log p(x) is that of
    `adaptive_importance_sampling`, a lower bound in expectation. Each term has draws of its own.

    Args:
        model: a Pyro model with all latents in the plate of data points.
        guide: its guide.
        *args: what both are called with.
        num_particles: K, draws of each ELBO; the evidence has 3 K.
        num_steps: of the fit of the best Gaussian: of full size, and as many that average.
        family: of the best Gaussian, "diagonal" or "full" covariance, in unconstrained coordinates. Default: that of
            the guide as it is, "diagonal" if its density is a diagonal Gaussian at all rows looked at, and "full"
            otherwise. Name it for a guide that could have correlations and does not (yet).
        plate: name of the plate of data points.
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        progress: show a progress bar, if on a terminal.
        **kwargs: what both are called with.

    Returns:
        `InferenceGaps`.

    Raises:
        ValueError: as `adaptive_importance_sampling`; another `family`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the posterior's mean is x/2: 0.3 too far, which costs 0.3² nats
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2 + 0.3, 0.5**0.5))
        >>> gaps = inference_gaps(model, guide, torch.linspace(-2.0, 2.0, 100), seed=0, progress=False)
        >>> round(gaps.approximation.mean().item(), 2), round(gaps.amortization.mean().item(), 2)
        (0.0, 0.09)
    """
    check_choice("family", family, (None, *FAMILIES))
    evidence = adaptive_importance_sampling(
        model,
        guide,
        *args,
        num_particles=3 * num_particles,
        plate=plate,
        parallel=parallel,
        progress=progress,
        **kwargs,
    )
    sampler = ParticleSampler(model, guide, args, kwargs, plate=plate, parallel=parallel)
    check_density(sampler.pair)
    parts: list[tuple[Tensor, ...]] = []
    with torch.no_grad(), evaluation_mode(model, guide):
        rows, counts = sampler.chunks(num_particles, together=FIT_TOGETHER)
        with progress_bar(sampler.num_points, "inference gaps", progress) as bar:
            for r in rows:
                density = LatentDensity(sampler, r)
                start, exact = gaussian_of(density)
                diagonal = is_diagonal(start, exact)
                family = family or ("diagonal" if diagonal else "full")
                locals_ = Locals(_log_joint(density), counts)
                q = fit_locals(locals_, start, num_steps=num_steps, diagonal=family == "diagonal")
                if family == "full" or diagonal:  # the start is of the family too
                    q, _ = better_of(locals_, q, start)
                elbos = [averaged(draw, counts) for draw in (_elbo(locals_, q), partial(_log_weight, sampler, r))]
                parts.append((*elbos[0], *elbos[1], exact))
                bar.update(len(exact))
    best, best_error, elbo, elbo_error, is_gaussian = (torch.cat(column) for column in zip(*parts, strict=True))
    return InferenceGaps(evidence, best, best_error, elbo, elbo_error, family, is_gaussian)


def _log_joint(density: LatentDensity) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda _, u: sum(density.log_joint(u))  # type: ignore[return-value]


def _elbo(density: Locals, q: Arrow) -> Callable[[int], Tensor]:
    return lambda count: log_weights(density, q, q.draw_globals(count))


def _log_weight(sampler: ParticleSampler, rows: slice, count: int) -> Tensor:
    return sampler.log_weight(count, rows, check=False)
