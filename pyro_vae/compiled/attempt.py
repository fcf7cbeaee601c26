"""Attempts to record a run of a pair: what comes of it is believed only if the run changed nothing but tensors.

A run that fails to be recorded is undone, as it is going to be repeated: attributes, buffers, counters and random
states are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_vae.compiled.recording import Graph, Untraceable
from pyro_vae.compiled.untraceable import summary
from pyro_vae.compiled.watch import Watch
from pyro_vae.pairs.modes import all_random_states, random_state, set_all_random_states, set_random_state
from pyro_vae.pairs.untouched import Untouched, copy_of, restore_tensor

__all__ = ["Attempt", "attempt", "trial"]

R = TypeVar("R")


class Attempt(NamedTuple, Generic[R]):
    """What came of it.

    Attributes:
        found: what the run returned. None if it was not run, or failed and was undone.
        watch: on all that the run can have read.
        refusal: why there is no recording, and will be none. None if there is, or if the next run may have one: this
            one has made a parameter.
        changed: what the run has changed, so that another one would do something else. None if nothing.
        states: of the random generators before the run.
    """

    found: R | None
    watch: Watch
    refusal: str | None = None
    changed: str | None = None
    states: tuple = ()


def attempt(run: Callable[[], R], model: Callable, guide: Callable, *others: Any) -> Attempt[R]:
    """Records a run of a pair and sees what it changes.

    Args:
        run: records it. May raise `Untraceable`.
        model: the model.
        guide: the guide.
        *others: what else the run may read.
    """
    watch = Watch(model, guide, *others)
    if watch.moving is not None:
        return Attempt(None, watch, f"{watch.moving} gives something else whenever it is read")
    store = pyro.get_param_store()
    known, states = set(store.keys()), all_random_states()
    tensors = [*watch.tensors, *(p for _, p in store.named_parameters())]
    values = list(map(copy_of, tensors))
    watch.tensors = []  # the batch of this call is nothing to keep
    found, refusal = None, None
    with Untouched(model, guide) as untouched:
        try:
            found = run()
        except Untraceable as error:
            refusal = str(error)
        untouched.keep = refusal is None and set(store.keys()) == known
    if not untouched.keep:
        watch.restore()
        for tensor, value in zip(tensors, values, strict=True):
            restore_tensor(tensor, value)
        set_all_random_states(states)
        return Attempt(None, watch, refusal)
    return Attempt(found, watch, None, watch.changed_by_run() or _random_module_used(states), states)


def trial(graph: Graph, inputs: Sequence[Tensor], states: tuple) -> str | None:
    """Replays a recording once on the random numbers of its run; says why it cannot take its place. Changes nothing.

    Args:
        graph: the recording.
        inputs: of the graph.
        states: of the random generators before the run.
    """
    end, tensors = random_state(), [*graph.tensors, *inputs]
    values = list(map(copy_of, tensors))
    try:
        set_random_state(states[0])
        graph.by_operation(*inputs)
        now = random_state()
    except Exception as error:
        return f"a replay of it fails ({summary(error)})"
    finally:
        for tensor, value in zip(tensors, values, strict=True):
            restore_tensor(tensor, value)
        set_random_state(end)
    same = all(map(torch.equal, [now[0], *now[1]], [end[0], *end[1]]))
    return None if same else "it sets the state of torch's random generator"


def _random_module_used(before: tuple) -> str | None:
    """Name of the state of a random module that is another now, and that no graph draws from."""
    _, numpy, python = all_random_states()
    if python != before[2]:
        return "Python's random state"
    same = all(np.array_equal(now, was) for now, was in zip(numpy, before[1], strict=True))
    return None if same else "NumPy's random state"
