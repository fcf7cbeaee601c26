"""`Agreed`: the weights and the optimizer's state of the last step at which a compiled run agreed with plain Pyro."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from pyro_vae.training.parameters import Weights

__all__ = ["Agreed"]


class Agreed:
    """Keeps weights and optimizer, to come back to if an audit finds that a recording no longer holds.

    Args:
        weights: of the pair.
        optimizer: of its parameters.

    Attributes:
        count: steps taken when they were kept. None if they were not.
    """

    def __init__(self, weights: Weights, optimizer: torch.optim.Optimizer) -> None:
        self.weights, self.optimizer = weights, optimizer
        self.count: int | None = None
        self._kept: tuple[list[Tensor], dict] = [], {}

    def keep(self, count: int) -> None:
        """Keeps both as they are after so many steps."""
        self.count = count
        self._kept = self.weights.copy(), copy.deepcopy(self.optimizer.state_dict())

    def bring_back(self) -> int:
        """Restores both; returns how many steps had been taken."""
        weights, optimizer = self._kept
        self.weights.restore(weights)
        self.optimizer.load_state_dict(optimizer)
        return self.count
