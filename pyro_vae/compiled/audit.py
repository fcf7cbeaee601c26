"""Audits: a recording is held against a run of plain Pyro now and then, on the same random numbers.

What a recorded run has read is watched (`watch.py`), but nobody can watch everything: files, clocks, the state of other
libraries. So at the 2nd, 4th, 8th, … replay, and from then on at about one of 200, plain Pyro computes the loss and its
gradients too. A difference ends the use of the recording; all that was computed since the last audit that agreed
is in doubt.

An audit costs as much as a few replays. Later ones are spread so that they take about half a percent of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from pyro_vae.compiled.recording import Graph
from pyro_vae.compiled.untraceable import summary
from pyro_vae.pairs.modes import fork_random_state
from pyro_vae.pairs.untouched import copy_of, restore_tensor

__all__ = ["Audit", "Diverged"]

EVERY, AT_LEAST_EVERY = 200, 1000  # replays between audits; more than the first of these where audits are dear
SHARE = 0.005  # of the time that audits may take
REPLAYED, FUSED = 1e-5, 1e-4  # relative differences of losses by rounding: operation by operation, in fused code


Plain = Callable[[tuple, dict[str, Any]], tuple[Tensor, list[Tensor | None]]]


class Diverged(RuntimeError):
    """A replay gave another loss or gradient than plain Pyro, or failed."""


class Audit:
    """Holds a recording against plain Pyro.

    Args:
        graph: of the recording. Its results are the loss and the norm of the gradients, its last input their factor.
        plain: (args, kwargs) -> the loss and the gradients of the graph's leaves by plain Pyro. `.grad` stays as it is.
        end: called with the reason when they differ.

    Attributes:
        replays: how often the recording was replayed.
        agreed: at which replay an audit last agreed; 0 stands for the recorded run itself.
    """

    def __init__(self, graph: Graph, plain: Plain, end: Callable[[str], None]) -> None:
        self.graph, self.plain, self.end = graph, plain, end
        self.replays = self.agreed = 0
        self._next, self._since = 2.0, time.perf_counter()
        self._moved: list[int] | None = None  # which of the graph's tensors and inputs a run changes, once it is known
        self._rounded = 0  # audits in a row in which only fused code differed

    def replay(
        self, run: Callable[[], Any], args: tuple, kwargs: dict[str, Any], inputs: list[Tensor], *, fused: bool
    ) -> Any:
        """Returns what `run` does, of which loss and norm come first; and audits it if it is its turn.

        Args:
            run: replays the recording.
            args: of the call.
            kwargs: of the call.
            inputs: of the graph.
            fused: whether generated code replays it, so that other roundings are no difference.

        Raises:
            Diverged: loss or gradients differ, and not by rounding; or the replay failed.
        """
        self.replays += 1
        if self.replays < self._next:
            return self._try(run)
        start = time.perf_counter()
        with fork_random_state():
            expected = self._undone(lambda: self.plain(args, kwargs), inputs)
        if fused:  # the recording is audited operation by operation, and its fused code by its loss
            with fork_random_state():
                replayed = self._undone(lambda: self._try(lambda: self.graph.by_operation(*inputs)), inputs)
            self._compare(expected, replayed[0][0], replayed[1], inputs[-1])
        seconds = time.perf_counter() - start
        found = self._try(run)
        if not fused:
            by_leaf = [gradient for _, gradient in found.gradients]
            self._compare(expected, found[0], by_leaf, inputs[-1])
        else:  # a sum that cancels or a draw at its threshold may differ, but not always
            close = _close(expected[0], found[0], FUSED)
            self._rounded = 0 if close else self._rounded + 1
            if self._rounded == 3:
                self._diverge(expected[0], found[0], "the loss of generated code")
        self._plan_next(seconds)
        return found

    def _try(self, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception as error:
            reason = f"a replay failed ({summary(error)})"
            self.end(reason)
            raise Diverged(f"{reason}; from now on plain Pyro runs") from error

    def _compare(
        self, expected: tuple[Tensor, list[Tensor | None]], loss: Tensor, gradients: list[Tensor], weight: Tensor
    ) -> None:
        if not _close(expected[0], loss, REPLAYED):
            self._diverge(expected[0], loss, "loss")
        wanted = [torch.zeros_like(g) if w is None else w for w, g in zip(expected[1], gradients, strict=True)]
        total = torch.nn.utils.get_total_norm(wanted) if wanted else torch.zeros(())
        for want, gradient in zip(wanted, gradients, strict=True):
            got = gradient / weight
            difference, size = torch.linalg.vector_norm(got - want), torch.linalg.vector_norm(want)
            if torch.isfinite(total) and not difference <= 1e-3 * size + 1e-6 * total + 1e-6:
                self._diverge(size, torch.linalg.vector_norm(got), "a gradient of norm")

    def _diverge(self, expected: Tensor, found: Tensor, what: str) -> None:
        self.end("an audit found another loss or gradient than plain Pyro's")
        raise Diverged(
            f"an audit found that replay {self.replays} of a recording gives {what} {float(found):.6g}, and plain Pyro "
            f"{float(expected):.6g} on the same random numbers: something that the model or guide reads has changed, "
            "and it is none of the things that are watched. Try to pass it as an argument, or as a tensor that is "
            f"filled in place. The last audit that agreed was at replay {self.agreed}; from now on plain Pyro runs"
        )

    def _undone(self, run: Callable[[], Any], inputs: list[Tensor]) -> Any:
        """What a run returns; the tensors that it changes, such as the statistics of a BatchNorm, are put back."""
        tensors = [*self.graph.tensors, *inputs]
        looked_at = range(len(tensors)) if self._moved is None else self._moved
        before = {i: copy_of(tensors[i]) for i in looked_at}
        found = run()
        moved = [i for i, value in before.items() if restore_tensor(tensors[i], value)]
        self._moved = moved if self._moved is None else self._moved
        return found

    def _plan_next(self, seconds: float) -> None:
        """`seconds` are those of this audit."""
        now = time.perf_counter()
        replay = (now - seconds - self._since) / (self.replays - self.agreed)
        spread = seconds / SHARE / replay if replay > 0 else inf
        later = self.replays if self.replays < EVERY else min(max(EVERY, spread), AT_LEAST_EVERY)
        self.agreed, self._since, self._next = self.replays, now, self.replays + later


def _close(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Whether two numbers are the same to a relative tolerance, or both not finite in the same way."""
    a, b = float(first), float(second)
    if not (isfinite(a) and isfinite(b)):
        return a == b or (a != a and b != b)
    return abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))
