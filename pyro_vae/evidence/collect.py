"""The protocol of an estimator: log-weights for chunks of rows and of particles become `Evidence`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evidence.evidence import LOWER_BOUND, NO_BOUND, UPPER_BOUND, Evidence
from pyro_vae.evidence.finished import Finished, fingerprint
from pyro_vae.evidence.log_weights import LogWeightSummary
from pyro_vae.evidence.portions import Portions
from pyro_vae.pairs.checks import check_roles
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.seeds import from_seed
from pyro_vae.pairs.validity import check_density
from pyro_vae.particles.sampler import ParticleSampler
from pyro_vae.progress import progress_bar
from pyro_vae.ranks import ranks

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
    portions: Portions | None = None,
    checkpoint: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Evidence:
    """Evidence from log-weights, for chunks of rows and of particles.

    Each chunk of rows draws from a seed of its own, so that several ranks, which take turns, get the results of one.

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
        portions: of the rows; default: all of the sampler's.
        checkpoint: a file that results are written to, and found in.
        options: of the estimator, plain values by name, that its results depend on.
    """
    bound = NO_BOUND if smooth or correction is not None else UPPER_BOUND if exact else LOWER_BOUND
    check_density(sampler.pair)
    check_roles(sampler.pair.model, sampler.pair.guide, sampler.pair.look, observes=True)
    portions = portions or Portions(sampler.model, sampler.guide, (), {}, None)
    known = {"num_particles": num_particles, "method": method, "smooth": smooth, "correction": correction}

    def estimate(rows: slice, counts: list[int]) -> Tensor:
        """Log-evidence, standard error, effective sample size, k-hat and number of zero weights, (rows, 5)."""
        draw = prepare(rows)
        summary = LogWeightSummary(num_particles, smooth=smooth, correction=correction)
        for count in [1] * exact + counts * (num_particles > exact):
            log_weight = draw(count)
            summary.update(log_weight)
            bar.update(log_weight.numel())
        return torch.stack([*summary.result(), summary.num_zero.double()], 1)

    def plain(rows: slice, start: int, counts: list[int]) -> Tensor:
        with from_seed(seed, start + rows.start):
            found = estimate(rows, counts)
        return found.cpu() if group.several else found

    parts, group = [], ranks()
    group.agree(method, rows=sampler.num_points, num_particles=num_particles, chunk_size=chunk_size)
    seed = group.from_first(int(torch.randint(2**62, ())))
    with torch.no_grad(), evaluation_mode(sampler.model, sampler.guide):
        several = portions.loader is not None
        if group.several:
            group.agree(method, **{"rows, model, guide or weights": fingerprint(sampler)})
        finished = Finished(checkpoint, known | dict(options or {}), sampler, group, several)
        total = portions.num_rows if portions.loader is not None else sampler.num_points
        total = None if total is None else total * num_particles // group.size
        with progress_bar(total, method.replace("_", " "), progress and group.is_first) as bar, finished:
            for start in portions.through(sampler):
                rows, counts = sampler.chunks(
                    max(1, num_particles - exact), chunk_size, tensors=tensors, together=together
                )
                with portions.counted_from(start):
                    if checkpoint is None:
                        parts += [f for _, f in group.in_turns(rows, partial(plain, start=start, counts=counts))]
                    else:
                        passes = partial(estimate, counts=counts)
                        parts.append(finished.complete(rows, start, passes, lambda n: bar.update(n * num_particles)))
    value, error, ess, khat, num_zero = torch.cat(parts).to(sampler.layout.device).unbind(1)
    return Evidence(value, error, ess, khat, num_particles, bound, method, num_zero.long(), bounded)
