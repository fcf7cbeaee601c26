r"""`CompiledELBO`: any `pyro.infer.ELBO` of any model and guide as one compiled graph of loss and gradients.

People choose Pyro for what it can express. Each step of it costs milliseconds of Python, for effect handlers, sites and
one optimizer per parameter, and this Python does the same thing in every step. One run of it is therefore recorded
together with its backward pass (`recording.py`) and replayed from then on. A replay runs code that torch's inductor
generates, or one operation after the other. The latter gives exactly the floats that Pyro gives with the same random
numbers.

A recording holds as long as what it was made from stays the same (`plans.py`, `watch.py`): shapes, dtypes and devices
of the arguments, training or evaluation mode, which parameters exist, and every number in a closure, a global or an
attribute. If one of these changes, the next call makes a new recording. Arguments that are tensors or floats are inputs
of the graph, as are tensors in closures, so these may change freely: annealing one of them needs no new recording.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_vae.compiled.plans import Call, Plan, call_of
from pyro_vae.compiled.recording import Untraceable, record_gradients
from pyro_vae.compiled.watch import Watch
from pyro_vae.objectives.protocol import annealed, has_differentiable_loss
from pyro_vae.pairs.modes import random_state, set_random_state

__all__ = ["CompiledELBO", "LossAndGradients"]


class LossAndGradients(NamedTuple):
    """What one step of an optimizer needs.

    Attributes:
        loss: the loss that the ELBO reports, 0-dim.
        norm: the norm of all gradients together, 0-dim.
        gradients: pairs (leaf tensor, gradient of the weighted loss).
    """

    loss: Tensor
    norm: Tensor
    gradients: list[tuple[Tensor, Tensor]]


class CompiledELBO(ELBO):
    r"""Any `pyro.infer.ELBO`, compiled: the same loss and gradients, without Pyro's Python in every step.

    A drop-in for `JitTrace_ELBO` and its siblings. It compiles `Trace_ELBO`, `TraceMeanField_ELBO`, `TraceGraph_ELBO`,
    `TraceEnum_ELBO`, `RenyiELBO` and the objectives of this package. The first call runs Pyro as it is, the second
    records, the third compiles (seconds), and all calls after these replay. Draws, subsamples of plates and
    score-function terms are recorded as operations, so what is random stays random.

    A model that decides by values what to do next (`if`, `.item()`, numpy) has no graph. Pyro then runs as it is, and
    one warning names the place. (`torch.nn.functional.one_hot(y, C)` reads values; `torch.eye(C)[y]` does not.) Pyro
    also runs as it is for arguments that require a gradient, and where effect handlers surround the call.

    Args:
        elbo: the objective; default `Trace_ELBO()`.
        backend: "inductor" generates fused code; where it cannot, it says once what is missing and goes on like
            "eager". "eager" replays operation by operation: nothing has to be generated first, and the floats are those
            of Pyro under the same seed.
        cache_size: how many recordings are kept, for example for other shapes (a ragged last batch) or modes. Beyond
            that, the one that has not been used for longest is dropped.

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
        >>> pyro.param("loc").detach().round() + 0.0  # that of the exact posterior, x/2
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
        self._plans: OrderedDict[tuple, list[Plan]] = OrderedDict()  # by signature, the most recently used last
        self._met: set[tuple] = set()  # pairs that have run once, so that their parameters exist
        self._recorded: dict[tuple, int] = {}  # how often a signature was recorded since its last replay
        self._refused: set[tuple] = set()  # signatures for which Pyro runs as it is
        self._steps = count()

    def __getattr__(self, name: str) -> Any:
        if name == "elbo":  # before __init__, as in unpickling
            raise AttributeError(name)
        return getattr(self.elbo, name)  # num_particles and the like

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss alone, for evaluation. It is not compiled."""
        return self.elbo.loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Returns the loss and adds its gradients to those of the parameters.

        It calls `pyro.param` for each parameter, as this is how `pyro.infer.SVI` learns which ones to step.
        """
        schedule = annealed(self.elbo)
        if schedule is not None:  # it moves between runs: a recording of the move would repeat it
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
        """The loss as a tensor that can be differentiated once, with respect to the parameters."""
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
        """The loss, and the gradients of weight × loss. `.grad` stays as it is. None if the call has no graph.

        Args:
            model: the model.
            guide: the guide.
            args: what both are called with.
            weight: the factor of the loss in the gradients, 0-dim.
            generate_code: False where these shapes are too rare to be worth generated code.
        """
        found = self._replay(model, guide, args, {}, weight, generate_code)
        return None if found is None else found[0]

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple:
        return self.elbo._get_trace(model, guide, args, kwargs)

    # -- recordings ---------------------------------------------------------------------------------------------------

    def find(self, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any] | None = None) -> Call | None:
        """The call with its recording, if there is one. None if Pyro must run as it is."""
        if (model, guide) not in self._met:
            self._met.add((model, guide))
            return None
        if any(not isinstance(handler, TraceMessenger) for handler in _PYRO_STACK):
            return None  # the next call may have other handlers around it
        call = call_of(model, guide, args, kwargs or {})
        if call is None or call.key in self._refused:
            return None
        plans = self._plans.setdefault(call.key, [])
        self._plans.move_to_end(call.key)
        return call._replace(plan=next((plan for plan in plans if plan.holds()), None))

    def _replay(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict,
        weight: Tensor | None = None,
        generate_code: bool = True,
    ) -> tuple[LossAndGradients, list[str]] | None:
        """Loss, gradients and the names of the parameters. None if Pyro must run as it is."""
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

    def _record(self, call: Call, inputs: list[Tensor]) -> tuple[LossAndGradients, list[str]] | None:
        """Records one call. The results of the recorded run are those of the call."""
        key, (model, guide) = call.key, call.key[:2]
        plans = self._plans[key]
        if self._recorded.get(key, 0) >= self.cache_size:
            what = next((w for w in (plan.watch.changed() for plan in reversed(plans)) if w), "a parameter")
            self._refuse(key, f"{what} is another in each call; try a tensor, or an argument of the model")
            return None
        store = pyro.get_param_store()
        state, known = random_state(), set(store.keys())
        stored: dict[str, Tensor] = {}
        try:
            results, gradients, graph = record_gradients(self._run_of(call, stored), *inputs[:-1], weight=inputs[-1])
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
        plans.append(Plan(graph, Watch(model, guide, self.elbo, *call.static), stored, call.static))
        self._recorded[key] = self._recorded.get(key, 0) + 1
        while sum(map(len, self._plans.values())) > self.cache_size:
            oldest = next(key for key, kept in self._plans.items() if kept)
            self._plans[oldest].pop(0)
        loss, norm = results
        return LossAndGradients(loss, norm, list(zip(graph.leaves, gradients, strict=True))), list(stored)

    def _run_of(self, call: Call, stored: dict[str, Tensor]) -> Callable[..., list[Tensor]]:
        """The function of a call's inputs that is recorded. Its run puts parameters of Pyro's store into `stored`."""
        model, guide = call.key[:2]

        def run(*inputs: Tensor) -> list[Tensor]:
            args, kwargs = call.arguments(inputs)
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

        return run

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
