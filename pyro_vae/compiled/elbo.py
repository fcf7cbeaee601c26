r"""`CompiledELBO`: any `pyro.infer.ELBO` of any model and guide as one compiled graph of loss and gradients.

Pyro is chosen for what it can express; per step it costs milliseconds of Python for effect handlers, sites and one
optimizer per parameter. All of that does the same thing in every step, so one run of it is recorded
(`recording.py`), with its backward pass, and replayed: by code that torch's inductor generates, or operation by
operation, with the same random numbers, and then the very same floats, as Pyro.

A recording holds as long as what it was made from: shapes, dtypes and devices of the arguments, training or evaluation
mode, the parameters there are, and every number in a closure, global or attribute (`watch.py`). If one of these
changes, the next call records anew. Arguments that are tensors or floats are inputs, as are tensors in closures:
annealing one of them costs nothing.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.util import warn_if_nan
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vae.compiled.recording import Graph, Untraceable, record_gradients
from pyro_vae.compiled.watch import Watch
from pyro_vae.objectives.protocol import annealed, has_differentiable_loss
from pyro_vae.pairs.modes import random_state, set_random_state

__all__ = ["CompiledELBO", "LossAndGradients"]


class LossAndGradients(NamedTuple):
    """What one step of an optimizer needs.

    Attributes:
        loss: as the ELBO reports it, 0-dim.
        norm: of all gradients together, 0-dim.
        gradients: of the weighted loss, as pairs (leaf tensor, gradient).
    """

    loss: Tensor
    norm: Tensor
    gradients: list[tuple[Tensor, Tensor]]


@dataclass
class _Plan:
    """A recording and what it depends on."""

    graph: Graph
    watch: Watch
    stored: dict[str, Tensor]  # of Pyro's parameter store: {name: unconstrained tensor}
    kept: Any  # arguments that are compared by identity

    def __post_init__(self) -> None:
        self.properties = self._properties()

    def holds(self) -> bool:
        params = dict(pyro.get_param_store().named_parameters())
        return (
            all(params.get(name) is t for name, t in self.stored.items())
            and self._properties() == self.properties
            and self.watch.changed() is None
        )

    def _properties(self) -> list[tuple]:
        """What a user may change about a tensor without replacing it, such as freezing it or moving it to a device."""
        return [(t.requires_grad, t.device, t.dtype, t.shape) for t in self.graph.tensors]


class _Call(NamedTuple):
    """A call, taken apart, and the recording that answers it."""

    key: tuple
    leaves: list[Any]
    inputs: list[Tensor]
    static: list[Any]
    plan: _Plan | None


class CompiledELBO(ELBO):
    r"""Any `pyro.infer.ELBO`, compiled: the same loss and gradients, without Pyro's Python in every step.

    A drop-in for `JitTrace_ELBO` and its siblings, for `Trace_ELBO`, `TraceMeanField_ELBO`, `TraceGraph_ELBO`,
    `TraceEnum_ELBO`, `RenyiELBO` and the objectives of this package. The first call runs Pyro as it is, the second
    records, the third compiles (seconds); calls after these replay. Draws, subsamples of plates and score-function
    terms are recorded as operations: random stays random.

    A model that decides by values what to do next (`if`, `.item()`, numpy) has no graph. Pyro then runs as it is, and
    one warning names the place. (`torch.nn.functional.one_hot(y, C)` reads values; `torch.eye(C)[y]` does not.)
    So it does for arguments that require a gradient, and under effect handlers
    around the call.

    Args:
        elbo: the objective; default `Trace_ELBO()`.
        backend: "inductor" generates fused code, or says once what it misses and goes on like "eager", which replays
            operation by operation: the same floats as Pyro under one seed, nothing to wait for.
        cache_size: how many recordings are kept, for other shapes (a ragged last batch) or modes; the one that was not
            used for longest goes.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     loc = pyro.param("loc", torch.zeros(3))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(loc, 0.5**0.5))
        >>> pyro.clear_param_store()
        >>> loss = CompiledELBO(Trace_ELBO(), backend="eager")
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
        >>> losses = [svi.step(torch.tensor([-2.0, 0.0, 2.0])) for _ in range(300)]
        >>> pyro.param("loc").detach().round() + 0.0  # the exact posterior's, x/2
        tensor([-1.,  0.,  1.])
    """

    def __init__(self, elbo: ELBO | None = None, *, backend: str = "inductor", cache_size: int = 8) -> None:
        if elbo is not None and not isinstance(elbo, ELBO):
            raise TypeError(f"elbo: expected a pyro.infer.ELBO, got {elbo!r}. Try CompiledELBO(Trace_ELBO()).")
        if backend not in ("inductor", "eager"):
            raise ValueError(f"backend: expected 'inductor' or 'eager', got {backend!r}.")
        if cache_size < 1:
            raise ValueError(f"cache_size: expected at least 1, got {cache_size}.")
        self.elbo = Trace_ELBO() if elbo is None else elbo
        self.backend, self.cache_size = backend, cache_size
        self._plans: OrderedDict[tuple, list[_Plan]] = OrderedDict()  # by signature, the most recently used last
        self._met: set[tuple] = set()  # pairs that have run once, so that their parameters exist
        self._recorded: dict[tuple, int] = {}  # recordings of a signature since its last replay
        self._refused: set[tuple] = set()
        self._steps = count()

    def __getattr__(self, name: str) -> Any:
        if name == "elbo":  # not there yet
            raise AttributeError(name)
        return getattr(self.elbo, name)  # num_particles and the like

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss alone, for evaluation: not compiled."""
        return self.elbo.loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Returns the loss and adds its gradients to the parameters'.

        It calls `pyro.param` for each of them, which is how `pyro.infer.SVI` learns what to step."""
        schedule = annealed(self.elbo)
        if schedule is not None:  # it moves between recordings, not in them
            schedule.set_step(next(self._steps))
        found = self._replay(model, guide, args, kwargs)
        if found is None:
            return self.elbo.loss_and_grads(model, guide, *args, **kwargs)
        (loss, _, gradients), names = found
        for name in names:
            pyro.param(name)
        for leaf, gradient in gradients:
            leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
        value = loss.item()
        warn_if_nan(value, "loss")
        return value

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a tensor that can be differentiated once, by the parameters."""
        found = self._replay(model, guide, args, kwargs) if torch.is_grad_enabled() else None
        if found is None or not found[0].gradients:
            return self.elbo.differentiable_loss(model, guide, *args, **kwargs)
        (loss, _, gradients), names = found
        for name in names:
            pyro.param(name)
        leaves, values = zip(*gradients, strict=True)
        return _Differentiable.apply(loss.to(leaves[0].dtype), values, *leaves)

    def loss_and_gradients(
        self, model: Callable, guide: Callable, args: tuple, weight: Tensor, *, generate_code: bool = True
    ) -> LossAndGradients | None:
        """The loss and the gradients of weight × loss, which are not added to `.grad`; None if the pair has no graph.

        Args:
            model: the model.
            guide: the guide.
            args: what both are called with.
            weight: of the loss in the gradients, 0-dim.
            generate_code: False: these shapes are too rare for it.
        """
        found = self._replay(model, guide, args, {}, weight, generate_code)
        return None if found is None else found[0]

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple:
        return self.elbo._get_trace(model, guide, args, kwargs)

    # -- recordings ---------------------------------------------------------------------------------------------------

    def find(self, model: Callable, guide: Callable, args: tuple, kwargs: dict | None = None) -> _Call | None:
        """The recording for a call, if there is one; None if Pyro must run as it is."""
        if (model, guide) not in self._met:
            self._met.add((model, guide))
            return None
        if any(not isinstance(handler, TraceMessenger) for handler in _PYRO_STACK):
            return None  # the handlers around the next call may be different ones
        leaves, spec = pytree.tree_flatten((args, kwargs or {}))
        inputs: list[Tensor] = []
        static: list[Any] = []
        device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), None)
        for leaf in leaves:
            if isinstance(leaf, float):
                leaf = torch.tensor(leaf, device=device)  # an input, as it may be annealed
            (inputs if isinstance(leaf, Tensor) else static).append(leaf)
        if any(t.requires_grad for t in inputs) or any(isinstance(a, np.ndarray) for a in static):
            return None
        constants = tuple((type(a), a if isinstance(a, (bool, int, str, type(None))) else id(a)) for a in static)
        shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
        key = (model, guide, spec, shapes, constants)
        if key in self._refused:
            return None
        plans = self._plans.setdefault(key, [])
        self._plans.move_to_end(key)
        plan = next((plan for plan in plans if plan.holds()), None)
        return _Call(key, leaves, inputs, static, plan)

    def _replay(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict,
        weight: Tensor | None = None,
        generate_code: bool = True,
    ) -> tuple[LossAndGradients, list[str]] | None:
        """Loss, gradients and names of the parameters; None if Pyro must run as it is."""
        call = self.find(model, guide, args, kwargs)
        if call is None:
            return None
        device = call.inputs[0].device if call.inputs else None
        inputs = [*call.inputs, torch.ones((), device=device) if weight is None else weight]
        if call.plan is None:
            return self._record(call, inputs)
        graph = call.plan.graph
        self._recorded[call.key] = 0
        if self.backend == "inductor" and generate_code:
            graph.generate_code(*inputs)
        (loss, norm), gradients = graph(*inputs)
        return LossAndGradients(loss, norm, list(zip(graph.leaves, gradients, strict=True))), list(call.plan.stored)

    def _record(self, call: _Call, inputs: list[Tensor]) -> tuple[LossAndGradients, list[str]] | None:
        """Runs and records one call; its results are those of the call."""
        key, (model, guide, spec) = call.key, call.key[:3]
        plans = self._plans[key]
        if self._recorded.get(key, 0) >= self.cache_size:
            what = next((w for w in (plan.watch.changed() for plan in reversed(plans)) if w), "a parameter")
            self._refuse(key, f"{what} is another in each call; try a tensor, or an argument of the model")
            return None
        store = pyro.get_param_store()
        state, known = random_state(), set(store.keys())
        positions = [isinstance(leaf, (Tensor, float)) for leaf in call.leaves]

        def run(*inputs: Tensor) -> list[Tensor]:
            rest = {True: iter(inputs), False: iter(call.static)}
            args, kwargs = pytree.tree_unflatten([next(rest[p]) for p in positions], spec)
            with poutine.trace(param_only=True) as seen:
                if has_differentiable_loss(self.elbo):
                    # loss_and_grads skips parameters of plain modules, which Pyro's store does not hold
                    loss = self.elbo.differentiable_loss(model, guide, *args, **kwargs)
                    if isinstance(loss, Tensor) and loss.requires_grad:
                        loss.backward()
                        loss = loss.detach()
                else:
                    loss = self.elbo.loss_and_grads(model, guide, *args, **kwargs)
            stored.update({n: s["value"].unconstrained() for n, s in seen.trace.nodes.items() if s["type"] == "param"})
            if not isinstance(loss, Tensor):
                raise Untraceable(f"{type(self.elbo).__name__}.loss_and_grads returns a {type(loss).__name__}")
            return [loss]

        stored: dict[str, Tensor] = {}
        try:
            results, gradients, graph = record_gradients(run, *inputs[:-1], weight=inputs[-1])
        except Untraceable as error:
            set_random_state(state)
            self._refuse(key, str(error))
            return None
        if not gradients and not stored and not has_differentiable_loss(self.elbo):
            set_random_state(state)
            self._refuse(key, f"{type(self.elbo).__name__} sees no parameter in Pyro's store")
            return None
        if set(store.keys()) != known:  # the run made a parameter: record the next call, which finds it there
            set_random_state(state)
            return None
        watch = Watch(model, guide, self.elbo, *call.static)
        plans.append(_Plan(graph, watch, stored, call.static))
        self._recorded[key] = self._recorded.get(key, 0) + 1
        while sum(map(len, self._plans.values())) > self.cache_size:
            oldest = next(key for key, kept in self._plans.items() if kept)
            self._plans[oldest].pop(0)
        loss, norm = results
        return LossAndGradients(loss, norm, list(zip(graph.leaves, gradients, strict=True))), list(stored)

    def _refuse(self, key: tuple, reason: str) -> None:
        if not any(k[:2] == key[:2] for k in self._refused):
            warnings.warn(f"CompiledELBO: Pyro runs as it is, not compiled: {reason}.", stacklevel=5)
        self._refused.add(key)
        self._plans.pop(key, None)


class _Differentiable(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad * g for g in ctx.gradients)
