r"""The gradient of a batch whose rows are shared out among ranks.

With g_r the gradient of the loss per data point on the n_r rows of rank r, that of the joint batch is

    g = Σ_r n_r g_r / Σ_r n_r,

where a plate scales up its rows to all data too: the mean over rows is scaled alike in each rank, and what is outside
of the plate counts once in each g_r. So is the loss. All ranks get the same bits.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceTailAdaptive_ELBO
from torch import Tensor

from pyro_vae.compiled.audit import Diverged
from pyro_vae.objectives import BetaELBO, CombinedELBO, ForwardKL, ImportanceWeightedELBO
from pyro_vae.objectives.protocol import Wrapper
from pyro_vae.ranks import Ranks

__all__ = ["JointGradient", "check_sum_over_rows"]

BUCKET_BYTES = 25 * 2**20  # of gradients that travel in one piece: the first is under way while others are packed


SUMS = (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, BetaELBO, ForwardKL, ImportanceWeightedELBO)


def check_sum_over_rows(elbo: ELBO) -> None:
    """Raises ValueError unless an objective is a sum over data points, of which each rank can take a part."""
    for part in [elbo.elbo] if isinstance(elbo, Wrapper) else getattr(elbo, "elbos", []):
        check_sum_over_rows(part)
    if isinstance(elbo, (Wrapper, CombinedELBO)):
        return
    capacity = isinstance(elbo, BetaELBO) and elbo.capacity is not None
    if not isinstance(elbo, SUMS) or isinstance(elbo, TraceTailAdaptive_ELBO) or capacity:
        what = "BetaELBO with a capacity" if capacity else type(elbo).__name__
        raise ValueError(
            f"loss: expected a sum over data points in several ranks, each of which has rows of a batch, got {what}. "
            "Try Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO or ImportanceWeightedELBO; or one process."
        )


class JointGradient:
    """Puts the gradient of the joint batch in the place of the shares' gradients.

    Args:
        ranks: all of them call it for each batch.
        parameters: the same in all ranks.

    Attributes:
        interrupted: whether somebody has pressed Ctrl-C.
        share: what is finite if loss and gradient of this rank's last share are; None if it had no rows.
    """

    def __init__(self, ranks: Ranks, parameters: list[Tensor]) -> None:
        self.ranks = ranks
        self.share: Tensor | None = None
        self.interrupted = False
        self.buckets = _buckets(parameters)
        self.parameters = [p for bucket in self.buckets for p in bucket]
        self._memory: dict[int, Tensor] = {}  # of the buckets

    def __call__(self, own: Callable[[], tuple[Tensor, Tensor]], rows: int) -> tuple[Tensor, Tensor, int]:
        """Joins the gradients of all ranks, as `.grad` of the parameters.

        Args:
            own: takes the gradient of the share, and returns loss per data point and norm.
            rows: of the share; of none, nothing is taken.

        Returns:
            Loss per data point, norm and rows of the joint batch.

        Raises:
            Diverged: in all ranks, if in one of them.
        """
        value = norm = None
        failed: Exception | None = None
        if rows:
            try:
                value, norm = own()
            except Exception as error:  # whatever it is, the others would wait for this rank
                error.add_note(f"This was rank {self.ranks.rank}, whose share of the batch has {rows} rows.")
                failed = error
        self.share = None if value is None else value + norm
        diverged = isinstance(failed, Diverged)
        joint, norm, total, flags = self._join(value, rows, diverged, failed is not None)
        any_diverged, any_failed, interrupted = flags
        if any_failed > any_diverged:
            if failed is None or diverged:
                raise RuntimeError(f"rank {self.ranks.rank}: another rank has raised an error, which says more.")
            raise failed
        if any_diverged:
            raise failed or Diverged("a recording of another rank gave another loss than plain Pyro")
        if interrupted:
            raise KeyboardInterrupt
        return joint, norm, total

    @contextmanager
    def interrupted_together(self) -> Iterator[None]:
        """Ctrl-C ends the step that all ranks are in, in all of them: one that left alone would be waited for."""
        if not self.ranks.several or threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(*_: Any) -> None:
            self.interrupted = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _join(
        self, loss: Tensor | None, rows: int, diverged: bool, failed: bool
    ) -> tuple[Tensor, Tensor, int, tuple[float, float, float]]:
        """Loss, norm and rows of the joint batch; how many ranks diverged, failed and were interrupted. If any failed,
        no gradient is changed."""
        device = self.parameters[0].device
        present = [float(p.grad is not None and rows > 0) for p in self.parameters]
        flags = [diverged, failed, self.interrupted]
        numbers = torch.tensor([rows, *flags, 0.0, *present], dtype=torch.float64, device=device)
        if loss is not None and not failed:
            numbers[4] = rows * loss.double()
        packed = [self._packed(i, 0 if failed else rows) for i in range(len(self.buckets))]
        self.ranks.sum([numbers, *packed])
        total, *flags, joint = numbers[:5].tolist()
        counts = numbers[5:].tolist()
        value = torch.tensor(joint / total if total else 0.0, dtype=torch.float64, device=device)
        norm = torch.zeros((), dtype=torch.float64, device=device)
        if not flags[1]:
            used = dict(zip(map(id, self.parameters), counts, strict=True))
            for bucket, flat in zip(self.buckets, packed, strict=True):
                norm = torch.hypot(norm, torch.linalg.vector_norm(flat.div_(total)).to(norm))
                parts = flat.split([p.numel() for p in bucket])
                for p, part in zip(bucket, parts, strict=True):  # what no rank's loss reaches has none
                    p.grad = part.view_as(p) if used[id(p)] else None
        return value, norm, int(total), (flags[0], flags[1], flags[2])

    def _packed(self, number: int, rows: int) -> Tensor:
        """The gradients of a bucket times the rows they are of, in one piece, which is the same memory in each step."""
        bucket = self.buckets[number]
        parts = [torch.zeros_like(p) if p.grad is None or not rows else p.grad for p in bucket]
        flat = [part.detach().reshape(-1) for part in parts]
        if number not in self._memory:
            self._memory[number] = flat[0].new_empty(sum(map(len, flat)))
        return torch.cat(flat, out=self._memory[number]).mul_(rows)


def _buckets(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Parameters of one dtype and device together, up to so many bytes."""
    buckets: list[list[Tensor]] = []
    open_: dict[tuple, tuple[list[Tensor], int]] = {}
    for p in parameters:
        kind = (p.dtype, p.device)
        bucket, size = open_.get(kind, ([], BUCKET_BYTES))
        if size + p.nbytes > BUCKET_BYTES:
            bucket, size = [], 0
            buckets.append(bucket)
        bucket.append(p)
        open_[kind] = bucket, size + p.nbytes
    return buckets
