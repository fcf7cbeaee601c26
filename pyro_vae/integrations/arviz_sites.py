"""What the sites of a model are to ArviZ: latent, observed or computed, with the plates of their dimensions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import pyro.distributions as dist
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.pairs.libraries import warn
from pyro_vae.pairs.sites import base_distribution

__all__ = ["ModelSites", "Release", "Variable", "find_plate", "plate_sizes"]


@dataclass(frozen=True)
class Variable:
    """A site of a model.

    Attributes:
        role: "latent", "observed" (the user's data) or "computed" (`pyro.deterministic`, and latents that were
            reparametrised: their sites are points, which follow from others).
        dims: dimensions of its value in a run of the model alone.
        event_dim: those of one value.
        plates: {dim: name} of the plates around it, as far as its value has their dimensions.
    """

    role: str
    dims: int
    event_dim: int
    plates: dict[int, str]

    def aligned(self, value: Tensor, *, log_prob: bool = False) -> tuple[Tensor, list[str | None]]:
        """A value (or log-probability) of a run of the model alone without the dimensions that belong to nothing, and
        the names of its batch dimensions."""
        batch = value.dim() - (0 if log_prob else self.event_dim)
        kept = [i for i in range(batch) if i - batch in self.plates or value.shape[i] > 1]
        shape = [value.shape[i] for i in kept] + list(value.shape[batch:])
        return value.reshape(shape), [self.plates.get(i - batch) for i in kept]


class ModelSites:
    """The sites of a model, from a trace of it, run alone.

    Attributes:
        variables: {site: what it is}.
        latents: names of the latent sites.
        observed: names of the observed ones.
        nesting: dimensions that plates take.
        sizes: {plate: size} of the plates around observed sites.
        plate: the plate that all observed sites are in, of several the outermost; None: there is none.
        together: a name for what all observed sites of a data point have together.
    """

    def __init__(self, trace: poutine.Trace) -> None:
        nodes = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}
        self.variables = {name: _variable(site) for name, site in nodes.items()}
        self.latents = {name for name, variable in self.variables.items() if variable.role == "latent"}
        self.observed = {name for name, variable in self.variables.items() if variable.role == "observed"}
        self.nesting = max((-dim for variable in self.variables.values() for dim in variable.plates), default=0)
        self.sizes = plate_sizes(trace, self.observed)
        self.together = next(iter(self.observed)) if len(self.observed) == 1 else "joint"
        self._stacks = {
            name: [f.name for f in site["cond_indep_stack"] if f.vectorized] for name, site in nodes.items()
        }
        stacks = [self._stacks[name] for name in sorted(self.observed)]
        common = set.intersection(*map(set, stacks)) if stacks else set()
        self.plate = next((plate for stack in stacks for plate in stack if plate in common), None)

    def inside(self, names: Collection[str]) -> set[str]:
        """Those of these sites that are in the plate that all observed sites are in."""
        return {name for name in names if self.plate in self._stacks[name]}


def _variable(site: dict) -> Variable:
    value, frames = site["value"], [f for f in site["cond_indep_stack"] if f.dim is not None]
    event = len(site["fn"].event_shape)
    if site["infer"].get("_deterministic") and event == value.dim():
        # this is Pyro's default, also inside plates: then as few belong to one value as the sizes of plates allow
        fits = (e for e in range(value.dim() + 1) if all(_has(value, f.dim - e, f.size) for f in frames))
        event = next(fits, event) if frames else event
    plates = {f.dim: f.name for f in frames if value.dim() - event >= -f.dim}
    return Variable(_role(site), value.dim(), event, plates)


def _has(value: Tensor, dim: int, size: int) -> bool:
    return value.dim() >= -dim and value.shape[dim] == size


def _role(site: dict) -> str:
    if site["infer"].get("_deterministic"):
        return "computed"
    if not site["is_observed"]:
        return "latent"
    fn = base_distribution(site["fn"])
    point = isinstance(fn, dist.Delta) and fn.v.data_ptr() == site["value"].data_ptr()
    return "computed" if point else "observed"


def plate_sizes(trace: poutine.Trace, names: Collection[str]) -> dict[str, int]:
    """{plate: size} of the plates around some sites."""
    frames = [f for name in names if name in trace.nodes for f in trace.nodes[name]["cond_indep_stack"] if f.vectorized]
    return {frame.name: frame.size for frame in frames}


def find_plate(trace: poutine.Trace) -> str | None:
    """The plate of data points: "data" if all observed sites are in it, else the one that they all are in.

    Of several the one that has latents in it, and of these the outermost, with a warning. None: there is no such plate.
    """
    stacks: dict[str, list[list[str]]] = {}
    for name, variable in ModelSites(trace).variables.items():
        stacks.setdefault(variable.role, []).append([f.name for f in trace.nodes[name]["cond_indep_stack"]])
    observed = stacks.get("observed", [])
    common = [plate for plate in (observed[0] if observed else []) if all(plate in stack for stack in observed)]
    if "data" in common or len(common) < 2:
        return "data" if "data" in common else next(iter(common), None)
    within = [plate for plate in common if any(plate in stack for stack in stacks.get("latent", []))]
    if len(within) == 1:
        return within[0]
    found = (within or common)[0]
    warn(
        f"all observed sites are in the plates {common}; data points are those of {found!r}. Try plate=… to say which."
    )
    return found


class Release(Messenger):
    """Samples observed sites anew. `poutine.uncondition` samples computed ones too: those in plates change shape."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.names and msg["is_observed"]:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
