r"""A whole training step as one graph: loss, gradients, their norm, clipping and the update of Adam or AdamW.

With g the gradient of the loss per data point, clipped to norm c, Adam (Kingma & Ba 2015, algorithm 1) updates

    m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,   θ ← θ − η/(1 − β₁ᵗ) · m / (√(v/(1 − β₂ᵗ)) + ε),

if loss and norm are finite; otherwise nothing moves. Weight decay λ first adds λθ to g or, where it is decoupled
(AdamW, Loshchilov & Hutter 2019), first shrinks θ to (1 − ηλ) θ. The state of the algorithm stays in the torch
optimizer that the step replaces, so that schedulers, checkpoints and later eager steps can go on with it. Each step
reads η, β₁, β₂, ε and λ of each group of parameters from there.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.compiled.adam_state import has_moments, is_decoupled, is_plain, objects, update, values
from pyro_vae.compiled.codegen import generate
from pyro_vae.compiled.recording import Graph

__all__ = ["WholeStep"]

NUMBERS = 7  # scalars of a group and step count


class WholeStep:
    """One step of a `torch.optim.Adam` or `AdamW` on a recorded loss.

    Args:
        graph: what `pyro_vae.compiled.recording.record_gradients` returned.
        optimizer: one for which `fits` is true.
        clip_norm: largest norm of the gradient; None does not clip.
    """

    def __init__(self, graph: Graph, optimizer: torch.optim.Adam, clip_norm: float | None) -> None:
        self.graph, self.optimizer, self.clip_norm = graph, optimizer, clip_norm
        self._run: Callable | None = None
        self._layout: tuple = ()  # what the graph of the step was made for
        self._row_of: dict[int, int] = {}  # {id of a parameter: its row}
        self._seen: list[Any] | None = None  # what the optimizer consisted of; None if it does not fit
        self._taken = self._settled = 0  # steps taken here, and how many of them the optimizer knows of
        self._counts: list[Tensor] = []
        self._versions: list[int] = []
        self._starts: list[int] = []
        self.resume()

    @staticmethod
    def fits(optimizer: torch.optim.Optimizer, graph: Graph) -> TypeGuard[torch.optim.Adam]:
        """Whether this class can replace the optimizer.

        It can if that is a plain `torch.optim.Adam` or `AdamW`, no extras and no hooks, and if it has taken a step on
        every parameter that the graph moves.
        """
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or not is_plain(optimizer):
            return False
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return all(has_moments(p, optimizer.state.get(p, {})) for p in graph.leaves if id(p) in own)

    def holds(self) -> bool:
        """Whether a call would do what the optimizer's own step would do now.

        If not, take that one: `settle` first, `resume` afterwards. The numbers of the groups may change at any time. It
        does not hold if something else did: parameters or groups, the state (as by `load_state_dict`), step counts,
        extras or hooks.
        """
        if self._seen is None or not is_plain(self.optimizer):
            return False
        now = objects(self.optimizer)
        return (
            len(now) == len(self._seen)
            and all(map(is_, now, self._seen))
            and [count._version for count in self._counts] == self._versions
        )

    def __call__(self, stopped: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Takes a step and returns loss and norm.

        If one of these is not finite, `stopped` (0-dim, bool) becomes true. As long as it is true, nothing moves.
        """
        self._taken += 1
        scalars = torch.tensor(self._numbers(), dtype=self._dtype, device=stopped.device)
        held = self._held
        if self._run is None:
            module = self._trace([*held, stopped, scalars, *inputs])
            self._run = generate(module, [*held, stopped], [scalars, *inputs])
        with torch.no_grad():
            loss, norm = self._run(*held, stopped, scalars, *inputs)
        return loss, norm

    def settle(self, skipped: int = 0) -> None:
        """Adds the number of steps taken here, without those that were `skipped`, to the optimizer's step counts.

        A count that someone else has set since then stays what it is.
        """
        self._taken -= skipped
        if self._taken == self._settled:
            return
        self._settled = self._taken
        for i, count in enumerate(self._counts):
            if count._version == self._versions[i]:
                count.fill_(self._starts[i] + self._taken)
                self._versions[i] = count._version

    def resume(self) -> None:
        """Goes on from the optimizer as it is now: its groups, its state and its step counts."""
        optimizer, leaves = self.optimizer, self.graph.leaves
        self._taken = self._settled = 0
        self._counts = []
        self._seen = objects(optimizer) if self.fits(optimizer, self.graph) else None
        if self._seen is None:
            return
        groups = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._trained = [i for i, p in enumerate(leaves) if id(p) in groups]
        states = [optimizer.state[leaves[i]] for i in self._trained]
        moments = [state[name] for name in ("exp_avg", "exp_avg_sq") for state in states]
        self._held = [*self.graph.tensors, *moments]
        self._counts = [state["step"] for state in states]
        self._versions = [count._version for count in self._counts]
        self._starts = values(self._counts)
        self._find_rows([groups[id(leaves[i])] for i in self._trained])
        doubles = any(leaves[i].dtype == torch.float64 for i in self._trained)
        self._dtype = torch.float64 if doubles else torch.float32
        layout = (self._trained, self._row_of, self._decoupled, self._dtype, [t.stride() for t in moments])
        if layout != self._layout:
            self._layout, self._run = layout, None

    def _find_rows(self, groups: list[int]) -> None:
        """Gives parameters of one group and one step count one row of scalars.

        Rows are split where counts part, but never joined again: another layout takes seconds to compile.
        """
        ids = [id(self.graph.leaves[i]) for i in self._trained]
        keys = list(zip(map(self._row_of.get, ids), groups, self._starts, strict=True))
        distinct = list(dict.fromkeys(keys))
        self._row_of = {i: distinct.index(key) for i, key in zip(ids, keys, strict=True)}
        self._rows = [(group, start) for _, group, start in distinct]
        self._decoupled = [is_decoupled(self.optimizer.param_groups[group]) for group, _ in self._rows]

    def _numbers(self) -> list[float]:
        """The scalars of a step, row by row, as `_update` takes them."""
        numbers: list[float] = []
        for (k, start), decoupled in zip(self._rows, self._decoupled, strict=True):
            group, step = self.optimizer.param_groups[k], start + self._taken
            rate, decay, eps, (beta1, beta2) = group["lr"], group["weight_decay"], group["eps"], group["betas"]
            if group.get("fused"):  # elsewhere torch rounds what comes of a tensor as the tensor's dtype does
                rate, beta1, beta2 = float(rate), float(beta1), float(beta2)
            size, root = rate / (1 - beta1**step), 1 / float((1 - beta2**step) ** 0.5)
            shrink = 1 - rate * decay if decoupled else decay
            numbers += map(float, (1 - beta1, beta2, 1 - beta2, size, root, eps, shrink))
        return numbers

    def _trace(self, arguments: list[Tensor]) -> torch.fx.GraphModule:
        """The graph of a step, of the recorded tensors, both moments, `stopped`, the scalars and the inputs."""
        held, results, clip = len(self.graph.tensors), self.graph.num_results, self.clip_norm
        positions = {id(t): i for i, t in enumerate(self.graph.tensors)}
        moved = [(i, id(self.graph.leaves[i])) for i in self._trained]

        def step(*arguments: Tensor) -> tuple[Tensor, Tensor]:
            tensors, rest = arguments[:held], arguments[held:]
            first, second, rest = rest[: len(moved)], rest[len(moved) : 2 * len(moved)], rest[2 * len(moved) :]
            stopped, rows, inputs = rest[0], rest[1].view(len(self._rows), NUMBERS).unbind(), rest[2:]
            outputs = self.graph.module(*tensors, *inputs)
            loss, norm, gradients = outputs[0], outputs[1], outputs[results:]
            finite = torch.isfinite(loss) & torch.isfinite(norm) & ~stopped
            stopped.copy_(~finite)
            factor = None if clip is None else (clip / (norm + 1e-6)).clamp(max=1.0)  # as torch clips
            for (i, name), m, v in zip(moved, first, second, strict=True):
                p, row = tensors[positions[name]], self._row_of[name]
                g = gradients[i] if factor is None else gradients[i] * factor
                new = update(p, m, v, g, rows[row], self._decoupled[row])
                for old, value in zip((p, m, v), new, strict=True):
                    old.copy_(torch.where(finite, value, old))
            return loss, norm

        with torch.no_grad():
            return make_fx(step, tracing_mode="fake")(*(t.detach() for t in arguments))
