"""How many particles and rows pass at once, so that memory is bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CHUNK_BYTES", "cells_within_budget"]

CHUNK_BYTES = 24 * 2**20  # of tensors made per pass: what the caches of a CPU hold, more or less


def cells_within_budget(log_weight: Callable[[], Tensor]) -> int:
    """How many particles × rows a pass may have, from the bytes that making a few log-weights takes."""
    with torch.random.fork_rng(), torch.no_grad(), _CountBytes() as counter:
        values = log_weight()
    return CHUNK_BYTES * values.numel() // max(1, counter.total)


class _CountBytes(TorchDispatchMode):
    """Counts the bytes of new storage that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and not any(t is a or _same_storage(t, a) for a in args if isinstance(a, Tensor)):
                self.total += t.untyped_storage().nbytes()
        return out


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
