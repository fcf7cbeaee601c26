"""Runs of single particles, put together: one trace with a dimension of particles out of K traces without one.

Where a pair does not run for many particles at once, each runs alone. Everything else reads traces that have the
particles in a dimension left of the plates; `StackedTrace` looks like one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions import constraints

__all__ = ["StackedTrace", "parts_of"]


class StackedTrace:
    """K traces of one function as one trace, whose values and log-probabilities are (K, *plates, …).

    A site that some of the runs do not have is NaN there (0 where it is an integer), with log-probability zero: what
    does not exist has no factor.

    Args:
        parts: the traces.
        nesting: dimensions that the function's plates take.

    Attributes:
        parts: as given.

    Raises:
        ValueError: on reading `nodes`, where a site has another shape from run to run.
    """

    def __init__(self, parts: Sequence[poutine.Trace], nesting: int) -> None:
        self.parts, self.nesting = list(parts), nesting

    @cached_property
    def nodes(self) -> dict[str, dict]:
        names = dict.fromkeys(name for part in self.parts for name in part.nodes)
        return {name: self._stack(name, [part.nodes.get(name) for part in self.parts]) for name in names}

    def _stack(self, name: str, nodes: list[Any]) -> dict:
        first = next(node for node in nodes if node is not None)
        if first["type"] != "sample" or site_is_subsample(first):
            return first
        known = [node for node in nodes if node is not None]
        try:
            fn = Stacked(
                [node and node["fn"] for node in nodes], [node and node["value"] for node in nodes], self.nesting
            )
            value = first["value"]
            same = first["is_observed"] and len(known) == len(nodes) and all(n["value"] is value for n in known)
            found = {**first, "fn": fn, "value": value if same else fn.values}
            for key in ("mask", "log_det"):
                if any(node.get(key) is not None for node in known):
                    parts = [True if node is None or node.get(key) is None else node[key] for node in nodes]
                    found[key] = torch.stack(
                        torch.broadcast_tensors(*(_padded(torch.as_tensor(p), self.nesting) for p in parts))
                    )
        except RuntimeError as error:
            shapes = sorted({tuple(node["value"].shape) for node in known})
            raise ValueError(
                f"site {name!r} has values of the shapes {shapes[:3]} in different runs, which do not "
                "fit into one tensor. Try to sample the largest shape each time, and to mask what does not exist."
            ) from error
        return found


class Stacked(TorchDistribution):
    """The distributions of one site in K runs: batch shape (K, *batch).

    Args:
        fns: of the runs; None where a run has no such site.
        values: of the site in these runs.
        nesting: dimensions that plates take.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, fns: list[Any], values: list[Tensor | None], nesting: int) -> None:
        self.fns, self.parts, self.nesting = fns, values, nesting
        first = next(fn for fn in fns if fn is not None)
        self.has_enumerate_support = getattr(first, "has_enumerate_support", False)
        self.values = self._together(values, len(first.event_shape), missing=torch.nan)
        event = len(first.event_shape)
        batch = self.values.shape[: self.values.dim() - event]
        super().__init__(Size(batch), first.event_shape, validate_args=False)

    def _together(self, parts: list[Tensor | None], event: int, missing: float) -> Tensor:
        like = next(p for p in parts if p is not None)
        empty = missing if like.is_floating_point() else 0
        filled = [torch.full_like(like, empty) if p is None else p for p in parts]
        return torch.stack(torch.broadcast_tensors(*(_padded(p, self.nesting + event) for p in filled)))

    @property
    def support(self) -> Any:
        supports = [_anything if fn is None else fn.support for fn in self.fns]
        if all(_same(support, supports[0]) for support in supports):
            return supports[0]
        return constraints.stack(supports, dim=0)

    def log_prob(self, value: Tensor) -> Tensor:
        if len(self.fns) == 1 and value.shape[:1] != (1,):  # values of other particles
            return self.fns[0].log_prob(value)
        own = value is self.values or any(value is part for part in self.parts)
        values = self.parts if own else value.expand(len(self.fns), *value.shape[1:])
        pairs = zip(self.fns, values, strict=True)
        return self._together([None if fn is None else fn.log_prob(v) for fn, v in pairs], 0, missing=0.0)

    def sample(self, sample_shape: Size = Size()) -> Tensor:
        if sample_shape:
            raise NotImplementedError("one draw for each run")
        draws = [None if fn is None else fn.sample() for fn in self.fns]
        return self._together(draws, len(self.event_shape), missing=torch.nan)

    def of_each(self, what: Callable[[Any], Tensor], event: int) -> Tensor:
        """A tensor of each run's distribution, (K, *batch, *event)."""
        return self._together([None if fn is None else what(fn) for fn in self.fns], event, missing=torch.nan)

    @property
    def mean(self) -> Tensor:
        return self.of_each(lambda fn: fn.mean, len(self.event_shape))

    @property
    def variance(self) -> Tensor:
        return self.of_each(lambda fn: fn.variance, len(self.event_shape))


class _Anything(constraints.Constraint):
    """The support of a site in a run that does not have it."""

    def check(self, value: Tensor) -> Tensor:
        return torch.ones_like(value, dtype=torch.bool)


_anything = _Anything()


def _same(a: Any, b: Any) -> bool:
    """Whether two supports are one: `independent` ones are made anew each time that they are asked for."""
    while isinstance(a, constraints.independent) and isinstance(b, constraints.independent):
        if a.reinterpreted_batch_ndims != b.reinterpreted_batch_ndims:
            return False
        a, b = a.base_constraint, b.base_constraint
    return a is b


def parts_of(trace: Any) -> list[Any]:
    """The traces of single runs of which a trace consists; the trace itself where it is one run of all particles."""
    return trace.parts if isinstance(trace, StackedTrace) else [trace]


def _padded(value: Tensor, dims: int) -> Tensor:
    return value.reshape((1,) * (dims - value.dim()) + value.shape)
