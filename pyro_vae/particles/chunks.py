"""How many particles and rows pass at once, so that memory is bounded."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CHUNK_BYTES", "check_num_particles"]

CHUNK_BYTES = 24 * 2**20  # of tensors made per pass: what the caches of a CPU hold, more or less


def check_num_particles(num_particles: int, name: str = "num_particles") -> int:
    if not num_particles >= 1:
        raise ValueError(f"{name}: expected at least 1, got {num_particles}.")
    if num_particles != int(num_particles):
        raise ValueError(f"{name}: expected a whole number, got {num_particles}.")
    return int(num_particles)


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
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
