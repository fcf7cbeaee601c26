r"""A whole training step as one graph: loss, gradients, their norm, clipping and Adam's update.

With g the gradient of the loss per data point, clipped to norm c, Adam (Kingma & Ba 2015, algorithm 1) updates

    m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,   θ ← θ − η/(1 − β₁ᵗ) · m / (√(v/(1 − β₂ᵗ)) + ε),

if loss and norm are finite; otherwise nothing moves. The state of the algorithm stays in the `torch.optim.Adam` that
the step replaces, so that schedulers, checkpoints and later eager steps can go on with it. Each step reads the learning
rate from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.compiled.codegen import generate
from pyro_vae.compiled.recording import Graph

__all__ = ["WholeStep"]


class WholeStep:
    """One step of a `torch.optim.Adam` on a recorded loss.

    Args:
        graph: what `pyro_vae.compiled.recording.record_gradients` returned.
        optimizer: an Adam for which `fits` is true.
        clip_norm: largest norm of the gradient; None does not clip.
    """

    def __init__(self, graph: Graph, optimizer: torch.optim.Adam, clip_norm: float | None) -> None:
        self.graph, self.optimizer = graph, optimizer
        (self.group,) = optimizer.param_groups
        self.clip_norm = clip_norm
        own = {id(p) for p in self.group["params"]}
        positions = {id(t): i for i, t in enumerate(graph.tensors)}
        self._trained = [(positions[id(p)], i) for i, p in enumerate(graph.leaves) if id(p) in own]
        states = [optimizer.state[graph.leaves[i]] for _, i in self._trained]
        self._moments = [s["exp_avg"] for s in states] + [s["exp_avg_sq"] for s in states]
        self._counts = [s["step"] for s in states]
        self._steps = 0
        self._run: Callable | None = None
        self.resume()

    @staticmethod
    def fits(optimizer: torch.optim.Optimizer, graph: Graph) -> TypeGuard[torch.optim.Adam]:
        """Whether this class can replace the optimizer.

        It can if that is a plain `torch.optim.Adam` with one group of parameters, no extras and no hooks, and if it has
        taken a step on every parameter that the graph moves.
        """
        if type(optimizer) is not torch.optim.Adam or len(optimizer.param_groups) != 1:
            return False
        group = optimizer.param_groups[0]
        extras = ("amsgrad", "maximize", "differentiable", "weight_decay", "decoupled_weight_decay")
        own = {id(p) for p in group["params"]}
        if any(id(p) in own and "step" not in optimizer.state[p] for p in graph.leaves):
            return False
        same = len({float(s["step"]) for s in optimizer.state.values()}) == 1
        hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        return same and not hooks and not any(group.get(name) for name in extras)

    def __call__(self, stopped: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Takes a step and returns loss and norm.

        If one of these is not finite, `stopped` (0-dim, bool) becomes true. As long as it is true, nothing moves.
        """
        beta1, beta2 = self.group["betas"]
        self._steps += 1
        scalars = torch.tensor(
            [float(self.group["lr"]) / (1 - beta1**self._steps), (1 - beta2**self._steps) ** -0.5],
            device=stopped.device,
        )
        held = [*self.graph.tensors, *self._moments, stopped]
        if self._run is None:
            self._run = generate(self._trace([*held, scalars, *inputs]), held, [scalars, *inputs])
        with torch.no_grad():
            loss, norm = self._run(*held, scalars, *inputs)
        return loss, norm

    def settle(self, skipped: int = 0) -> None:
        """Sets the optimizer's step counts to the number of steps taken here, without those that were `skipped`."""
        self._steps -= skipped
        for count in self._counts:
            count.fill_(self._steps)

    def resume(self) -> None:
        """Goes on from the optimizer's step count."""
        self._steps = int(self._counts[0]) if self._counts else 0

    def _trace(self, arguments: list[Tensor]) -> torch.fx.GraphModule:
        """The graph of a step, of the recorded tensors, both moments, `stopped`, two scalars and the inputs."""
        held, trained, (beta1, beta2) = len(self.graph.tensors), self._trained, self.group["betas"]
        eps, clip, results = self.group["eps"], self.clip_norm, self.graph.num_results

        def step(*arguments: Tensor) -> tuple[Tensor, Tensor]:
            tensors, rest = arguments[:held], arguments[held:]
            first, second, rest = rest[: len(trained)], rest[len(trained) : 2 * len(trained)], rest[2 * len(trained) :]
            stopped, (size, root), inputs = rest[0], rest[1].unbind(), rest[2:]
            outputs = self.graph.module(*tensors, *inputs)
            loss, norm, gradients = outputs[0], outputs[1], outputs[results:]
            finite = torch.isfinite(loss) & torch.isfinite(norm) & ~stopped
            stopped.copy_(~finite)
            factor = None if clip is None else (clip / (norm + 1e-6)).clamp(max=1.0)  # as torch clips
            for (position, i), m, v in zip(trained, first, second, strict=True):
                p = tensors[position]
                g = gradients[i] if factor is None else gradients[i] * factor
                new_m, new_v = torch.lerp(m, g, 1 - beta1), v * beta2 + (1 - beta2) * g * g
                new_p = p - size * new_m / (new_v.sqrt() * root + eps)
                for old, new in ((m, new_m), (v, new_v), (p, new_p)):
                    old.copy_(torch.where(finite, new, old))
            return loss, norm

        with torch.no_grad():
            return make_fx(step, tracing_mode="fake")(*(t.detach() for t in arguments))
