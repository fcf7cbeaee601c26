r"""The evidence kernel: one compiled graph that draws particles for some rows and returns their log-weights.

`ParticleSampler.log_weight` runs the guide and the model, and sums log-probabilities over event dimensions and inner
plates. One run of it is recorded for each number of rows, and replayed for all other rows. Where code is generated, it
is generated from the graph that `pyro_vae.compiled.rewriting` has rewritten.
"""

from __future__ import annotations

import warnings

from torch import Tensor

from pyro_vae.compiled.policy import EVIDENCE, backend_for
from pyro_vae.compiled.recording import Graph, Untraceable, record
from pyro_vae.compiled.rewriting import rewrite
from pyro_vae.pairs.modes import random_state, set_random_state
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
    if backend is None or sampler.rows.fixed not in (None, sampler.num_points):
        return None  # passes of some rows of a plate that holds its data, each of which would need a graph of its own
    return CompiledLogWeight(sampler, generate_code=backend == "inductor")


class CompiledLogWeight:
    """`sampler.log_weight`, recorded for each number of rows. Only the first of these numbers gets generated code.

    Passes should be of about the same size: a recording draws as many particles as it was made for, and those that a
    smaller pass does not ask for are thrown away.

    Args:
        sampler: of a pair whose rows can be told apart, or of one that takes all rows in one pass.
        generate_code: generate code for the recording, rather than replay it operation by operation.
    """

    def __init__(self, sampler: ParticleSampler, *, generate_code: bool) -> None:
        self.sampler, self.generate_code = sampler, generate_code
        self._graphs: dict[int, tuple[int, Graph]] = {}  # {rows: (particles, graph)}
        self._refused = False

    def __call__(self, num_particles: int, rows: slice) -> Tensor:
        """log w, (K, rows), nats. Does not check whether data are finite and inside their support."""
        if self._refused:
            return self.sampler.log_weight(num_particles, rows, check=False)
        size = rows.stop - rows.start
        args, kwargs = self.sampler.rows.cut(rows)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        recorded, graph = self._graphs.get(size, (0, None))
        if recorded >= num_particles:
            if self.generate_code and size == next(iter(self._graphs)):
                graph.generate_code(*tensors)
            return graph(*tensors)[0][0][:num_particles]

        def log_weight(*tensors: Tensor) -> list[Tensor]:
            left = iter(tensors)
            replaced = [next(left) if isinstance(a, Tensor) else a for a in (*args, *kwargs.values())]
            with self.sampler.rows.using(
                tuple(replaced[: len(args)]), dict(zip(kwargs, replaced[len(args) :], strict=True))
            ):
                return [self.sampler.log_weight(num_particles, rows, check=False)]

        state = random_state()
        try:
            (value,), _, graph = record(log_weight, *tensors)
        except Untraceable as error:
            warnings.warn(
                f"Pyro runs as it is, not compiled: {error}. Try compile=False, which does not warn.", stacklevel=6
            )
            set_random_state(state)
            self._refused = True
            return self.sampler.log_weight(num_particles, rows, check=False)
        if self.generate_code:
            rewrite(graph.module)
        self._graphs[size] = num_particles, graph
        return value
