"""The protocol of an estimator: log-weights for chunks of rows and of particles become `Evidence`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae.evidence.evidence import LOWER_BOUND, NO_BOUND, UPPER_BOUND, Evidence
from pyro_vae.evidence.log_weights import LogWeightSummary
from pyro_vae.pairs.checks import check_roles
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.validity import check_density
from pyro_vae.particles.sampler import ParticleSampler
from pyro_vae.progress import progress_bar

__all__ = ["collect"]


def collect(
    sampler: ParticleSampler,
    prepare: Callable[[slice], Callable[[int], Tensor]],
    num_particles: int,
    *,
    method: str,
    exact: bool = False,
    bounded: bool = False,
    smooth: bool = False,
    correction: str | None = None,
    chunk_size: int | None = None,
    tensors: float = 1.0,
    together: int | None = None,
    progress: bool = True,
) -> Evidence:
    """Evidence from log-weights, for chunks of rows and of particles.

    Args:
        sampler: of the pair.
        prepare: rows -> a function: count -> new log-weights (count, N). With `exact`, the first call is for one.
        num_particles: K.
        method: name of the estimator.
        exact: the first particle of each row is an exact draw from the posterior, and passed alone: an upper bound.
        bounded: whether a share of the draws comes from the prior, so that no weight exceeds p(x|z) over this share.
        smooth: replace the tail of the weights by that of the fitted Pareto distribution.
        correction: of the bias: None, "delta" or "jackknife".
        chunk_size: particles × rows of one pass.
        tensors: how many times the tensors of one log-weight a pass makes.
        together: how many particles of a row should pass at once, as in `ParticleSampler.chunks`.
        progress: show a progress bar, if on a terminal.
    """
    bound = NO_BOUND if smooth or correction is not None else UPPER_BOUND if exact else LOWER_BOUND
    check_density(sampler.pair)
    check_roles(sampler.pair.model, sampler.pair.guide, sampler.pair.look, observes=True)
    parts = []
    with torch.no_grad(), evaluation_mode(sampler.model, sampler.guide):
        others = num_particles - exact
        rows, counts = sampler.chunks(max(1, others), chunk_size, tensors=tensors, together=together)
        with progress_bar(sampler.num_points * num_particles, method.replace("_", " "), progress) as bar:
            for r in rows:
                draw = prepare(r)
                summary = LogWeightSummary(num_particles, smooth=smooth, correction=correction)
                for count in [1] * exact + counts * (others > 0):
                    log_weight = draw(count)
                    summary.update(log_weight)
                    bar.update(log_weight.numel())
                parts.append((*summary.result(), summary.num_zero))
    value, error, ess, khat, num_zero = (torch.cat(column) for column in zip(*parts, strict=True))
    return Evidence(value, error, ess, khat, num_particles, bound, method, num_zero, bounded)
