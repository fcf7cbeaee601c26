"""What an objective may offer beyond `pyro.infer.ELBO`: one small protocol for each."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from pyro.infer import ELBO
from torch import Tensor

__all__ = ["Annealed", "Differentiable", "Wrapper", "annealed", "has_differentiable_loss"]


@runtime_checkable
class Annealed(Protocol):
    """An objective that follows the steps of training, as a warm-up of the KL term does."""

    def set_step(self, step: int) -> None:
        """Sets the objective to that of a step, which is 0 for the first one."""

    def not_a_bound(self) -> str | None:
        """Why the objective of the last step is no bound of log p(x). None if it is one."""


@runtime_checkable
class Differentiable(Protocol):
    """An objective with a loss that can be differentiated, as most of Pyro's have."""

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, nats, summed over the data."""


@runtime_checkable
class Wrapper(Protocol):
    """An objective that adds something to another one. It is annealed or differentiable if that one is."""

    elbo: ELBO


def annealed(elbo: Any) -> Annealed | None:
    """The annealed part of an objective: the objective itself, or the one that it wraps. None if there is none."""
    if isinstance(elbo, Wrapper):
        return annealed(elbo.elbo)
    return elbo if isinstance(elbo, Annealed) else None


def has_differentiable_loss(elbo: Any) -> bool:
    """Whether an objective's loss can be differentiated. If not, `loss_and_grads` does its own backward pass."""
    return isinstance(elbo, Differentiable) and (not isinstance(elbo, Wrapper) or has_differentiable_loss(elbo.elbo))
