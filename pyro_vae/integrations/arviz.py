"""ArviZ: Pyro models and their inference as `InferenceData` (ArviZ 0.2x) or `xarray.DataTree` (ArviZ 1.x).

Both hold the same groups, variables, dimensions and coordinates, and can be saved to netCDF. The dimensions are (chain,
draw), then one named after each plate, then those of the event, which the user names or which are `site_dim_0`, ….

The draws of an amortized posterior are independent, so that R-hat and MCMC's effective sample size say nothing about
them. `sample_stats` does: it holds the importance weights of the draws and, for each data point, the evidence, its
effective sample size and k-hat. `log_likelihood` is log p(x|z), given the latents of the same data point, so that
its leave-one-out cross-validation (`az.loo`) does not compare models. To compare models, use `log_evidence`, the
marginal log p(x), of held-out data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.evidence.log_weights import LogWeightSummary
from pyro_vae.integrations.arviz_groups import Chunk, Dims, Groups, batch_dims
from pyro_vae.pairs.checks import check_num_particles
from pyro_vae.pairs.handlers import SetValues
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.sites import sample_sites, site_log_prob
from pyro_vae.pairs.threads import one_thread
from pyro_vae.pairs.validity import check_density
from pyro_vae.particles.sampler import ParticleSampler
from pyro_vae.progress import progress_bar

__all__ = ["from_pyro", "from_pyro_svi"]


@one_thread
def from_pyro_svi(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_samples: int = 1000,
    plate: str = "data",
    coords: Mapping[str, Any] | None = None,
    dims: Dims | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    """Converts a Pyro model and guide that are trained by SVI and have their data points in a plate.

    Groups: posterior (draws of the guide), posterior_predictive (x ~ p(x|z) for each of these draws), prior,
    prior_predictive, observed_data, log_likelihood (log p(x|z), per element of the innermost plates) and sample_stats.
    For each draw, sample_stats has `log_p` (log p(x, z)), `log_q` (log q(z|x)) and `log_weights` (their difference).
    For each data point, it has `log_evidence`, its `log_evidence_error`, `ess` and `pareto_k`, from importance sampling
    with the same draws. All log-probabilities are in nats.

    Args:
        model: a Pyro model.
        guide: its guide.
        *args: what both are called with.
        num_samples: number of draws.
        plate: name of the plate of data points.
        coords: {dimension: labels}; default 0, 1, 2, …
        dims: {site: names of its event dimensions, or of all that follow (chain, draw)}.
        progress: show a progress bar, if on a terminal.
        **kwargs: what both are called with.

    Returns:
        `arviz.InferenceData` on ArviZ 0.2x, `xarray.DataTree` on 1.x; one chain.

    Raises:
        ValueError: as in `draw_particles`; also if `coords` or `dims` do not fit.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x[:, None] / 3, 0.8).expand([len(x), 2]).to_event(1))
        >>> tree = from_pyro_svi(model, guide, torch.randn(5), num_samples=50, dims={"z": ["latent"]})
        >>> tree["posterior"]["z"].dims
        ('chain', 'draw', 'data', 'latent')
    """
    num_samples = check_num_particles(num_samples, "num_samples")
    sampler = ParticleSampler(model, guide, args, kwargs, plate=plate)
    check_density(sampler.pair)
    if sampler.pair.summed:
        raise ValueError(
            f"from_pyro_svi: the guide has no draws of the latent sites {sorted(sampler.pair.summed)}, which are "
            "summed out. Try pyro.infer.infer_discrete to draw them, or a guide that draws them."
        )
    groups = Groups(coords, dims)
    generative = poutine.uncondition(model)
    points: list[tuple[Tensor, ...]] = []
    with torch.no_grad(), evaluation_mode(model, guide):
        all_rows, counts = sampler.chunks(num_samples)
        with progress_bar(len(all_rows) * len(counts), "draws for ArviZ", progress) as bar:
            for rows in all_rows:
                summary, stop = LogWeightSummary(num_samples), 0
                for count in counts:
                    draws, stop = slice(stop, stop + count), stop + count
                    put = Chunk(groups, sampler, (num_samples, sampler.num_points), (draws, rows))
                    guide_trace, model_trace = sampler.traces(count, rows, check=draws.start == 0)
                    put.sites(model_trace, latent="posterior")
                    put.sites(sampler.run(generative, count, rows, replay=guide_trace), "posterior_predictive")
                    put.sites(sampler.run(generative, count, rows), "prior_predictive", latent="prior")
                    put.observed(model_trace)
                    particles = sampler.weigh(guide_trace, model_trace, count, rows)
                    put.stats(particles)
                    summary.update(particles.log_weight)
                    bar.update()
                points.append(summary.result())
    for i, name in enumerate(("log_evidence", "log_evidence_error", "ess", "pareto_k")):
        groups.put("sample_stats", name, torch.cat([p[i] for p in points]), [plate])
    return groups.tree()


@one_thread
def from_pyro(
    mcmc: Any,
    *,
    coords: Mapping[str, Any] | None = None,
    dims: Dims | None = None,
    progress: bool = True,
) -> Any:
    """Converts a run of Pyro's MCMC, which ArviZ 1.x no longer does.

    Groups: posterior (chain, draw) and sample_stats (`diverging`). The model then runs once for each draw, exactly as
    MCMC ran it, for posterior_predictive, log_likelihood and observed_data, and for prior and prior_predictive with as
    many draws as one chain has. A kernel that was made from a potential function has no model, and gives only the first
    two groups.

    Args:
        mcmc: a `pyro.infer.MCMC` after `run`.
        coords: {dimension: labels}; default 0, 1, 2, …
        dims: {site: names of its event dimensions, or of all that follow (chain, draw)}.
        progress: show a progress bar, if on a terminal.

    Returns:
        `arviz.InferenceData` on ArviZ 0.2x, `xarray.DataTree` on 1.x.

    Raises:
        TypeError: `mcmc` is not an MCMC run.
        ValueError: `coords` or `dims` do not fit, or MCMC summed out a latent of the model, which then has no draws.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import MCMC, NUTS
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> mcmc = MCMC(NUTS(model), num_samples=20, warmup_steps=20, disable_progbar=True)
        >>> mcmc.run(torch.randn(5))
        >>> from_pyro(mcmc)["log_likelihood"]["y"].dims
        ('chain', 'draw', 'data')
    """
    if getattr(mcmc, "_samples", None) is None:
        raise TypeError(f"from_pyro: expected a pyro.infer.MCMC after run(…), got {type(mcmc).__name__}.")
    samples = mcmc.get_samples(group_by_chain=True)
    num_chains, num_draws = next(iter(samples.values())).shape[:2]
    groups = Groups(coords, dims, num_chains)
    has_model = mcmc.kernel.model is not None
    sites = _sites(mcmc, samples) if has_model else {}
    plates = {name: batch_dims(site) for name, site in sites.items()}
    for name, value in samples.items():
        groups.put("posterior", name, value.flatten(0, 1), plates.get(name, []), draws=True)
    diverging = torch.zeros(num_chains, num_draws, dtype=torch.bool)
    for chain, diagnostics in enumerate(mcmc._diagnostics):
        diverging[chain, list(diagnostics.get("divergences", []))] = True
    groups.put("sample_stats", "diverging", diverging.flatten(), [], draws=True)
    for name, site in sites.items():
        if site["is_observed"]:
            groups.put("observed_data", name, site["value"], plates[name])
    if has_model:
        for (group, name), values in _runs_of_the_model(mcmc, samples, progress).items():
            groups.put(group, name, torch.stack(values), plates[name], draws=True)
    return groups.tree()


def _sites(mcmc: Any, samples: dict[str, Tensor]) -> dict[str, dict]:
    """The sites of the model at the first draw. Raises ValueError if MCMC has no draws of one of its latent sites."""
    first = SetValues({name: value[0, 0] for name, value in samples.items()})
    sites = sample_sites(poutine.trace(first(mcmc.kernel.model)).get_trace(*mcmc._args, **mcmc._kwargs))
    unseen = [name for name, site in sites.items() if not site["is_observed"] and name not in samples]
    if unseen:
        raise ValueError(
            f"from_pyro: MCMC has no draws of the latent sites {unseen}, which it summed out. Try "
            "pyro.infer.infer_discrete to draw them, or a kernel without enumeration."
        )
    return sites


def _runs_of_the_model(mcmc: Any, samples: dict[str, Tensor], progress: bool) -> dict[tuple[str, str], list[Tensor]]:
    """{(group, site): one value per run}: the model is run with the latents of each draw, and under its prior."""
    model, args, kwargs = mcmc.kernel.model, mcmc._args, mcmc._kwargs
    generative = poutine.uncondition(model)
    num_chains, num_draws = next(iter(samples.values())).shape[:2]
    values: dict[tuple[str, str], list[Tensor]] = {}
    with torch.no_grad(), progress_bar(num_chains * num_draws, "draws for ArviZ", progress) as bar:
        for i in range(num_chains * num_draws):
            draw = SetValues({name: value.flatten(0, 1)[i] for name, value in samples.items()})
            runs = {"log_likelihood": draw(model), "posterior_predictive": draw(generative)}
            if i < num_draws:
                runs["prior"] = generative
            for group, function in runs.items():
                for name, site in sample_sites(poutine.trace(function).get_trace(*args, **kwargs)).items():
                    observed = site["is_observed"] or site["infer"].get("was_observed")
                    if group == "prior":
                        values.setdefault(("prior_predictive" if observed else "prior", name), []).append(site["value"])
                    elif observed:
                        value = site_log_prob(site) if group == "log_likelihood" else site["value"]
                        values.setdefault((group, name), []).append(value)
            bar.update()
    return values
