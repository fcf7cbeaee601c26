"""Optimizer steps: loss, gradients, clipping and update of a pair on one batch, compiled or by Pyro as it is.

No step is taken on a loss or gradient that is not finite. On a CPU each is looked at; a GPU would have to be waited
for, so there the fused optimizer is told to skip that step and all after it, and the epoch's end says which it was.
"""

from __future__ import annotations

from contextlib import nullcontext

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.compiled.adam import WholeStep
from pyro_vae.compiled.audit import Diverged
from pyro_vae.compiled.elbo import CompiledELBO, accumulate
from pyro_vae.compiled.plans import Call
from pyro_vae.objectives.protocol import annealed, has_differentiable_loss
from pyro_vae.pairs.libraries import warn
from pyro_vae.pairs.modes import random_state, set_random_state
from pyro_vae.pairs.pair import Pair
from pyro_vae.training.agreed import Agreed
from pyro_vae.training.data import Batch, Batches
from pyro_vae.training.diagnosis import diagnosis
from pyro_vae.training.joint import JointGradient
from pyro_vae.training.parameters import Weights
from pyro_vae.training.plates import full_size

__all__ = ["Steps"]

State = tuple[Tensor, list[Tensor]]  # of torch's random generators


class Steps:
    """Steps of one optimizer on the loss per data point of a pair.

    Args:
        pair: looked at.
        weights: of the pair.
        batches: where the batches come from.
        elbo: the objective.
        optimizer: of the pair's parameters.
        clip_norm: largest norm of the gradient of the loss per data point.
        compiled: takes the place of `elbo`, where it can.

    Attributes:
        count: steps taken.
    """

    def __init__(
        self,
        pair: Pair,
        weights: Weights,
        batches: Batches,
        elbo: ELBO,
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None,
        compiled: CompiledELBO | None,
    ) -> None:
        self.pair, self.weights, self.batches, self.elbo, self.optimizer = pair, weights, batches, elbo, optimizer
        self.clip_norm, self.compiled = clip_norm, compiled
        self.count = 0
        self._full_size = full_size(pair, Batch(pair.args, pair.kwargs, None).size)
        objectives = [elbo] if compiled is None else [elbo, compiled.elbo]
        self._annealed = [a for a in map(annealed, objectives) if a is not None]
        self._own = {id(p) for p in weights.parameters}
        self._last_finite: list[Tensor] = []
        self._factors: dict[int, Tensor] = {}
        self._whole: WholeStep | None = None
        self._agreed = Agreed(weights, optimizer)
        self._ranks = batches.ranks
        self.joint = JointGradient(batches.ranks, weights.parameters)
        # torch.amp.GradScaler's protocol: an optimizer that takes found_inf skips the step on the device itself
        skips = getattr(optimizer, "_step_supports_amp_scaling", False) and batches.columns
        self._deferred = bool(skips) and weights.device.type != "cpu"
        self._stopped = torch.zeros((), dtype=torch.bool, device=weights.device)
        self._finite = torch.zeros((), dtype=torch.long, device=weights.device)
        self._epoch: list[tuple[State, Batch]] = []

    def __call__(self, batch: Batch) -> tuple[Tensor, int]:
        """One step; returns the loss per data point, 0-dim, where the batch is, and the rows of the joint batch.

        Raises:
            ValueError: a loss or gradient that is not finite, with its site and row; nothing is changed then.
        """
        for objective in self._annealed:
            objective.set_step(self.count)
        state = random_state()
        try:
            return self._step(batch, state, self._find(batch))
        except Diverged as error:
            self._go_back(str(error))
            set_random_state(state)
            return self._step(batch, state, None)

    def _step(self, batch: Batch, state: State, call: Call | None) -> tuple[Tensor, int]:
        if self._agreed.count is None and call is not None and call.plan is not None and not self._ranks.several:
            self._agreed.keep(self.count)  # before the first replay
        size, rows = self.data_points(batch), batch.size
        whole = None if call is None else self._whole_step(batch, call)
        if whole is not None:
            value, norm = whole
            value = value / size
            self._look(batch, state, value, norm, whole=True)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            # a first step looks for parameters as pyro.infer.SVI does
            with poutine.trace(param_only=True) if self.count == 0 else nullcontext() as seen:
                if self._ranks.several:
                    value, norm, rows = self.joint(lambda: self._gradients(batch, call), batch.size)
                else:
                    value, norm = self._gradients(batch, call)
            self._stopped |= ~(torch.isfinite(value) & torch.isfinite(norm))
            self._look(batch, state, value, norm, whole=False)
            if self.count == 0:
                self.weights.warn_of_unreached()
                self.weights.warn_of_unregistered(seen.trace)
            if self.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.weights.parameters, self.clip_norm, norm)
            if self._deferred:
                self.optimizer.found_inf = self._stopped.float()  # type: ignore[attr-defined]
            if self._whole is not None:
                self._whole.settle()
            self.optimizer.step()
            if self._whole is not None:
                self._whole.resume()
        self.count += 1
        audited = call is not None and call.plan is not None and call.plan.audit.replays == call.plan.audit.agreed
        if audited and not self._ranks.several:
            if self._whole is not None:
                self._whole.settle()
            self._agreed.keep(self.count)
        return value, rows

    def go_on(self, count: int) -> None:
        """Continues after this many steps, with weights and optimizer as they are now, the objective as it was then."""
        self.count = count
        self._agreed = Agreed(self.weights, self.optimizer)
        for t in (self._stopped, self._finite):
            t.zero_()
        self._epoch.clear()
        if self._whole is not None:
            self._whole.resume()
        for objective in self._annealed:
            objective.set_step(max(0, count - 1))

    def begin_epoch(self) -> None:
        """Keeps the weights, to come back to if they stop being finite."""
        self._last_finite = self.weights.copy()
        if self._ranks.several and self._agreed.count is None and self.compiled is not None:
            # each rank has audits of its own: where one fails, all have to go back to the same step
            self._agreed.keep(self.count)

    def end_epoch(self) -> None:
        """Brings the optimizer up to date, and reports what went wrong in steps that were not checked one by one."""
        skipped = 0
        if self._deferred:
            if hasattr(self.optimizer, "found_inf"):
                del self.optimizer.found_inf
            skipped = len(self._epoch) - int(self._finite)
        if self._whole is not None:
            self._whole.settle(skipped)
        if skipped:
            self.count -= skipped
            state, batch = self._epoch[int(self._finite)]
            batch = self.batches.at(batch.rows)
            with torch.random.fork_rng():
                set_random_state(state)
                value, norm = self._gradients(batch)
            self._fail(batch, state, value, norm)
        self._finite.zero_()
        self._epoch.clear()

    def _look(self, batch: Batch, state: State, value: Tensor, norm: Tensor, *, whole: bool) -> None:
        """Stops if the loss or gradient is not finite: at once, or at the end of the epoch if the device is a GPU."""
        if self._deferred:
            self._finite += ~self._stopped
            self._epoch.append((state, batch._replace(args=(), kwargs={})))
        elif self._stopped:
            if whole:
                self._whole.settle(skipped=1)
            self._fail(batch, state, value, norm)

    def _find(self, batch: Batch) -> Call | None:
        """The batch as a call of the compiled objective. None if Pyro runs as it is, as it does in the first step."""
        if self.compiled is None or self.count == 0 or not batch.size:
            return None
        return self.compiled.find(self.pair.model, self.pair.guide, batch.args, batch.kwargs)

    def _whole_step(self, batch: Batch, call: Call) -> tuple[Tensor, Tensor] | None:
        """Loss and norm, where a recorded loss and a plain Adam make one graph, whose step this takes; else None."""
        plan = None if self._ranks.several else call.plan  # the ranks' gradients come between
        if plan is None or self.compiled.backend != "inductor" or not (self._is_full(batch) and plan.pays):
            return None
        if self._whole is None or self._whole.graph is not plan.graph:
            if self._whole is not None:
                self._whole.settle()
                self._whole = None
            # a parameter that was frozen when the fit began counts neither for the optimizer nor for the norm
            own = all(id(t) in self._own and not t._post_accumulate_grad_hooks for t in plan.graph.leaves)
            if not own or not WholeStep.fits(self.optimizer, plan.graph):
                return None
            self._whole = WholeStep(plan.graph, self.optimizer, self.clip_norm)
        if not self._whole.holds():
            return None
        whole, inputs = self._whole, [*call.inputs, self._factor(self.data_points(batch))]
        return plan.audit.replay(lambda: whole(self._stopped, *inputs), call.args, call.kwargs, inputs, fused=True)

    def _is_full(self, batch: Batch) -> bool:
        """Whether a batch is one of many of its size; a ragged last one is not worth generating code for."""
        return batch.size == self.batches.full_size

    def _go_back(self, reason: str) -> None:
        """Goes on with plain Pyro, from the weights that the last audit which agreed has seen."""
        count = self._agreed.bring_back()
        warn(f"fit: {reason}, from the weights of step {count}; what steps {count} to {self.count} did is undone.")
        self.compiled = self._whole = None

    def data_points(self, batch: Batch) -> int:
        """How many data points the loss of a batch counts for."""
        return self._full_size or batch.size

    def _factor(self, size: int) -> Tensor:
        """1/size, one tensor for each size."""
        if size not in self._factors:
            double = any(p.dtype == torch.float64 for p in self.weights.parameters)
            dtype = torch.float64 if double else torch.float32
            self._factors[size] = torch.tensor(1 / size, dtype=dtype, device=self.weights.device)
        return self._factors[size]

    def _gradients(self, batch: Batch, call: Call | None = None) -> tuple[Tensor, Tensor]:
        """Loss per data point, and the norm of its gradient, which is now that of the parameters."""
        pair, size = self.pair, self.data_points(batch)
        if call is not None:
            found = self.compiled.run(
                pair.model, pair.guide, call, self._factor(size), generate_code=self._is_full(batch)
            )
            if found is not None:
                own = [(leaf, gradient) for leaf, gradient in found.gradients if id(leaf) in self._own]
                for leaf, gradient in own:
                    accumulate(leaf, gradient)
                if len(own) == len(found.gradients):
                    return found.loss / size, found.norm
                return found.loss / size, torch.nn.utils.get_total_norm([gradient for _, gradient in own])
        # the first step runs under the user's validation settings, so that Pyro says what it has to say
        with nullcontext() if self.count == 0 else pyro.validation_enabled(False):
            if has_differentiable_loss(self.elbo):
                loss = self.elbo.differentiable_loss(pair.model, pair.guide, *batch.args, **batch.kwargs) / size
                loss.backward()
                value = loss.detach()
            else:  # TraceGraph_ELBO, RenyiELBO, ReweightedWakeSleep do their own backward pass
                value = self.elbo.loss_and_grads(pair.model, pair.guide, *batch.args, **batch.kwargs)
                value = value[0] if isinstance(value, tuple) else value
                value = torch.as_tensor(value, device=self.weights.device) / size
                for p in self.weights.parameters:
                    if p.grad is not None:
                        p.grad /= size
        if self.count == 0:
            self.weights.refuse_sparse()
        return value, torch.nn.utils.get_total_norm([p.grad for p in self.weights.parameters if p.grad is not None])

    def _fail(self, batch: Batch, state: State, value: Tensor, norm: Tensor) -> None:
        if not self.weights.are_finite():
            self.weights.restore(self._last_finite)
        self.optimizer.zero_grad(set_to_none=True)
        share, message = self.joint.share, None
        if not self._ranks.several or (share is not None and not torch.isfinite(share)):
            with torch.random.fork_rng():
                set_random_state(state)
                message = diagnosis(self.pair, batch, self.count, value, norm)
        found = [(rank, text) for rank, text in enumerate(self._ranks.gather(message)) if text is not None]
        rank, text = found[0] if found else (0, f"fit stopped before step {self.count}: the joint gradient overflows.")
        raise ValueError(f"rank {rank}: {text}" if self._ranks.several else text)
