"""A fit's state, which it writes to a file and reads back: written whole or not at all."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.checkpoint import read, write
from pyro_vae.pairs.modes import random_state, set_random_state
from pyro_vae.training.parameters import Weights
from pyro_vae.training.result import FitResult
from pyro_vae.training.steps import Steps

__all__ = ["FitState"]

SECONDS_BETWEEN = 10.0  # writes, but for the first and the last one
ENTRIES = {"weights", "best", "optimizer_type", "optimizer", "schedule", "steps", "losses", "random"}


class FitState:
    """All that a fit needs to go on, after every epoch.

    Args:
        weights: of the pair.
        steps: whose optimizer and count belong to the state.
        schedule: of the learning rate, if there is one.
        patience: epochs without a lower validation loss, or None; with it the best weights are kept.
        arguments: of the fit, plain values by name, which have to be the same when it goes on.

    Attributes:
        result: what the fit has found so far.
        best: the weights of the best epoch, if they are kept.
    """

    def __init__(
        self, weights: Weights, steps: Steps, schedule: Any, patience: int | None, arguments: dict[str, Any]
    ) -> None:
        self.weights, self.steps, self.schedule, self.patience = weights, steps, schedule, patience
        self.arguments = arguments
        self.result = FitResult()
        self.best: list[Tensor] | None = None
        self._written = -math.inf

    @property
    def stalled(self) -> bool:
        """Whether the last epochs brought no lower validation loss."""
        return self.result.stalled(self.patience)

    def end_epoch(self, loss: float, validation_loss: float | None) -> None:
        """Takes an epoch's losses, keeps its weights if they are the best, and moves the learning rate."""
        lowest = self.result.add_epoch(loss, validation_loss, self.steps.count)
        if lowest and self.patience is not None:
            self.best = self.weights.copy()
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(loss if validation_loss is None else validation_loss)
        elif self.schedule is not None:
            self.schedule.step()

    def keep_best(self) -> None:
        """Brings back the weights of the best epoch, if they were kept."""
        if self.best is not None:
            self.weights.restore(self.best)

    # -- file ---------------------------------------------------------------------------------------------------------

    def resume(self, path: str | Path | None) -> None:
        """Continues from the file, if it exists.

        Raises:
            ValueError: the path is in no folder; the file is of another model, guide or optimizer, of a fit with other
                arguments, or of something else altogether. Weights, losses and random state stay as they are then.
        """
        if path is None:
            return
        path = Path(path)
        if not path.parent.is_dir():
            raise ValueError(
                f"checkpoint: expected a folder, got {path.parent}: {path.parent} is no folder. Try to make it first."
            )
        if path.exists():
            refusal = (
                f"checkpoint: expected a file of fit, got another one: {path} was not written by "
                "fit(checkpoint=…). Try another name, or delete it if it is an incomplete file."
            )
            saved = read(path, refusal)
            if not (isinstance(saved, dict) and saved.keys() >= ENTRIES):
                raise ValueError(refusal)
            self._check(saved, path)
            self._load(saved, path)

    def write(self, path: str | Path | None, *, last: bool = False) -> None:
        """Writes the state after an epoch, at most every ten seconds but for the first and the last."""
        if path is None or (not last and time.monotonic() - self._written < SECONDS_BETWEEN):
            return
        optimizer = self.steps.optimizer
        state = {
            "weights": [t.detach().cpu() for t in self.weights.state()],
            "best": None if self.best is None else [t.cpu() for t in self.best],
            "optimizer_type": type(optimizer).__name__,
            "optimizer": optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "steps": self.steps.count,
            "losses": vars(self.result),
            "arguments": self.arguments,
            "random": random_state(),
        }
        write(state, path)
        self._written = time.monotonic()

    def _check(self, saved: dict[str, Any], path: Path) -> None:
        optimizer = type(self.steps.optimizer).__name__
        shapes = [[tuple(t.shape) for t in tensors] for tensors in (self.weights.state(), saved["weights"])]
        if shapes[0] != shapes[1] or optimizer != saved["optimizer_type"]:
            raise ValueError(
                f"checkpoint: {path} is of another model, guide or optimizer: expected {len(shapes[0])} tensors "
                f"{shapes[0][:4]}… and {optimizer}, got {len(shapes[1])} tensors {shapes[1][:4]}… "
                f"and {saved['optimizer_type']}. Try another file, or delete this one."
            )
        was, now = saved.get("arguments", {}), self.arguments
        differ = [name for name in now if name in was and was[name] != now[name]]
        if differ:
            written, given = (", ".join(f"{name}={values[name]!r}" for name in differ) for values in (was, now))
            raise ValueError(
                f"checkpoint: {path} was written with {written}; this call has {given}. Try the same arguments, "
                "or another file."
            )

    def _load(self, saved: dict[str, Any], path: Path) -> None:
        try:
            self.steps.optimizer.load_state_dict(saved["optimizer"])
            if self.schedule is not None:
                self.schedule.load_state_dict(saved["schedule"])
        except Exception as error:  # whatever an optimizer or scheduler makes of another one's state
            raise ValueError(
                f"checkpoint: the optimizer or scheduler of this call does not take the state in {path}: {error} "
                "Try the optimizer and scheduler that it was written with, or another file."
            ) from error
        self.weights.restore(saved["weights"])
        self.steps.go_on(saved["steps"])
        vars(self.result).update(saved["losses"])
        if self.patience is not None:
            if saved["best"] is None:
                self.result.best_epoch = None  # its weights were not kept: the best is looked for anew
            else:
                self.best = [s.to(t.device) for s, t in zip(saved["best"], self.weights.state(), strict=True)]
        cpu, cuda = saved["random"]
        set_random_state((cpu, cuda[: torch.cuda.device_count()]))
