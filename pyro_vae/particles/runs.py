"""Runs: a model, a guide or a handled version of one of them, for K particles.

All K run at once, under one outer plate of particles left of the plates of the pair; where a pair does not run so, they
run one after the other, and their traces are put together (`pyro_vae.particles.serial`). What reads the traces need not
know which.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from time import perf_counter
from typing import Any

import pyro
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from pyro_vae.pairs.handlers import ExactDraws, SetSubsample, SetValues, StopAfter
from pyro_vae.pairs.layout import Layout
from pyro_vae.pairs.libraries import warn
from pyro_vae.pairs.look import look
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.sites import sample_sites
from pyro_vae.pairs.vectorized import PARTICLE_PLATE
from pyro_vae.particles.latents import Constrain
from pyro_vae.particles.serial import StackedTrace

__all__ = ["Runs"]

Values = Mapping[str, Tensor]


class Runs:
    """Runs of a pair's functions for K particles.

    Args:
        pair: the pair.
        layout: of the pair.
        parallel: True: all particles at once, or ValueError; False: one at a time; "auto": at once, or with a warning
            one at a time.
        computed: whether values of `pyro.deterministic` sites are wanted too.

    Attributes:
        serial: whether particles run one at a time.
    """

    def __init__(self, pair: Pair, layout: Layout, parallel: bool | str, *, computed: bool = False) -> None:
        self.pair, self.layout, self.serial = pair, layout, parallel is False
        if parallel is not False:
            try:
                pair.check_vectorized(layout, computed=computed)
            except ValueError as error:
                if parallel is True:
                    raise
                self.serial = True
                self._warn(str(error))

    def _warn(self, message: str) -> None:
        start = perf_counter()
        look(self.pair.model, self.pair.guide, self.pair.args, self.pair.kwargs)
        milliseconds = 1000 * (perf_counter() - start)
        warn(
            f"particles run one at a time, {milliseconds:.2g} ms each, not all at once: {message.partition('. ')[0]}. "
            "parallel=False does not warn; parallel=True refuses, and says how to mend it."
        )

    def __call__(
        self,
        function: Callable,
        num_particles: int,
        rows: slice | None = None,
        *,
        enumerate_sites: Collection[str] = (),
        replay: Any = None,
        values: Values | None = None,
        unconstrained: Values | None = None,
    ) -> Any:
        """A trace of `function` for K particles.

        Args:
            function: called with the pair's arguments, cut to `rows`.
            num_particles: K.
            rows: default: all.
            enumerate_sites: discrete latents to enumerate, in dimensions left of the particles'.
            replay: a trace of the last run, whose values this one takes, and whose enumerated dimensions it keeps.
            values: of latent sites, {site: (K, *plates, *event)}, as traces have them.
            unconstrained: the same in unconstrained coordinates; their sites get a `log_det`.
        """
        values, unconstrained = values or {}, unconstrained or {}
        width = self.layout.width
        if not self.serial:
            plate = pyro.plate(PARTICLE_PLATE, num_particles, dim=-width)
            given = _given(function, values, unconstrained)
            return self._trace(plate(given), rows, -1 - width, enumerate_sites, replay)
        parts = []
        for k in range(num_particles):
            own = ({name: self._alone(name, v[k]) for name, v in d.items()} for d in (values, unconstrained))
            part = None if replay is None else replay.parts[k]
            parts.append(self._trace(_given(function, *own), rows, -width, enumerate_sites, part))
        return StackedTrace(parts, width - 1)

    def _alone(self, name: str, value: Tensor) -> Tensor:
        """A value (*plates, …) with no more dimensions for plates than its site has in a run of its own."""
        site = next((t.nodes[name] for t in self.pair.look[:2] if name in t.nodes), None)
        if site is None:  # that comes and goes
            return value
        plates = site["value"].dim() - len(site["fn"].event_shape)
        surplus = max(0, self.layout.width - 1 - plates)
        return value.reshape(value.shape[surplus:])

    def _trace(
        self,
        function: Callable,
        rows: slice | None,
        first_free: int,
        enumerate_sites: Collection[str],
        replay: poutine.Trace | None,
    ) -> poutine.Trace:
        all_rows = self.layout.rows
        args, kwargs = all_rows.cut(rows)
        after = any("_enumerate_dim" in s["infer"] for s in sample_sites(replay).values()) if replay else False
        if enumerate_sites or after:
            function = poutine.infer_config(
                function, lambda site: {"enumerate": "parallel" if site["name"] in enumerate_sites else None}
            )
            function = EnumMessenger(None if after else first_free)(function)
        if replay is not None:  # outside of the enumeration, which has to see what a site's parameters depend on
            function = poutine.replay(function, replay)
        # the rows of a plate that holds its data itself
        indices = {} if all_rows.fixed is None else {self.layout.plate: all_rows.subsample(rows)}
        with pyro.validation_enabled(False), poutine.block(hide_types=["sample"]), ExactDraws(), SetSubsample(indices):
            tracer = poutine.trace(function)
            with suppress(StopAfter.Done):
                tracer(*args, **kwargs)
            return tracer.trace


def _given(function: Callable, values: Values, unconstrained: Values) -> Callable:
    if values:
        function = SetValues(dict(values))(function)
    return Constrain(unconstrained)(function) if unconstrained else function
