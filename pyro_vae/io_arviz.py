"""ArviZ: what a Pyro model and its inference say, as `InferenceData` (ArviZ 0.2x) or `xarray.DataTree` (ArviZ 1.x).

Both hold the same groups, variables, dimensions and coordinates, and save to netCDF. Dimensions are (chain, draw), then
one named after each plate, then those of the event, named by the user or `site_dim_0`, …

The draws of an amortized posterior are independent, so R-hat and MCMC's effective sample size say nothing about them.
`sample_stats` does: the importance weights of the draws, and per data point the evidence, its effective sample size and
k-hat. `log_likelihood` is log p(x|z), given the latents of the same point: leave-one-out cross-validation of it
(`az.loo`) does not compare models. For that there is the marginal log p(x) of held-out data, `log_evidence`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import arviz
import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from pyro_vae.evidence import LogWeightSummary
from pyro_vae.particles import Particles, ParticleSampler, check_num_particles
from pyro_vae.progress import progress_bar
from pyro_vae.traces import SetValues, evaluation_mode, sample_sites, site_log_prob

__all__ = ["from_pyro", "from_pyro_svi"]

Dims = Mapping[str, Sequence[str]]


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
    """Converts a Pyro model and guide, trained by SVI, with data points in a plate.

    Groups: posterior (draws of the guide), posterior_predictive (x ~ p(x|z) for each of them), prior, prior_predictive,
    observed_data, log_likelihood (log p(x|z), per element of the innermost plates) and sample_stats: per draw `log_p`
    (log p(x, z)), `log_q` (log q(z|x)) and `log_weights` (their difference), per data point `log_evidence`, its
    `log_evidence_error`, `ess` and `pareto_k`, all in nats, by importance sampling with the same draws.

    Args:
        model: a Pyro model.
        guide: its guide.
        *args: what both are called with.
        num_samples: draws.
        plate: name of the plate of data points.
        coords: {dimension: labels}; default 0, 1, 2, …
        dims: {site: names of its event dimensions, or of all that follow (chain, draw)}.
        progress: show a progress bar, if on a terminal.
        **kwargs: what both are called with.

    Returns:
        `arviz.InferenceData` on ArviZ 0.2x, `xarray.DataTree` on 1.x; one chain.

    Raises:
        ValueError: as `draw_particles`; coords or dims that do not fit.

    Example:
        >>> import pyro.distributions as dist
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
    if sampler.layout.summed:
        raise ValueError(
            f"from_pyro_svi: the guide has no draws of the latent sites {sorted(sampler.layout.summed)}, which are "
            "summed out. Try pyro.infer.infer_discrete to draw them, or a guide that has them."
        )
    groups = _Groups(coords, dims)
    generative = poutine.uncondition(model)
    points: list[tuple[Tensor, ...]] = []
    with torch.no_grad(), evaluation_mode():
        all_rows, counts = sampler.chunks(num_samples)
        with progress_bar(len(all_rows) * len(counts), "draws for ArviZ", progress) as bar:
            for rows in all_rows:
                summary, stop = LogWeightSummary(num_samples), 0
                for count in counts:
                    draws, stop = slice(stop, stop + count), stop + count
                    put = _Chunk(groups, sampler, (num_samples, sampler.num_points), (draws, rows))
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


def from_pyro(
    mcmc: Any,
    *,
    coords: Mapping[str, Any] | None = None,
    dims: Dims | None = None,
    progress: bool = True,
) -> Any:
    """Converts a run of Pyro's MCMC, which ArviZ 1.x no longer does.

    Groups: posterior (chain, draw), sample_stats (`diverging`), and, by running the model once for each draw exactly as
    MCMC did, posterior_predictive, log_likelihood, observed_data, and prior and prior_predictive of as many draws as a
    chain has. A kernel that was made from a potential function has no model, and gives the first two.

    Args:
        mcmc: a `pyro.infer.MCMC` after `run`.
        coords: {dimension: labels}; default 0, 1, 2, …
        dims: {site: names of its event dimensions, or of all that follow (chain, draw)}.
        progress: show a progress bar, if on a terminal.

    Returns:
        `arviz.InferenceData` on ArviZ 0.2x, `xarray.DataTree` on 1.x.

    Raises:
        TypeError: not an MCMC run.
        ValueError: coords or dims that do not fit; a latent of the model that MCMC summed out, which no draw tells of.

    Example:
        >>> import pyro.distributions as dist
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
    groups = _Groups(coords, dims, num_chains)
    model, args, kwargs = mcmc.kernel.model, mcmc._args, mcmc._kwargs
    first = {name: value[0, 0] for name, value in samples.items()}
    plates: dict[str, list[str | None]] = {}
    if model is not None:
        trace = poutine.trace(SetValues(first)(model)).get_trace(*args, **kwargs)
        sites = sample_sites(trace)
        plates = {name: _batch_dims(site) for name, site in sites.items()}
        unseen = [name for name, site in sites.items() if not site["is_observed"] and name not in samples]
        if unseen:
            raise ValueError(
                f"from_pyro: MCMC has no draws of the latent sites {unseen}, which it summed out. Try "
                "pyro.infer.infer_discrete to draw them, or a kernel without enumeration."
            )
    for name, value in samples.items():
        groups.put("posterior", name, value.flatten(0, 1), plates.get(name, []), draws=True)
    diverging = torch.zeros(num_chains, num_draws, dtype=torch.bool)
    for chain, diagnostics in enumerate(mcmc._diagnostics):
        diverging[chain, list(diagnostics.get("divergences", []))] = True
    groups.put("sample_stats", "diverging", diverging.flatten(), [], draws=True)
    if model is None:
        return groups.tree()
    generative = poutine.uncondition(model)
    draws: dict[tuple[str, str], list[Tensor]] = {}
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
                        draws.setdefault(("prior_predictive" if observed else "prior", name), []).append(site["value"])
                    elif observed:
                        value = site_log_prob(site) if group == "log_likelihood" else site["value"]
                        draws.setdefault((group, name), []).append(value)
            bar.update()
    for name, site in sites.items():
        if site["is_observed"]:
            groups.put("observed_data", name, site["value"], plates[name])
    for (group, name), drawn in draws.items():
        groups.put(group, name, torch.stack(drawn), plates[name], draws=True)
    return groups.tree()


class _Groups:
    """Arrays by group and variable, with the names of their dimensions, on their way into a tree."""

    def __init__(self, coords: Mapping[str, Any] | None, dims: Dims | None, num_chains: int = 1) -> None:
        self.coords, self.dims, self.num_chains = coords or {}, dims or {}, num_chains
        self._known: dict[str, list[str]] = {}
        self._arrays: dict[str, dict[str, tuple[np.ndarray, list[str], bool]]] = {group: {} for group in _GROUPS}

    def put(
        self,
        group: str,
        name: str,
        value: Tensor,
        batch: Sequence[str | None],
        *,
        draws: bool = False,
        at: tuple[slice, ...] | None = None,
        size: tuple[int, ...] = (),
    ) -> None:
        """Takes a variable ([draws], *batch, *event), or the part of it that belongs at the slices `at` of `size`."""
        value = value.detach().cpu().numpy()
        if at is not None:
            known = self._arrays[group].get(name)
            array = np.empty(size + value.shape[len(size) :], value.dtype) if known is None else known[0]
            array[at] = value
            value = array
        names = self._names(name, value.ndim - draws, batch)
        self._arrays[group][name] = value, names, draws

    def _names(self, name: str, ndim: int, batch: Sequence[str | None]) -> list[str]:
        """Names of the dimensions of a variable, the same in every group; its log-likelihood has the first of them."""
        if name not in self._known:
            automatic = [f"{name}_dim_{i}" for i in range(ndim)]
            names = [given or automatic[i] for i, given in enumerate(batch)] + automatic[: ndim - len(batch)]
            given, event = list(self.dims.get(name, ())), ndim - len(batch)
            if given and len(given) not in (ndim, event):
                raise ValueError(
                    f"dims[{name!r}]: expected {event} names for the event dimensions, or {ndim} for all that follow "
                    f"(chain, draw), got {given}."
                )
            names[ndim - len(given) :] = given
            self._known[name] = [f"{n}_plate" if n == name else n for n in names]
        return self._known[name][:ndim]

    def tree(self) -> Any:
        """An `arviz.InferenceData`, or an `xarray.DataTree` where ArviZ has it no more."""
        attributes = {
            "created_at": datetime.now(UTC).isoformat(),
            "creation_library": "pyro_vae",
            "inference_library": "pyro-ppl",
            "inference_library_version": pyro.__version__,
        }
        datasets = {
            group: self._dataset(group, arrays).assign_attrs(attributes)
            for group, arrays in self._arrays.items()
            if arrays
        }
        for what, given, known in (
            ("dims", self.dims, {name for d in datasets.values() for name in d.data_vars}),
            ("coords", self.coords, {dim for d in datasets.values() for dim in d.dims}),
        ):
            if unknown := given.keys() - known:
                raise ValueError(f"{what}: expected names among {sorted(known)}, got {sorted(unknown)}.")
        if arviz.__version__.startswith("0."):  # 1.x has the name InferenceData, for a DataTree
            return arviz.InferenceData(**datasets)
        return xr.DataTree.from_dict(datasets)

    def _dataset(self, group: str, arrays: dict[str, tuple[np.ndarray, list[str], bool]]) -> xr.Dataset:
        chains = 1 if group.startswith("prior") else self.num_chains
        variables, coords = {}, {}
        for name, (array, names, draws) in arrays.items():
            for dim, size in zip(names, array.shape[draws:], strict=True):
                coords[dim] = np.asarray(self.coords.get(dim, np.arange(size)))
                if coords[dim].shape != (size,):
                    raise ValueError(f"coords[{dim!r}]: expected {size} labels, got {coords[dim].shape}.")
            if draws:
                array = array.reshape(chains, -1, *array.shape[1:])
                names = ["chain", "draw", *names]
                coords |= {"chain": np.arange(chains), "draw": np.arange(array.shape[1])}
            variables[name] = (names, array)
        return xr.Dataset(variables, coords)


class _Chunk:
    """Puts the aligned sites of traces under the particle plate where their draws and rows belong."""

    def __init__(
        self, groups: _Groups, sampler: ParticleSampler, size: tuple[int, int], at: tuple[slice, slice]
    ) -> None:
        self.groups, self.sampler, self.size, self.at = groups, sampler, size, at

    def draws(self, group: str, name: str, value: Tensor, batch: list[str]) -> None:
        self.groups.put(group, name, value, batch, draws=True, at=self.at, size=self.size)

    def sites(self, trace: poutine.Trace, predictive: str | None = None, *, latent: str | None = None) -> None:
        """Sites that were observed before `uncondition` go to the group `predictive`, others to `latent`, if given."""
        for name, site in sample_sites(trace).items():
            group = predictive if site["infer"].get("was_observed") else None if site["is_observed"] else latent
            if group is not None:
                self.draws(group, name, self.sampler.layout.align(site, self.at[1]), self.sampler.layout.plates(site))

    def observed(self, model_trace: poutine.Trace) -> None:
        for name, site in sample_sites(model_trace).items():
            if site["is_observed"]:
                batch, rows = self.sampler.layout.plates(site), self.at[1]
                self.draws(
                    "log_likelihood", name, self.sampler.layout.align(site, rows, value=site_log_prob(site)), batch
                )
                value = self.sampler.layout.align(site, rows)[0]
                self.groups.put("observed_data", name, value, batch, at=(rows,), size=self.size[1:])

    def stats(self, particles: Particles) -> None:
        batch = [self.sampler.layout.plate]
        self.draws("sample_stats", "log_p", particles.log_prior + particles.log_likelihood, batch)
        self.draws("sample_stats", "log_q", particles.log_posterior, batch)
        self.draws("sample_stats", "log_weights", particles.log_weight, batch)


_GROUPS = (
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "sample_stats",
    "prior",
    "prior_predictive",
    "observed_data",
)


def _batch_dims(site: dict) -> list[str | None]:
    """A name for each batch dimension of a site's value, from its plates."""
    batch = site["value"].dim() - len(site["fn"].event_shape)
    names = {f.dim: f.name for f in site["cond_indep_stack"]}
    return [names.get(dim) for dim in range(-batch, 0)]
