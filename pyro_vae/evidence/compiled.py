r"""The evidence kernel: one compiled graph that draws particles for some rows and returns their log-weights.

`ParticleSampler.log_weight` runs the guide and the model, and sums log-probabilities over event dimensions and inner
plates. One run of it is recorded for each number of rows, and replayed for all other rows. Where code is generated, it
is generated from the graph that `pyro_vae.compiled.rewriting` has rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.compiled.attempt import attempt, trial
from pyro_vae.compiled.policy import EVIDENCE, backend_for
from pyro_vae.compiled.recording import Graph, record
from pyro_vae.compiled.rewriting import rewrite
from pyro_vae.compiled.watch import Watch
from pyro_vae.pairs.libraries import warn
from pyro_vae.pairs.modes import fork_random_state, random_state, set_random_state
from pyro_vae.pairs.untouched import Untouched
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["CompiledLogWeight", "compiled_log_weight"]


def compiled_log_weight(sampler: ParticleSampler, compile: bool | str, passes: int) -> CompiledLogWeight | None:
    """Chooses how log-weights are drawn. None stands for Pyro as it is.

    Args:
        sampler: of the pair.
        compile: True, False or "auto", as in `pyro_vae.compiled.policy.backend_for`.
        passes: how many are to come.
    """
    backend = backend_for(compile, passes, EVIDENCE)
    if backend is None or sampler.serial or sampler.rows.fixed not in (None, sampler.num_points):
        return None  # passes of some rows of a plate that holds its data, each of which would need a graph of its own
    return CompiledLogWeight(sampler, generate_code=backend == "inductor")


class CompiledLogWeight:
    """`sampler.log_weight`, recorded for each number of rows. Only the first of these numbers gets generated code.

    Passes should be of about the same size: a recording draws as many particles as it was made for, and those that a
    smaller pass does not ask for are thrown away. The first replay of each recording, the tenth, the hundredth and so
    on are held against plain Pyro on the same random numbers.

    Args:
        sampler: of a pair whose rows can be told apart, or of one that takes all rows in one pass.
        generate_code: generate code for the recording, rather than replay it operation by operation.
    """

    def __init__(self, sampler: ParticleSampler, *, generate_code: bool) -> None:
        self.sampler, self.generate_code = sampler, generate_code
        self._passes: dict[int, _Pass] = {}  # {rows: recording}
        self._refused = False
        self._attempts = 0

    def __call__(self, num_particles: int, rows: slice) -> Tensor:
        """log w, (K, rows), nats. Does not check whether data are finite and inside their support.

        Raises:
            ValueError: a later replay than the first differs from plain Pyro.
        """
        if self._refused:
            return self._plain(num_particles, rows)
        size = rows.stop - rows.start
        known = self._passes.get(size)
        if known is None or known.num_particles < num_particles or not known.holds():
            return self._record(num_particles, rows)
        args, kwargs = self.sampler.rows.cut(rows)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if self.generate_code and size == next(iter(self._passes)):
            known.graph.generate_code(*tensors)
        known.replays += 1
        expected = None
        if known.replays in (1, 10, 100) or known.replays % 1000 == 0:
            with fork_random_state(), Untouched(self.sampler.model, self.sampler.guide):
                expected = self._plain(known.num_particles, rows)
        state = random_state()
        value = known.graph(*tensors)[0][0]
        if expected is not None and not _agree(value, expected, known.graph.generated):
            what = "it gives other log-weights than plain Pyro on the same random numbers"
            if known.replays > 1:
                raise ValueError(
                    f"compile: after {known.replays} passes of {size} rows {what}: something that the model or guide "
                    "reads has changed since the last of them was looked at. Try compile=False."
                )
            set_random_state(state)
            self._refuse(what)
            return self._plain(num_particles, rows)
        return value[:num_particles]

    def _plain(self, num_particles: int, rows: slice) -> Tensor:
        return self.sampler.log_weight(num_particles, rows, check=False)

    def _record(self, num_particles: int, rows: slice) -> Tensor:
        """Records a pass and returns its log-weights; runs Pyro as it is where there is nothing to record."""
        args, kwargs = self.sampler.rows.cut(rows)

        def log_weight(*tensors: Tensor) -> list[Tensor]:
            left = iter(tensors)
            replaced = [next(left) if isinstance(a, Tensor) else a for a in (*args, *kwargs.values())]
            with self.sampler.rows.using(
                tuple(replaced[: len(args)]), dict(zip(kwargs, replaced[len(args) :], strict=True))
            ):
                return [self._plain(num_particles, rows)]

        arguments = (*args, *kwargs.values())
        found, watch, refusal, changed, states = attempt(
            lambda: record(log_weight, *(a for a in arguments if isinstance(a, Tensor))),
            *(self.sampler.model, self.sampler.guide, *arguments),
        )
        if found is None:
            self._refuse(refusal or "it makes a parameter")
            return self._plain(num_particles, rows)
        (value,), _, graph = found
        self._attempts += 1
        failure = trial(graph, [a for a in arguments if isinstance(a, Tensor)], states)
        if failure is not None:
            self._refuse(failure)
        elif changed is None:
            if self.generate_code:
                rewrite(graph.module)
            self._passes[rows.stop - rows.start] = _Pass(num_particles, graph, watch)
        elif self._attempts > 1:  # once may be a set-up
            self._refuse(f"{changed} is changed by the model or guide in each run")
        return value

    def _refuse(self, reason: str) -> None:
        self._refused = True
        warn(f"Pyro runs as it is, not compiled: {reason}. Try compile=False, which does not warn.")


@dataclass
class _Pass:
    """A recording for a number of rows, and how often it was replayed."""

    num_particles: int
    graph: Graph
    watch: Watch
    replays: int = 0

    def holds(self) -> bool:
        """Whether a replay would do what a run would do now."""
        return self.graph.reads_the_same() and self.watch.changed() is None


def _agree(replayed: Tensor, expected: Tensor, fused: bool) -> bool:
    """Whether log-weights are the same to rounding. In fused code a discrete draw at its threshold may be another."""
    close = torch.isclose(
        replayed, expected, rtol=1e-3 if fused else 1e-5, atol=1e-3 if fused else 1e-5, equal_nan=True
    )
    return bool(close.double().mean() > 0.999) if fused else bool(close.all())
