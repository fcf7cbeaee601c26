"""What `from_pyro` and `from_pyro_svi` share: arrays by group and variable become an `InferenceData` or `DataTree`.

`Groups` collects arrays ([draws], *batch, *event) with the names of their dimensions. `Chunk` puts the traces of some
particles × rows at their place in these arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import arviz
import numpy as np
import pyro
import xarray as xr
from pyro import poutine
from torch import Tensor

from pyro_vae.pairs.sites import sample_sites, site_log_prob
from pyro_vae.particles.particles import Particles
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["Chunk", "Dims", "Groups", "batch_dims"]

Dims = Mapping[str, Sequence[str]]


class Groups:
    """Collects arrays by group and variable, with the names of their dimensions, and makes a tree of them."""

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
        """Stores a variable ([draws], *batch, *event), or a part of it, at the slices `at` of an array of `size`."""
        array: np.ndarray = value.detach().cpu().numpy()
        if at is not None:
            part, known = array, self._arrays[group].get(name)
            array = np.empty((*size, *part.shape[len(size) :]), part.dtype) if known is None else known[0]
            array[at] = part
        names = self._names(name, array.ndim - draws, batch)
        self._arrays[group][name] = array, names, draws

    def _names(self, name: str, ndim: int, batch: Sequence[str | None]) -> list[str]:
        """The names of a variable's dimensions, the same in every group. Its log-likelihood has only the first ones."""
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
        """An `arviz.InferenceData` with ArviZ 0.2x, an `xarray.DataTree` with ArviZ 1.x."""
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
        if arviz.__version__.startswith("0."):  # in 1.x, the name InferenceData stands for DataTree
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


class Chunk:
    """Aligns the sites of traces that ran under the particle plate, and stores them at their draws and rows."""

    def __init__(
        self, groups: Groups, sampler: ParticleSampler, size: tuple[int, int], at: tuple[slice, slice]
    ) -> None:
        self.groups, self.sampler, self.size, self.at = groups, sampler, size, at

    def draws(self, group: str, name: str, value: Tensor, batch: list[str]) -> None:
        """Stores a variable that has a value for each draw."""
        self.groups.put(group, name, value, batch, draws=True, at=self.at, size=self.size)

    def sites(self, trace: poutine.Trace, predictive: str | None = None, *, latent: str | None = None) -> None:
        """Stores sites that were observed before `uncondition` in group `predictive`, others in `latent`, if given."""
        for name, site in sample_sites(trace).items():
            group = predictive if site["infer"].get("was_observed") else None if site["is_observed"] else latent
            if group is not None:
                self.draws(group, name, self.sampler.layout.align(site, self.at[1]), self.sampler.layout.plates(site))

    def observed(self, model_trace: poutine.Trace) -> None:
        """Stores the log-likelihood and the data of each observed site."""
        for name, site in sample_sites(model_trace).items():
            if site["is_observed"]:
                batch, rows = self.sampler.layout.plates(site), self.at[1]
                self.draws(
                    "log_likelihood", name, self.sampler.layout.align(site, rows, value=site_log_prob(site)), batch
                )
                value = self.sampler.layout.align(site, rows)[0]
                self.groups.put("observed_data", name, value, batch, at=(rows,), size=self.size[1:])

    def stats(self, particles: Particles) -> None:
        """Stores log p(x, z), log q(z|x) and the log-weight of each draw."""
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


def batch_dims(site: dict) -> list[str | None]:
    """The name of each batch dimension of a site's value, from its plates."""
    batch = site["value"].dim() - len(site["fn"].event_shape)
    names = {f.dim: f.name for f in site["cond_indep_stack"]}
    return [names.get(dim) for dim in range(-batch, 0)]
