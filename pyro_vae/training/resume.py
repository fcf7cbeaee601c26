"""A fit on disk: everything that is needed to go on, written whole or not at all."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.checkpoint import read, write
from pyro_vae.pairs.modes import random_state, set_random_state
from pyro_vae.training.parameters import Pair
from pyro_vae.training.steps import Steps

__all__ = ["Resumable"]

SECONDS_BETWEEN = 10.0  # writes, but for the first and the last one
ENTRIES = {"weights", "best", "optimizer_type", "optimizer", "schedule", "steps", "losses", "random"}


class Resumable:
    """The state of a fit, which goes to a file and comes back.

    Args:
        path: of the file; None: nothing is written or read.
        pair: whose parameters and buffers are kept.
        steps: whose count is kept.
        optimizer: kept.
        schedule: of the learning rate; kept, if there is one.
        losses: what the fit has found so far, of plain numbers and lists.
        arguments: of the fit, plain values by name, which have to be the same when it goes on.

    Attributes:
        best: the weights of the best epoch, if the fit keeps them.
    """

    def __init__(
        self,
        path: str | Path | None,
        pair: Pair,
        steps: Steps,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        losses: dict[str, Any],
        arguments: dict[str, Any],
    ) -> None:
        self.path = None if path is None else Path(path)
        self.pair, self.steps, self.optimizer, self.schedule, self.losses = pair, steps, optimizer, schedule, losses
        self.arguments = arguments
        self.best: list[Tensor] | None = None
        self._written = -math.inf
        if self.path is not None and not self.path.parent.is_dir():
            raise ValueError(f"checkpoint: {self.path.parent} is no folder. Try to make it first.")

    def resume(self) -> None:
        """Takes up what the file has, if there is one.

        Raises:
            ValueError: the file is of another model, guide or optimizer, of a fit with other arguments, or of something
                else altogether; weights, losses and random state stay as they are then.
        """
        if self.path is None or not self.path.exists():
            return
        refusal = (
            f"checkpoint: {self.path} was not written by fit(checkpoint=…). Try another name, or delete it if it is an "
            "incomplete file."
        )
        saved = read(self.path, refusal)
        if not (isinstance(saved, dict) and saved.keys() >= ENTRIES):
            raise ValueError(refusal)
        state = self.pair.state()
        shapes = [[tuple(t.shape) for t in tensors] for tensors in (state, saved["weights"])]
        if shapes[0] != shapes[1] or type(self.optimizer).__name__ != saved["optimizer_type"]:
            raise ValueError(
                f"checkpoint: {self.path} is of another model, guide or optimizer: expected {len(shapes[0])} tensors "
                f"{shapes[0][:4]}… and {type(self.optimizer).__name__}, got {len(shapes[1])} tensors {shapes[1][:4]}… "
                f"and {saved['optimizer_type']}. Try another file, or delete this one."
            )
        was, now = saved.get("arguments", {}), self.arguments
        differ = [name for name in now if name in was and was[name] != now[name]]
        if differ:
            written, given = (", ".join(f"{name}={values[name]!r}" for name in differ) for values in (was, now))
            raise ValueError(
                f"checkpoint: {self.path} was written with {written}; this call has {given}. Try the same arguments, "
                "or another file."
            )
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.schedule is not None:
                self.schedule.load_state_dict(saved["schedule"])
        except Exception as error:  # whatever an optimizer or scheduler makes of another one's state
            raise ValueError(
                f"checkpoint: the optimizer or scheduler of this call does not take the state in {self.path}: {error} "
                "Try the optimizer and scheduler that it was written with, or another file."
            ) from error
        self.pair.restore(saved["weights"])
        self.best = (
            None if saved["best"] is None else [s.to(t.device) for s, t in zip(saved["best"], state, strict=True)]
        )
        self.steps.go_on(saved["steps"])
        self.losses.update(saved["losses"])
        cpu, cuda = saved["random"]
        set_random_state((cpu, cuda[: torch.cuda.device_count()]))

    def write(self, *, last: bool = False) -> None:
        """Writes the state after an epoch, at most every ten seconds but for the first and the last."""
        if self.path is None or (not last and time.monotonic() - self._written < SECONDS_BETWEEN):
            return
        state = {
            "weights": [t.detach().cpu() for t in self.pair.state()],
            "best": None if self.best is None else [t.cpu() for t in self.best],
            "optimizer_type": type(self.optimizer).__name__,
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "steps": self.steps.count,
            "losses": self.losses,
            "arguments": self.arguments,
            "random": random_state(),
        }
        write(state, self.path)
        self._written = time.monotonic()
