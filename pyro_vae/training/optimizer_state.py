"""Whether a saved state is one that an optimizer can go on from: found out before the optimizer has seen it.

Optimizers take any state, and some then read past the end of a tensor. What a state has to look like is learned from a
copy of the optimizer that takes a step on gradients of zero.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from pyro_vae.checkpoint.plain import differences
from pyro_vae.pairs.modes import fork_random_state

__all__ = ["after_a_step", "what_does_not_fit"]


def after_a_step(optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """The `state_dict` that an optimizer has once it has taken a step. It takes none. None if no copy of it can."""
    memo: dict[int, Any] = {}
    with suppress(Exception), fork_random_state():
        twin = copy.deepcopy(optimizer, memo)
        for name, value in vars(optimizer).items():  # of subclasses; a scheduler puts a `step` of its own there
            if name not in vars(twin) and name != "step":
                setattr(twin, name, copy.deepcopy(value, memo))
        for group in twin.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        twin.step()
        return twin.state_dict()
    return None


def what_does_not_fit(optimizer: torch.optim.Optimizer, saved: Any) -> Iterator[str]:
    """Says what keeps the optimizer from taking a state, place by place."""
    now = optimizer.state_dict()
    if not isinstance(saved, dict) or now.keys() != saved.keys() or not isinstance(saved["state"], dict):
        yield "optimizer: expected the state of an optimizer, got another"
        return
    loose = not type(optimizer).__module__.startswith("torch.")  # whose further values may come later
    yield from differences(now["param_groups"], saved["param_groups"], "optimizer/param_groups", loose=loose)
    for i, (group, other) in enumerate(zip(now["param_groups"], saved["param_groups"], strict=False)):
        for name, value in group.items():
            chosen = name == "params" or (isinstance(value, (bool, str)) and not loose)
            if chosen and name in other and other[name] != value:
                yield f"optimizer/param_groups/{i}/{name}: expected {value}, got {other[name]}"
    after = after_a_step(optimizer)
    for key, state in saved["state"].items():
        where = f"optimizer/state/{key}"
        if after is not None:
            yield from differences(after["state"].get(key), state, where, loose=loose)
        counts = (
            {n: t for n, t in state.items() if isinstance(t, Tensor) and not t.dim()} if isinstance(state, dict) else {}
        )
        yield from (
            f"{where}/{n}: expected a finite number, got {t}" for n, t in counts.items() if not torch.isfinite(t)
        )
