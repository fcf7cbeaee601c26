"""What `from_pyro` and `from_pyro_svi` share: arrays by group and variable become an `InferenceData` or `DataTree`.

`Groups` collects arrays ([draws], *batch, *event) with the names of their dimensions, and stacks those that are the
steps of one variable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import arviz
import numpy as np
import pyro
import xarray as xr
from torch import Tensor

__all__ = ["Dims", "Groups"]

Dims = Mapping[str, Sequence[str]]

CONDITIONAL = "conditional"  # log p(x|z) of the observed sites by their names, which becomes part of sample_stats
GROUPS = (
    "posterior",
    "posterior_predictive",
    "predictions",
    "log_likelihood",
    "log_prior",
    "sample_stats",
    CONDITIONAL,
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
    "predictions_constant_data",
)
FOLLOWING = ("posterior", "posterior_predictive", "log_prior", CONDITIONAL)  # from the latents of each draw


@dataclass(frozen=True)
class _Variable:
    """An array ([draws], *batch, *event).

    Attributes:
        array: the values.
        batch: names of the batch dimensions; None for one that has none.
        draws: whether the first dimension is that of the draws.
        steps: of a stacked variable, the labels of its last batch dimension.
    """

    array: np.ndarray
    batch: tuple[str | None, ...]
    draws: bool
    steps: tuple[int, ...] = ()


class Groups:
    """Collects arrays by group and variable, with the names of their dimensions, and makes a tree of them.

    Args:
        coords: {dimension: labels}.
        dims: {variable: names of its event dimensions, or of all that follow (chain, draw)}.
        num_chains: chains that the draws consist of.
        stack: {name: dimension}: variables name_0, name_1, … become one, with this dimension after those of plates.

    Attributes:
        attributes: {group: its attributes}.
        everywhere: attributes of all groups.
        rows: the dimension of the data points, which are others in predictions, and have no labels there.
    """

    def __init__(
        self,
        coords: Mapping[str, Any] | None,
        dims: Dims | None,
        num_chains: int = 1,
        stack: Mapping[str, str] | None = None,
    ) -> None:
        self.coords, self.dims, self.num_chains, self.stack = coords or {}, dims or {}, num_chains, stack or {}
        self.attributes: dict[str, dict[str, Any]] = {}
        self.everywhere: dict[str, Any] = {}
        self.rows: str | None = None
        self._arrays: dict[str, dict[str, _Variable]] = {group: {} for group in GROUPS}

    def put(
        self,
        group: str,
        name: str,
        value: Tensor | np.ndarray,
        batch: Sequence[str | None],
        *,
        draws: bool = False,
        at: tuple[slice, ...] | None = None,
        size: tuple[int, ...] = (),
    ) -> None:
        """Stores a variable ([draws], *batch, *event), or a part of it, at the slices `at` of an array of `size`."""
        array: np.ndarray = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        if at is not None:
            part, known = array, self._arrays[group].get(name)
            array = np.empty((*size, *part.shape[len(size) :]), part.dtype) if known is None else known.array
            array[at] = part
        self._arrays[group][name] = _Variable(array, tuple(batch), draws)

    def get(self, group: str, name: str) -> np.ndarray:
        """The array of a variable as it was put."""
        return self._arrays[group][name].array

    def take(self, index: np.ndarray, plate: str | None) -> None:
        """Takes draws at an index in what follows from the latents: one for all, (S,), or for each row of a plate."""
        for group in (*FOLLOWING, *(["log_likelihood"] if plate is None else [])):
            for name, variable in self._arrays[group].items():
                if plate is None:
                    array = variable.array[index]
                elif variable.batch[:1] == (plate,):
                    shape = index.shape + (1,) * (variable.array.ndim - 2)
                    array = np.take_along_axis(variable.array, index.reshape(shape), 0)
                else:
                    raise ValueError(
                        f"resample: {name!r} is computed from several data points, whose draws are resampled by "
                        "themselves. Try to compute it inside the plate, or from the resampled draws."
                    )
                self._arrays[group][name] = replace(variable, array=array)
        stats = self._arrays["sample_stats"]
        for name in ("log_p", "log_q"):
            array = stats[name].array
            stats[name] = replace(
                stats[name], array=array[index] if plate is None else np.take_along_axis(array, index, 0)
            )
        del stats["log_weights"]  # those that were drawn have equal ones

    def tree(self) -> Any:
        """An `arviz.InferenceData` with ArviZ 0.2x, an `xarray.DataTree` with ArviZ 1.x."""
        attributes = {
            "created_at": datetime.now(UTC).isoformat(),
            "creation_library": "pyro_vae",
            "inference_library": "pyro-ppl",
            "inference_library_version": pyro.__version__,
            **self.everywhere,
        }
        arrays = self._stacked()
        names = _dimensions(arrays, self.dims)
        for name, variable in arrays.pop(CONDITIONAL).items():
            of_stats = f"log_p_{name}_given_latents"
            arrays["sample_stats"][of_stats], names[of_stats] = variable, names[name]
        datasets = {
            group: self._dataset(group, variables, names).assign_attrs(attributes | self.attributes.get(group, {}))
            for group, variables in arrays.items()
            if variables
        }
        for what, given, known in (
            ("dims", self.dims, {name for d in datasets.values() for name in d.data_vars}),
            ("coords", self.coords, {dim for d in datasets.values() for dim in d.dims}),
        ):
            if unknown := given.keys() - known:
                raise ValueError(
                    f"{what}: expected names among {sorted(known)}, got {sorted(unknown)}. Try one of these."
                )
        if arviz.__version__.startswith("0."):  # in 1.x, the name InferenceData stands for DataTree
            return arviz.InferenceData(**datasets)
        return xr.DataTree.from_dict(datasets)

    def _stacked(self) -> dict[str, dict[str, _Variable]]:
        found = {group: dict(variables) for group, variables in self._arrays.items()}
        for name, dim in self.stack.items():
            steps = {group: _steps(name, variables) for group, variables in found.items()}
            if not any(steps.values()):
                known = sorted({variable for variables in found.values() for variable in variables})
                raise ValueError(
                    f"stack[{name!r}]: expected variables {name}_0, {name}_1, …, got only {known}. Try other names."
                )
            for group, of_group in steps.items():
                if of_group:
                    parts = {step: found[group].pop(own) for step, own in of_group.items()}
                    found[group][name] = _stack(name, dim, parts)
        return found

    def _dataset(self, group: str, arrays: dict[str, _Variable], known: dict[str, list[str]]) -> xr.Dataset:
        chains = 1 if group.startswith("prior") else self.num_chains
        variables: dict[str, Any] = {}
        coords: dict[str, np.ndarray] = {}
        for name, variable in arrays.items():
            array, draws = variable.array, variable.draws
            names = known[name][: array.ndim - draws]
            for i, (dim, size) in enumerate(zip(names, array.shape[draws:], strict=True)):
                steps = variable.steps if i == len(variable.batch) - 1 else ()
                given = None if group.startswith("predictions") and dim == self.rows else self.coords.get(dim)
                labels = np.asarray(given if given is not None else steps or np.arange(size))
                if labels.shape != (size,):
                    raise ValueError(f"coords[{dim!r}]: expected {size} labels, got {labels.shape}. Try as many.")
                if not np.array_equal(coords.setdefault(dim, labels), labels):
                    raise ValueError(
                        f"dimension {dim!r} of {group}: {name!r} has {size} labels from {labels[0]} to {labels[-1]}, "
                        f"another variable has {len(coords[dim])} from {coords[dim][0]} to {coords[dim][-1]}. Try "
                        "another name for one of them, in `dims` or `stack`."
                    )
            if draws:
                array = array.reshape(chains, -1, *array.shape[1:])
                names = ["chain", "draw", *names]
                coords |= {"chain": np.arange(chains), "draw": np.arange(array.shape[1])}
            variables[name] = (names, array)
        return xr.Dataset(variables, coords)


def _steps(name: str, variables: Mapping[str, _Variable]) -> dict[int, str]:
    """{step: variable} of those that are called name_0, name_1, …, by their numbers."""
    matches = ((re.fullmatch(rf"{re.escape(name)}_?(\d+)", variable), variable) for variable in variables)
    pairs = [(int(match[1]), variable) for match, variable in matches if match]
    if len({step for step, _ in pairs}) < len(pairs) or (pairs and name in variables):
        raise ValueError(f"stack[{name!r}]: two variables for one step among {sorted(variables)}.")
    return dict(sorted(pairs))


def _stack(name: str, dim: str, parts: dict[int, _Variable]) -> _Variable:
    shapes = {step: part.array.shape for step, part in parts.items()}
    first = next(iter(parts.values()))
    batch, draws = first.batch, first.draws
    if len(set(shapes.values())) > 1 or len({part.batch for part in parts.values()}) > 1:
        raise ValueError(
            f"stack[{name!r}]: expected the same shape in all steps, got {shapes}. Try to leave it out of `stack`, or "
            "to sample the largest shape each time and to mask what does not exist."
        )
    array = np.stack([part.array for part in parts.values()], axis=draws + len(batch))
    return replace(first, array=array, batch=(*batch, dim), steps=tuple(parts))


def _dimensions(arrays: Mapping[str, Mapping[str, _Variable]], dims: Dims) -> dict[str, list[str]]:
    """The names of each variable's dimensions, the same in every group. Its log-probabilities have the first ones."""
    longest: dict[str, _Variable] = {}
    for variables in arrays.values():
        for name, variable in variables.items():
            if name not in longest or _rank(variable) > _rank(longest[name]):
                longest[name] = variable
    return {
        name: _names(name, _rank(variable), variable.batch, dims.get(name, ())) for name, variable in longest.items()
    }


def _rank(variable: _Variable) -> int:
    return variable.array.ndim - variable.draws


def _names(name: str, ndim: int, batch: Sequence[str | None], given: Sequence[str]) -> list[str]:
    unnamed = iter(f"{name}_dim_{i}" for i in range(ndim))
    names = [known or next(unnamed) for known in (*batch, *[None] * (ndim - len(batch)))]
    event = ndim - len(batch)
    if given and len(given) not in (ndim, event):
        raise ValueError(
            f"dims[{name!r}]: expected {event} names for the event dimensions, or {ndim} for all that follow "
            f"(chain, draw), got {list(given)}. Try a list of as many names."
        )
    names[ndim - len(given) :] = given
    return [f"{n}_plate" if n == name else n for n in names]
