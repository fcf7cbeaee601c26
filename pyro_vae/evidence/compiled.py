r"""The evidence kernel: log-weights of new particles for some rows as one compiled graph.

What `ParticleSampler.log_weight` does (guide, model, log-probabilities, their sum over event and inner plates) is
recorded once for a number of particles and of rows, and replayed for all other rows. Generated code starts from the
graph as `pyro_vae.compiled.rewriting` leaves it.
"""

from __future__ import annotations

import warnings

from torch import Tensor

from pyro_vae.compiled.recording import Graph, Untraceable, record
from pyro_vae.compiled.rewriting import rewrite
from pyro_vae.pairs.modes import random_state, set_random_state
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["CompiledLogWeight", "compiled_log_weight"]


def compiled_log_weight(sampler: ParticleSampler, compile: bool | str, passes: int) -> CompiledLogWeight | None:
    """Chooses how log-weights are drawn, by the number of passes and not by their time: a seed repeats its numbers.

    Args:
        sampler: of the pair.
        compile: True, False, or "auto": Pyro as it is for less than 30 passes, its operations recorded for less than
            1000, beyond that through generated code.
        passes: how many are to come.
    """
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile: expected True, False or 'auto', got {compile!r}.")
    if sampler.rows.fixed is not None or not compile or (compile == "auto" and passes < 30):
        return None
    return CompiledLogWeight(sampler, generate_code=compile is True or passes >= 1000)


class CompiledLogWeight:
    """`sampler.log_weight`, recorded for each number of rows; code is generated for the first of these.

    Passes are to be of about the same size: where a few particles less are asked for, the others are thrown away.

    Args:
        sampler: of a pair whose rows can be told apart, or that has all in one pass.
        generate_code: go on with generated code.
    """

    def __init__(self, sampler: ParticleSampler, *, generate_code: bool) -> None:
        self.sampler, self.generate_code = sampler, generate_code
        self._graphs: dict[int, tuple[int, Graph]] = {}  # {rows: (particles, graph)}
        self._refused = False

    def __call__(self, num_particles: int, rows: slice) -> Tensor:
        """log w, (K, rows), nats, without a check for data that are not finite or outside of their support."""
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
            warnings.warn(f"Pyro runs as it is, not compiled: {error}. compile=False says so beforehand.", stacklevel=6)
            set_random_state(state)
            self._refused = True
            return self.sampler.log_weight(num_particles, rows, check=False)
        if self.generate_code:
            rewrite(graph.module)
        self._graphs[size] = num_particles, graph
        return value
