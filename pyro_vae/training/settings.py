"""What a call of `fit` was told, as plain values by name: what a checkpoint compares when the run goes on."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_vae.training.data import Batches

__all__ = ["known_by", "settings_of"]

USUAL = list(vars(Trace_ELBO()).items())
# of a group of parameters: what is compared by itself, and what makes no difference but for rounding
OWN = {"params", "lr", "initial_lr", "fused", "foreach", "capturable", "differentiable"}
STEPS = (0, 1, 10, 100, 1000, 10000, 100000)  # at which schedules are compared


def settings_of(
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    loss: ELBO,
    **others: Any,
) -> dict[str, Any]:
    """The settings of a fit, as far as they are numbers and names: code cannot be compared.

    Args:
        batches: of the data.
        optimizer: before the first step; all else of it is a part of its state.
        schedule: of the learning rate, or None.
        loss: the objective, before the first step.
        **others: plain values.
    """
    return {
        "rows": batches.num_rows,
        "batch_size": batches.batch_size if batches.loader is None else batches.given.batch_size,
        "learning_rate": _rates_of(optimizer),
        "optimizer": _named(optimizer, [{k: v for k, v in g.items() if k not in OWN} for g in optimizer.param_groups]),
        "scheduler": None if schedule is None else _named(schedule, schedule.state_dict()),
        "loss": _described(loss),
        "data": known_by(batches),
        **others,
    }


def known_by(batches: Batches) -> str:
    """What tells data apart: a digest of some rows. Of a DataLoader, whose rows may be drawn anew, what draws them."""
    if batches.loader is None:
        return sha256(repr(batches.fingerprint()).encode()).hexdigest()[:16]
    return f"{type(batches.given.dataset).__name__} by {type(batches.given.sampler).__name__}"


def _rates_of(optimizer: torch.optim.Optimizer) -> Any:
    """The learning rate of an optimizer, or a list of those of its groups of parameters."""
    rates = [group.get("initial_lr", group.get("lr")) for group in optimizer.param_groups]  # a warm-up starts lower
    rates = [None if rate is None else float(rate) for rate in rates]
    return rates[0] if len(rates) == 1 else rates


def _named(thing: Any, settings: Any) -> str:
    """A thing of torch's, before it has done anything, and its settings."""
    return f"{type(thing).__name__}({_described(settings)})"


def _described(value: Any, schedule: bool = False) -> str | None:
    """An objective, or something that it keeps: its names and numbers. None of what has none."""
    if isinstance(value, (bool, int, float, str)):
        return str(value)
    if isinstance(value, ELBO):
        own = {k: v for k, v in vars(value).items() if not k.startswith("_") and (k, v) not in USUAL}
        parts = {k: _described(v, k == "schedules") for k, v in sorted(own.items())}
        return f"{type(value).__name__}({', '.join(f'{k}={v}' for k, v in parts.items() if v is not None)})"
    if isinstance(value, dict):
        parts = {k: _described(v, schedule) for k, v in value.items()}
        return "{" + ", ".join(f"{k}: {v}" for k, v in parts.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(str(_described(v, schedule)) for v in value)}]"
    if isinstance(value, Tensor) and value.numel() == 1:
        return repr(value.item())
    if schedule and callable(value):
        return repr([float(value(step)) for step in STEPS])
    return None
