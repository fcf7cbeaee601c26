"""Draws of a guide and what comes of them, in groups of `from_pyro_svi`."""

from __future__ import annotations

from math import log

import numpy as np
import torch
from torch import Tensor

from pyro_vae.evidence.log_weights import LogWeightSummary
from pyro_vae.integrations.arviz_arguments import named_tensors, observed_arguments, put_constants
from pyro_vae.integrations.arviz_chunks import Chunk
from pyro_vae.integrations.arviz_discrete import draw_summed
from pyro_vae.integrations.arviz_groups import Groups
from pyro_vae.integrations.arviz_sites import ModelSites, Release, Variable, plate_sizes
from pyro_vae.pairs.rows import WINDOW
from pyro_vae.pairs.sites import is_inside
from pyro_vae.pairs.vectorized import PARTICLE_PLATE
from pyro_vae.particles.sampler import ParticleSampler
from pyro_vae.particles.serial import parts_of
from pyro_vae.progress import progress_bar

__all__ = ["put_sampled"]

CELLS = 2**14  # draws × rows of new data in one pass


def put_sampled(
    groups: Groups, sampler: ParticleSampler, num_samples: int, predictions: tuple[tuple, dict] | None, progress: bool
) -> None:
    """Stores all that comes of draws of the guide.

    Args:
        groups: where to.
        sampler: of the pair.
        num_samples: draws.
        predictions: arguments of the model with new data.
        progress: show a progress bar.
    """
    model, look = sampler.model, sampler.pair.look.model
    sites = ModelSites(look)
    variables, observed = sites.variables, sites.observed
    generative = Release(observed)(model)
    all_rows, counts = sampler.chunks(num_samples)
    if any(
        v.role == "computed" and not is_inside(look.nodes[name], sampler.layout.plate) for name, v in variables.items()
    ):
        all_rows = [slice(0, sampler.num_points)]  # it may hold all rows
    points: list[tuple[Tensor, ...]] = []
    with progress_bar(len(all_rows) * len(counts), "draws for ArviZ", progress) as bar:
        for rows in all_rows:
            summary, stop = LogWeightSummary(num_samples), 0
            for count in counts:
                draws, stop = slice(stop, stop + count), stop + count
                put = Chunk(groups, sampler, variables, (num_samples, sampler.num_points), (draws, rows))
                guide_trace, model_trace = sampler.traces(count, rows, check=draws.start == 0)
                values = {name: guide_trace.nodes[name]["value"] for name in sampler.pair.latents - sampler.pair.summed}
                trace = model_trace
                if sampler.pair.summed:
                    values |= draw_summed(sampler, values, variables, count, rows)
                    trace = sampler.run(model, count, rows, values=values)
                put.sites(trace, {"latent": "posterior", "computed": "posterior"})
                put.log_probs(trace)
                put.data(trace)
                put.sites(sampler.run(generative, count, rows, values=values), {"observed": "posterior_predictive"})
                prior = {"latent": "prior", "computed": "prior", "observed": "prior_predictive"}
                put.sites(sampler.run(generative, count, rows), prior)
                particles = sampler.weigh(guide_trace, model_trace, count, rows)
                put.stats(particles)
                summary.update(particles.log_weight)
                bar.update()
            points.append(summary.result())
    _put_evidence(groups, sampler, [torch.cat(parts) for parts in zip(*points, strict=True)], observed)
    skip = _put_arguments(groups, sampler, observed)
    if predictions is not None:
        _put_predictions(groups, sampler, variables, num_samples, predictions, skip)


def _put_evidence(groups: Groups, sampler: ParticleSampler, evidence: list[Tensor], observed: set[str]) -> None:
    """Stores the evidence of each data point, and log p(x_n) in log_likelihood."""
    plate = sampler.layout.plate
    for name, value in zip(("log_evidence", "log_evidence_error", "ess", "pareto_khat"), evidence, strict=True):
        groups.put("sample_stats", name, value if plate else value[0], [plate] if plate else [])
    if plate is not None and observed:
        name = next(iter(observed)) if len(observed) == 1 else "joint"
        groups.put(
            "log_likelihood", name, _from_the_others(groups.get("sample_stats", "log_weights")), [plate], draws=True
        )


def _from_the_others(log_weights: np.ndarray) -> np.ndarray:
    """log p(x_n) for each draw, as the other draws estimate it, (S, N): log Σ_{k≠s} w_kn − log(S − 1).

    The same number for all draws would be as right, but has no tail for `az.loo` to fit. These differ by what one draw
    adds, 1/S of it where weights are equal, so that Pareto's k of `az.loo` is that of the importance weights.
    """
    value = torch.from_numpy(log_weights).double()
    total, count = value.logsumexp(0), len(value)
    if count == 1:
        return value.numpy()
    shares = (value - total).exp().clamp(max=1 - 1e-15)
    return (total + torch.log1p(-shares) - log(count - 1)).numpy()


def _put_arguments(groups: Groups, sampler: ParticleSampler, observed: set[str]) -> set[str]:
    """Stores the arguments that are not observed, and returns the names of the others."""
    look, rows, plate = sampler.pair.look, sampler.rows, sampler.layout.plate
    arguments = named_tensors(sampler.model, rows.args, rows.kwargs)
    probe = named_tensors(sampler.model, *rows.cut(slice(0, WINDOW)))  # what the look was at
    if rows.fixed is not None:
        index = look.subsamples()[plate]
        probe |= {name: a[index] for name, a in arguments.items() if a.dim() and len(a) == rows.num_points}
    skip = observed_arguments(probe, [look.model.nodes[name]["value"] for name in observed])
    sizes = plate_sizes(look.model, sampler.pair.sites) | ({} if plate is None else {plate: rows.num_points})
    put_constants(groups, "constant_data", sampler.model, (rows.args, rows.kwargs), sizes, skip)
    return skip


def _put_predictions(
    groups: Groups,
    sampler: ParticleSampler,
    variables: dict[str, Variable],
    num_samples: int,
    arguments: tuple[tuple, dict],
    skip: set[str],
) -> None:
    """New data, drawn from the model, and what it was called with for them."""
    observed = {name for name, variable in variables.items() if variable.role == "observed"}
    with sampler.rows.using(*arguments):
        first = parts_of(sampler.run(Release(observed)(sampler.model), 1))[0]
        sizes = plate_sizes(first, observed)
        sizes.pop(PARTICLE_PLATE, None)
        size = sizes.get(sampler.layout.plate, 1)
        at_once = max(1, CELLS // size)
        new = {name: variable for name, variable in variables.items() if name in observed}
        for start in range(0, num_samples, at_once):
            draws = slice(start, min(start + at_once, num_samples))
            trace = sampler.run(Release(observed)(sampler.model), draws.stop - draws.start)
            Chunk(groups, sampler, new, (num_samples, size), (draws, slice(0, size))).sites(
                trace, {"observed": "predictions"}
            )
    put_constants(groups, "predictions_constant_data", sampler.model, arguments, sizes, skip)
