r"""Importance sampling: log p(x) as the log-mean-exp of weights w = p(x, z) / q(z|x) of draws from a guide.

With an exact draw z* ~ p(z|x) among the K, the same mean is an upper bound in expectation,

    E log 1/K (w(z*) + Σ_{k<K} w(z_k)) ≥ log p(x),

which falls with K (Sobolev & Vetrov 2019, *Importance Weighted Hierarchical Variational Inference*). Exact draws are
known where the data were simulated: see `pyro_vae.evidence.bounds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import checked
from pyro_vae.evidence.collect import collect
from pyro_vae.evidence.compiled import CompiledLogWeight, compiled_log_weight
from pyro_vae.evidence.density import LatentDensity
from pyro_vae.evidence.evidence import Evidence
from pyro_vae.evidence.portions import Portions
from pyro_vae.evidence.proposals import from_guide, from_prior, mixture_weights
from pyro_vae.pairs.checks import check_function
from pyro_vae.pairs.handlers import StopAfter, unobserved
from pyro_vae.pairs.modes import fork_random_state
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.threads import one_thread
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["PASSES", "importance_sampling", "prior_sampling"]

# how `collect` cuts the work for generated code, which makes half the tensors; rows share what is done once per row
PASSES: dict[str, Any] = {"tensors": 0.5, "together": 128}


@one_thread
@checked
@seeded
def importance_sampling(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int = 5000,
    plate: str | None = "data",
    smooth: bool = False,
    defensive: float = 0.0,
    correction: str | None = None,
    exact_draw: Mapping[str, Tensor] | None = None,
    chunk_size: int | None = None,
    compile: bool | str = "auto",
    parallel: bool | str = "auto",
    seed: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Evidence:
    """Estimates log p(x) of each data point by importance sampling, log 1/K Σ p(x, z_k)/q(z_k|x), z_k ~ q(z|x).

    Works on any pair with its data points in a plate; runs without gradients and with modules in evaluation mode.
    A row of `args` may depend on no other row, and many particles run at once, in a dimension left of the plates:
    count dimensions from the right. Discrete latents marked by `pyro.infer.config_enumerate` are summed
    out, in the guide and in the model. Fails, and says so by k-hat and ESS, where q is narrower than the posterior or
    high-dimensional: `adaptive_importance_sampling` is for that.

    References:
        Burda, Grosse & Salakhutdinov (2016), Importance Weighted Autoencoders, equation 8.
        Vehtari, Simpson, Gelman, Yao & Gabry (2024), Pareto Smoothed Importance Sampling, JMLR 25(72).
        Owen & Zhou (2000), Safe and effective importance sampling, section 2 (defensive mixtures).
        Nowozin (2018), Debiasing Evidence Approximations (corrections).

    Args:
        model: a Pyro model with the data points in a plate called `plate`, at any depth.
        guide: its guide.
        *args: what both are called with; tensors, NumPy arrays and memory maps as long as the plate are cut into rows,
            which reach the pair as tensors (integers as they are). Or a DataLoader, in the order of its rows, whose
            batches hold the arguments: a tuple, or a dict of keyword arguments.
        num_particles: K ≥ 1, of which exactly K are drawn.
        plate: name of the plate of data points; None for the joint evidence of all data, where there are latents
            outside: then N = 1.
        smooth: Pareto smoothing: the largest weights are replaced by order statistics of the tail that k-hat describes.
            Less variance, a small bias, no bound.
        defensive: share a of the particles, in [0, 1), drawn from the prior p(z) and not from q; all are weighed
            against the mixture (1 − a) q + a p, so that no weight exceeds p(x|z)/a. The counts are fixed, the estimate
            remains a lower bound, and its standard error is on the safe side. Of little use in many dimensions.
        correction: of the bias −Var(w)/(2 K p(x)²): None, "delta" or "jackknife". No bound any more.
        exact_draw: {site: (N, *inner plates, *event)}, draws from the exact posterior, known for simulated data only:
            one of the K particles of each point is this one, which makes the estimate an upper bound.
        chunk_size: particles × rows of one pass; default: as many as make 24 MiB of tensors. It decides which random
            numbers meet which particle, and nothing else.
        compile: whether passes are compiled, unless there are options that make a mixture: True, False, or "auto": Pyro
            as it is for less than 30 passes, its operations recorded and replayed for less than 1000, beyond that
            through generated code, which takes seconds to make. A pair that cannot be compiled runs as it is, with a
            warning.
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        checkpoint: a file that the results of rows that are done are written to, atomically, after the first pass, at
            the end, and at most every ten seconds. Where the file exists, these rows are not estimated again, in
            whatever order they come and whichever others come with them; the same call, started again, ends where an
            uninterrupted one would (to the rounding of generated code). A call with another number of particles, seed
            or option is refused, and so are a model, guide or weights that give sixteen kept rows other log-weights.
        progress: show a progress bar, if on a terminal.
        **kwargs: what both are called with.

    Returns:
        `Evidence`; log_evidence (N,) in nats is a lower bound in expectation, unless said otherwise above. No error
        bar where K = 1 (NaN).

    Raises:
        ValueError: as `draw_particles`; options out of their range; a DataLoader that shuffles or yields nothing; a
            checkpoint of another estimate.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> pyro.set_rng_seed(0)
        >>> evidence = importance_sampling(model, guide, torch.tensor([0.0, 2.0]), num_particles=1000)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor([0.0, 2.0]))
        >>> bool(((evidence.log_evidence - exact).abs() < 4 * evidence.standard_error).all())
        True
    """
    portions = Portions(model, guide, args, kwargs, plate, exact_draw, checkpoint)
    sampler = ParticleSampler(model, guide, portions.args, portions.kwargs, plate=plate, parallel=parallel)
    num_prior = round(defensive * num_particles)
    kernel = None
    if exact_draw is None and not num_prior:
        kernel = _compiled(sampler, compile, num_particles, chunk_size, portions)

    def prepare(rows: slice) -> Callable[[int], Tensor]:
        if exact_draw is None and not num_prior:
            return _from_guide(sampler, rows, kernel, portions)
        density = LatentDensity(sampler, rows)
        counts = torch.tensor([[num_particles - num_prior], [num_prior]], device=sampler.layout.device)
        proposals = [from_guide(density), from_prior(density)]
        return mixture_weights(density, proposals, counts, density.exact(exact_draw))

    return collect(
        sampler,
        prepare,
        num_particles,
        method="importance_sampling",
        exact=exact_draw is not None,
        bounded=num_prior > 0,
        smooth=smooth,
        correction=correction,
        chunk_size=chunk_size,
        progress=progress,
        portions=portions,
        checkpoint=checkpoint,
        options={"seed": None if seed is None else int(seed), "plate": plate, "defensive": float(defensive)},
        **(PASSES if kernel is not None and kernel.generate_code else {}),
    )


@one_thread
@checked
@seeded
def prior_sampling(
    model: Callable,
    guide: Callable | None,
    *args: Any,
    num_particles: int = 5000,
    plate: str | None = "data",
    chunk_size: int | None = None,
    compile: bool | str = "auto",
    parallel: bool | str = "auto",
    seed: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Evidence:
    """Estimates log p(x) of each data point by simple Monte Carlo, log 1/K Σ p(x|z_k), z_k ~ p(z).

    Importance sampling with the prior as proposal. p̂(x) is unbiased, but where the posterior is much narrower than the
    prior, which is soon the case beyond a few latent dimensions, hardly a draw hits it: a check, not a method.

    Args:
        model: as in `importance_sampling`, whose other arguments are the same.
        guide: not used; it is there so that estimators can be exchanged.
        *args: what the model is called with.
        num_particles: K ≥ 1.
        plate: name of the plate of data points.
        chunk_size: particles × rows of one pass.
        compile: as in `importance_sampling`.
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        checkpoint: as in `importance_sampling`.
        progress: show a progress bar, if on a terminal.
        **kwargs: what the model is called with.

    Returns:
        `Evidence`; log_evidence (N,) in nats is a lower bound in expectation.

    Raises:
        ValueError: as `draw_particles`.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> pyro.set_rng_seed(0)
        >>> evidence = prior_sampling(model, None, torch.tensor([0.0]), num_particles=1000)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor([0.0]))
        >>> bool((evidence.log_evidence - exact).abs() < 4 * evidence.standard_error)
        True
    """
    check_function("model", model)
    if guide is not None and not callable(guide):
        raise TypeError(
            f"prior_sampling: guide: expected a function or None, got {type(guide).__name__}. Try "
            "prior_sampling(model, None, x): the second place is that of the guide in the other estimators."
        )
    portions = Portions(model, guide, args, kwargs, plate)
    arguments = portions.args, portions.kwargs
    sampler = ParticleSampler(model, unobserved(model), *arguments, plate=plate, parallel=parallel)
    # The model runs once for each draw, not twice. Its observed sites are not hidden in these runs, as `pyro.markov`
    # names them to the handler that enumerates; observed sites are no part of q in any trace.
    sampler.guide = StopAfter(sampler.pair.latents)(model)
    kernel = _compiled(sampler, compile, num_particles, chunk_size, portions)
    return collect(
        sampler,
        lambda rows: _from_guide(sampler, rows, kernel, portions),
        num_particles,
        method="prior_sampling",
        chunk_size=chunk_size,
        progress=progress,
        portions=portions,
        checkpoint=checkpoint,
        options={"seed": None if seed is None else int(seed), "plate": plate},
        **(PASSES if kernel is not None and kernel.generate_code else {}),
    )


def _compiled(
    sampler: ParticleSampler, compile: bool | str, num_particles: int, chunk_size: int | None, portions: Portions
) -> CompiledLogWeight | None:
    rows, counts = sampler.chunks(num_particles, chunk_size)
    kernel = compiled_log_weight(sampler, compile, len(rows) * len(counts) * portions.num_portions)
    if kernel is not None and portions.loader is None:
        sampler.check()
    return kernel


def _from_guide(
    sampler: ParticleSampler, rows: slice, kernel: CompiledLogWeight | None, portions: Portions
) -> Callable[[int], Tensor]:
    """Log-weights of fresh draws from the guide; the first pass checks the data, unless `_compiled` did."""
    if kernel is None:
        first = iter([True])
        return lambda count: sampler.log_weight(count, rows, check=next(first, False))
    if portions.loader is not None:
        with fork_random_state():
            sampler.log_weight(1, rows, check=True)
    return lambda count: kernel(count, rows)
