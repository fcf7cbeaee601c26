"""Audits: a recording is held against a run of plain Pyro now and then, on the same random numbers.

What a recorded run has read is watched (`watch.py`), but nobody can watch everything: files, clocks, the state of other
libraries. So at the 2nd, 4th, 8th, … replay, and from then on at about one of 200, plain Pyro computes the loss and its
gradients' norm too. A difference ends the use of the recording; all that was computed since the last audit that agreed
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
from pyro_vae.pairs.modes import fork_random_state

__all__ = ["Audit", "Diverged"]

EVERY, AT_LEAST_EVERY = 200, 1000  # replays between audits; more than the first of these where audits are dear
SHARE = 0.005  # of the time that audits may take
REPLAYED, FUSED = 1e-5, 1e-4  # relative differences of losses by rounding: operation by operation, in fused code


Plain = Callable[[tuple, dict[str, Any]], tuple[Tensor, Tensor]]


class Diverged(RuntimeError):
    """A replay gave another loss than plain Pyro."""


class Audit:
    """Holds a recording against plain Pyro.

    Args:
        graph: of the recording; loss and norm of the gradients first. Its last input is their factor.
        plain: (args, kwargs) -> loss and norm by plain Pyro, which leaves `.grad` and random states as they were.
        end: called with the reason when they differ.

    Attributes:
        replays: how often the recording was replayed.
        agreed: at which replay an audit last agreed; 0 stands for the recorded run itself.
    """

    def __init__(self, graph: Graph, plain: Plain, end: Callable[[str], None]) -> None:
        self.graph, self.plain, self.end = graph, plain, end
        self.replays = self.agreed = 0
        self._next, self._since = 2.0, time.perf_counter()
        self._moved = [t for t in graph.tensors if not t.requires_grad]  # those that a run changes, once that is known

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
            Diverged: the losses differ, and not by rounding.
        """
        self.replays += 1
        if self.replays < self._next:
            return run()
        start = time.perf_counter()
        expected = self._run_plain(args, kwargs)
        seconds = time.perf_counter() - start
        found = run()
        same = _agree(expected, found, inputs[-1], FUSED if fused else REPLAYED)
        if not same and not (fused and self._is_rounding(args, kwargs, inputs)):
            self.end("an audit found another loss or gradient than plain Pyro's")
            (loss, norm), (ours, our_norm) = map(float, expected), (float(found[0]), float(found[1] / inputs[-1]))
            raise Diverged(
                f"an audit found that replay {self.replays} of a recording gives loss {ours:.6g} and gradient norm "
                f"{our_norm:.4g}, and plain Pyro {loss:.6g} and {norm:.4g} on the same random numbers: something that "
                "the model or guide reads has changed, and it is none of the things that are watched. Try to pass it "
                "as an argument, or as a tensor that is filled in place. The last audit that agreed was at replay "
                f"{self.agreed}; from now on plain Pyro runs"
            )
        self._plan_next(seconds)
        return found

    def _run_plain(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What plain Pyro gives; puts back the tensors that it changes, such as the statistics of a BatchNorm."""
        before = [t.detach().clone() for t in self._moved]
        found = self.plain(args, kwargs)
        moved = [(t, value) for t, value in zip(self._moved, before, strict=True) if not torch.equal(t, value)]
        for tensor, value in moved:
            tensor.data.copy_(value)
        self._moved = [t for t, _ in moved]
        return found

    def _plan_next(self, seconds: float) -> None:
        """`seconds` are those of this audit."""
        now = time.perf_counter()
        replay = (now - seconds - self._since) / (self.replays - self.agreed)
        spread = seconds / SHARE / replay if replay > 0 else inf
        later = self.replays if self.replays < EVERY else min(max(EVERY, spread), AT_LEAST_EVERY)
        self.agreed, self._since, self._next = self.replays, now, self.replays + later

    def _is_rounding(self, args: tuple, kwargs: dict[str, Any], inputs: list[Tensor]) -> bool:
        """Whether the recording, operation by operation, agrees with plain Pyro on other random numbers.

        Then the difference was one of fused code: of a large sum that cancels, or of a discrete draw that came out
        differently at its threshold.
        """
        before = [t.detach().clone() for t in self.graph.tensors]
        with fork_random_state(), torch.no_grad():
            for seed in range(2):
                torch.manual_seed(seed)
                with torch.enable_grad():
                    expected = self._run_plain(args, kwargs)
                torch.manual_seed(seed)
                found = self.graph.module(*self.graph.tensors, *inputs)
                for tensor, value in zip(self.graph.tensors, before, strict=True):
                    if not torch.equal(tensor, value):
                        tensor.copy_(value)
                if not _agree(expected, found, inputs[-1], REPLAYED):
                    return False
        return True


def _agree(expected: tuple[Tensor, Tensor], found: Any, weight: Tensor, tolerance: float) -> bool:
    """Whether loss and norm are the same to a relative tolerance, which for the norm is ten times as large."""
    loss, norm = found[0], found[1] / weight
    return _close(expected[0], loss, tolerance) and _close(expected[1], norm, 10 * tolerance)


def _close(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Whether two numbers are the same to a relative tolerance, or both not finite in the same way."""
    a, b = float(first), float(second)
    if not (isfinite(a) and isfinite(b)):
        return a == b or (a != a and b != b)
    return abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))
