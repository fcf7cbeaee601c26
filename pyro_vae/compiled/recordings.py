"""All recordings of one (model, guide) pair: which one answers a call, when a new one is made, and when none may be.

A run that changes something besides tensors itself (a counter, an iterator, Python's random state) cannot be replayed,
and a number that is another in each call cannot be recorded: Pyro then runs as it is, and one warning says why.

Recordings are made sparingly. The first call of each signature runs as it is, since shapes that come once are not worth
one; beyond the first few recordings, one is made for so many replays. So a loop in which each batch has another size
runs at the speed of Pyro, in bounded memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from math import inf
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vae.compiled.attempt import attempt, trial
from pyro_vae.compiled.audit import Audit
from pyro_vae.compiled.handler import Gradients
from pyro_vae.compiled.plans import Call, Plan, call_of
from pyro_vae.compiled.recording import Untraceable, record_gradients
from pyro_vae.objectives.protocol import has_differentiable_loss
from pyro_vae.pairs.libraries import warn

__all__ = ["LossAndGradients", "Recordings"]

SIGNATURES = 256  # that are remembered, the latest ones
FIRST, REPLAYS_FOR_ONE = 4, 100  # beyond the first recordings, each has to be paid by so many replays
RECENT = 200  # a recording that answered one of so many replays is not dropped for another one


class LossAndGradients(NamedTuple):
    """What one step of an optimizer needs.

    Attributes:
        loss: the loss that the ELBO reports, 0-dim.
        norm: the norm of all gradients together, 0-dim.
        gradients: pairs (leaf tensor, gradient of the weighted loss).
        stored: names of the parameters in Pyro's store that the loss used.
    """

    loss: Tensor
    norm: Tensor
    gradients: list[tuple[Tensor, Tensor]]
    stored: list[str]


class Recordings:
    """The recordings of one pair.

    Args:
        model: the model.
        guide: the guide.
        elbo: the objective.
        most: how many recordings are kept.

    Attributes:
        refused: why none is made or used any more. None if they are.
        reasons: why some were not made.
    """

    def __init__(self, model: Callable, guide: Callable, elbo: ELBO, most: int) -> None:
        self.model, self.guide, self.elbo, self.most = model, guide, elbo, most
        self._default = "differentiable_loss" if has_differentiable_loss(elbo) else "loss_and_grads"
        self.refused: str | None = None
        self.reasons: list[str] = []
        self._plans: OrderedDict[tuple, list[Plan]] = OrderedDict()  # by signature, the most recently used last
        self._unanswered: OrderedDict[tuple, float] = OrderedDict()  # calls of a signature since its last replay
        self._floats: list[float] | None = None
        self._moving_floats = self._changed = False
        self._made = self._replayed = 0
        self._latest: Plan | None = None  # that answered the last call

    def find(self, method: str | None, args: tuple, kwargs: dict[str, Any]) -> Call | None:
        """The call, with its recording if there is one. None if Pyro must run as it is."""
        call = call_of(method or self._default, args, kwargs, self._moving_floats)
        if call is None or self.refused is not None:
            return None
        if not self._moving_floats:
            floats = [leaf for leaf in call.leaves if isinstance(leaf, float)]
            if self._floats not in (None, floats):
                self._moving_floats = True
                return self.find(method, args, kwargs)
            self._floats = floats
        plans = self._plans.get(call.key, [])
        plan = next((plan for plan in plans if plan.change() is None), None)
        if plan is not None:
            self._replayed += 1
            plan.in_a_row, plan.last = self._latest is plan, self._replayed
            if not plan.in_a_row:
                self._plans.move_to_end(call.key)
            if self._unanswered.get(call.key):
                self._unanswered[call.key] = 0
        self._latest = plan
        return call._replace(plan=plan)

    def record(self, call: Call, inputs: list[Tensor]) -> LossAndGradients | None:
        """Records a call that no recording answers; its results are those of the call. None if Pyro must run as it is.

        Args:
            call: without a plan.
            inputs: those of the graph, the last one is the factor of the loss in the gradients.
        """
        unanswered = self._unanswered.get(call.key, 0)
        self._unanswered[call.key] = unanswered + 1
        self._unanswered.move_to_end(call.key)
        while len(self._unanswered) > SIGNATURES:
            self._unanswered.popitem(last=False)
        if unanswered == 0 or unanswered == inf or not self._may_record(call, unanswered):
            return None
        stored: dict[str, Tensor] = {}
        run = self._run_of(call, stored)
        found, watch, refusal, changed, states = attempt(
            lambda: record_gradients(run, *inputs[:-1], weight=inputs[-1]),
            *(self.model, self.guide, self.elbo, *call.static, *call.inputs),
        )
        if found is None:
            if watch.moving is not None:
                self._end(refusal, warn=True)
            elif refusal is not None:
                self._unanswered[call.key] = inf
                self._warn(refusal)
            return None
        (loss, norm), gradients, graph = found
        failure = trial(graph, inputs, states)
        if any(leaf._backward_hooks for leaf in graph.leaves):
            failure = "a parameter has a hook, which no replay calls"
        if failure is not None:
            self._end(failure, warn=True)
        elif changed is None:
            audit = Audit(graph, partial(self._by_pyro, call.method, graph.leaves), self._end)
            self._keep(call, Plan(graph, watch, stored, call.static, self._made == 0, audit))
        elif self._changed:  # once may be a set-up
            self._end(f"{changed} is changed by the model or guide in each run", warn=True)
        self._changed = changed is not None
        return LossAndGradients(loss, norm, list(zip(graph.leaves, gradients, strict=True)), list(stored))

    def _end(self, reason: str, *, warn: bool = False) -> None:
        """Makes and uses no recording of this pair any more."""
        self.refused = reason
        self._plans.clear()
        if warn:
            self._warn(reason)
        else:
            self.reasons.append(reason)

    def _may_record(self, call: Call, unanswered: float) -> bool:
        """Whether a recording is worth its time. Notes why it will not be, where that is clear."""
        own = self._plans.get(call.key, [])
        if own and unanswered > self.most:
            what = next((change for change in map(Plan.change, reversed(own)) if change), "a number")
            self._unanswered[call.key] = inf
            del self._plans[call.key]
            self._warn(f"{what} is another in each call; try a tensor, or an argument of the model")
            return False
        oldest = self.plans[0] if len(self.plans) >= self.most and not own else None
        needed = oldest is not None and oldest.last > self._replayed - RECENT
        if not needed and self._made < FIRST + self._replayed // REPLAYS_FOR_ONE:
            return True
        if not own:
            self._warn("shapes or other arguments change too often to be recorded; try batches of few sizes")
        return False

    def _keep(self, call: Call, plan: Plan) -> None:
        self._plans.setdefault(call.key, []).append(plan)
        self._plans.move_to_end(call.key)
        self._made += 1
        self._latest, plan.last = plan, self._replayed
        while len(self.plans) > self.most:
            oldest, plans = next(iter(self._plans.items()))
            plans.pop(0)
            if not plans:
                del self._plans[oldest]

    def _warn(self, reason: str) -> None:
        """Notes why Pyro runs as it is, and warns of the first reason."""
        first = not self.reasons
        if reason not in self.reasons:
            self.reasons.append(reason)
        if first:
            warn(f"CompiledELBO: Pyro runs as it is, not compiled: {reason}.")

    @property
    def plans(self) -> list[Plan]:
        """All recordings, the most recently used last."""
        return [plan for plans in self._plans.values() for plan in plans]

    def _by_pyro(
        self, method: str, leaves: list[Tensor], args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Loss and gradients of the leaves, by Pyro as it is. `.grad` stays as it is."""
        with pyro.validation_enabled(False), Gradients() as found:
            loss = getattr(self.elbo, method)(self.model, self.guide, *args, **kwargs)
            if isinstance(loss, Tensor) and loss.requires_grad:
                loss.backward()
        return torch.as_tensor(loss).detach(), [found.gradients.get(leaf) for leaf in leaves]

    def _run_of(self, call: Call, stored: dict[str, Tensor]) -> Callable[..., list[Tensor]]:
        """The function of a call's inputs that is recorded. Its run puts parameters of Pyro's store into `stored`."""

        def run(*inputs: Tensor) -> list[Tensor]:
            args, kwargs = call.with_inputs(inputs)
            before = pytree.tree_leaves((args, kwargs))
            with poutine.trace(param_only=True) as seen:
                loss = getattr(self.elbo, call.method)(self.model, self.guide, *args, **kwargs)
                if isinstance(loss, Tensor) and loss.requires_grad:
                    loss.backward()
                    loss = loss.detach()
            if any(a is not b for a, b in zip_longest(pytree.tree_leaves((args, kwargs)), before)):
                raise Untraceable("it changes what is in a container among its arguments")
            stored.update({n: s["value"].unconstrained() for n, s in seen.trace.nodes.items() if s["type"] == "param"})
            if isinstance(loss, (int, float)):  # of a model without sites
                loss = torch.tensor(loss, dtype=torch.float64)
            if not isinstance(loss, Tensor):
                raise Untraceable(f"{type(self.elbo).__name__}.{call.method} returns a {type(loss).__name__}")
            return [loss]

        return run
