"""The states that a run of a pair must not leave behind: the mode of modules and the random generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["evaluation_mode", "random_state", "set_random_state"]


@contextmanager
def evaluation_mode() -> Iterator[None]:
    """Runs every `nn.Module` called inside in evaluation mode (dropout off, batch norm frozen), and restores each.

    It needs no list of modules: it sees them as they are called, wherever a model or guide keeps them.
    """
    changed: list[nn.Module] = []

    def switch(module: nn.Module, _: Any) -> None:
        if module.training:
            module.training = False
            changed.append(module)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(switch)
    try:
        yield
    finally:
        handle.remove()
        for module in changed:
            module.training = True


def random_state() -> tuple[Tensor, list[Tensor]]:
    """Of torch's generators, on the CPU and on CUDA where that is in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    """Back to what `random_state` returned."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
