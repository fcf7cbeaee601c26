"""What objectives say of themselves beyond `pyro.infer.ELBO`, each as one small protocol."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from pyro.infer import ELBO
from torch import Tensor

__all__ = ["Annealed", "Differentiable", "Wrapper", "annealed", "has_differentiable_loss"]


@runtime_checkable
class Annealed(Protocol):
    """An objective that follows the steps of training, as a warm-up of the KL term does."""

    def set_step(self, step: int) -> None:
        """Makes the objective that of a step, 0 for the first one."""

    def not_a_bound(self) -> str | None:
        """Why the objective of the last step is no bound of log p(x); None where it is one."""


@runtime_checkable
class Differentiable(Protocol):
    """An objective whose loss is a tensor to differentiate, as most of Pyro's are."""

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, nats, summed over the data."""


@runtime_checkable
class Wrapper(Protocol):
    """An objective that is another one's with something added: it is annealed and differentiable where that is."""

    elbo: ELBO


def annealed(elbo: Any) -> Annealed | None:
    """What is annealed in an objective: itself, or what it wraps."""
    if isinstance(elbo, Wrapper):
        return annealed(elbo.elbo)
    return elbo if isinstance(elbo, Annealed) else None


def has_differentiable_loss(elbo: Any) -> bool:
    """Whether an objective's loss can be differentiated; others do their own backward pass in `loss_and_grads`."""
    return isinstance(elbo, Differentiable) and (not isinstance(elbo, Wrapper) or has_differentiable_loss(elbo.elbo))
