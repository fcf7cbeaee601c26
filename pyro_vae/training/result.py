"""`FitResult`: what a fit did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["FitResult"]


@dataclass
class FitResult:
    """What a fit did; losses are −ELBO (or another loss), in nats per data point, one for each epoch.

    Attributes:
        loss: mean over the epoch's batches, weighted by their rows, while the weights moved.
        validation_loss: after the epoch, in evaluation mode, with the same random numbers each time; NaN for epochs of
            a checkpoint that had no validation data yet.
        num_steps: optimizer steps taken.
        best_epoch: index of the lowest validation loss, whose weights were kept if `patience` was given (where it was
            added to a checkpoint, the lowest since then).
        interrupted: whether Ctrl-C ended it: the weights have the steps of an epoch that is not in the losses.
    """

    loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    num_steps: int = 0
    best_epoch: int | None = None
    interrupted: bool = False

    def __repr__(self) -> str:
        parts = [f"{len(self.loss)} epochs", f"{self.num_steps} steps"]
        if self.loss:
            parts.append(f"last loss {self.loss[-1]:.3f}")
        if self.best_epoch is not None:
            parts.append(f"best validation loss {self.validation_loss[self.best_epoch]:.3f} at [{self.best_epoch}]")
        if self.interrupted:
            parts.append("interrupted")
        return f"FitResult({', '.join(parts)})"

    def add_epoch(self, loss: float, validation_loss: float | None, num_steps: int) -> bool:
        """Takes an epoch's losses; returns whether its validation loss is the lowest so far."""
        self.loss.append(loss)
        self.num_steps = num_steps
        if validation_loss is None:
            return False
        self.validation_loss += [math.nan] * (len(self.loss) - 1 - len(self.validation_loss))
        self.validation_loss.append(validation_loss)
        lowest = self.best_epoch is None or validation_loss < self.validation_loss[self.best_epoch]
        if lowest:
            self.best_epoch = len(self.loss) - 1
        return lowest

    def stalled(self, patience: int | None) -> bool:
        """Whether the last `patience` epochs brought no lower validation loss."""
        return patience is not None and self.best_epoch is not None and len(self.loss) > self.best_epoch + patience
