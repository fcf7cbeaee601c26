"""When compiling pays, judged by how many runs are to come.

Recording a graph costs about as much as a few runs, and generating code for it takes seconds. The choice follows from
the number of runs and never from a measured time, so that the same call with the same seed gives the same numbers.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pyro_vae.arguments import check_choice

__all__ = ["EVIDENCE", "TRAINING", "Backend", "Thresholds", "backend_for", "check_compile"]

Backend = Literal["eager", "inductor"]


class Thresholds(NamedTuple):
    """From how many runs on something pays.

    Attributes:
        record: the operations of a run are recorded and replayed.
        generate: code is generated for them.
    """

    record: int
    generate: int


TRAINING = Thresholds(record=300, generate=3000)  # steps of an optimizer
EVIDENCE = Thresholds(record=30, generate=1000)  # passes over chunks of particles and rows


def backend_for(compile: bool | str, num_runs: int, thresholds: Thresholds) -> Backend | None:
    """Chooses how runs are executed.

    Args:
        compile: True generates code, False never compiles, "auto" decides by the number of runs.
        num_runs: how many runs are to come.
        thresholds: of the kind of run.

    Returns:
        "inductor" for generated code, "eager" for a replay operation by operation, None for Pyro as it is.

    Raises:
        ValueError: `compile` is something else.

    Example:
        >>> [backend_for("auto", num_steps, TRAINING) for num_steps in (299, 300, 3000)]
        [None, 'eager', 'inductor']
        >>> backend_for(True, 1, TRAINING)
        'inductor'
    """
    check_compile(compile)
    if compile == "auto":
        if num_runs < thresholds.record:
            return None
        return "eager" if num_runs < thresholds.generate else "inductor"
    return "inductor" if compile else None


def check_compile(compile: bool | str) -> None:
    """Raises a `ValueError` unless the argument is True, False or "auto"."""
    check_choice("compile", compile, (True, False, "auto"))
