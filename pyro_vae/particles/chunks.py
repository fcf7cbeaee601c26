"""How many particles and rows pass at once, so that memory is bounded."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CHUNK_BYTES"]

CHUNK_BYTES = 24 * 2**20  # of tensors made per pass: what the caches of a CPU hold, more or less


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
