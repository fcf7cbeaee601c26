r"""`CompiledELBO`: any `pyro.infer.ELBO` of any model and guide as one compiled graph of loss and gradients.

People choose Pyro for what it can express. Each step of it costs milliseconds of Python, for effect handlers, sites and
one optimizer per parameter, and this Python does the same thing in every step. One run of it is therefore recorded
together with its backward pass (`recording.py`) and replayed from then on. A replay runs code that torch's inductor
generates, or one operation after the other. The latter gives exactly the floats that Pyro gives with the same random
numbers.

It is believed that a replay does what a run would do, for three reasons: the recorded run changed nothing of its own
(`attempt.py`); what it can have read is what it was (`plans.py`, `watch.py`); and plain Pyro agrees with replays now
and then (`audit.py`). If something has changed, the next call makes a new recording (`recordings.py`). Tensors are
inputs of the graph, in arguments and in closures, so these may change freely. Floats among the arguments become inputs
once they change.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_vae.arguments import check_choice, checked
from pyro_vae.compiled.audit import Diverged
from pyro_vae.compiled.plans import Call, Plan
from pyro_vae.compiled.recordings import LossAndGradients, Recordings
from pyro_vae.objectives.protocol import annealed
from pyro_vae.pairs.libraries import warn
from pyro_vae.pairs.modes import random_state, set_random_state
from pyro_vae.pairs.threads import one_thread

__all__ = ["CompiledELBO", "accumulate"]


class CompiledELBO(ELBO):
    r"""Any `pyro.infer.ELBO`, compiled: the same loss and gradients, without Pyro's Python in every step.

    A drop-in for `JitTrace_ELBO` and its siblings. It compiles `Trace_ELBO`, `TraceMeanField_ELBO`, `TraceGraph_ELBO`,
    `TraceEnum_ELBO`, `RenyiELBO` and the objectives of this package. The first call runs Pyro as it is, the second
    records, the third compiles (seconds), and all calls after these replay. Draws, subsamples of plates and
    score-function terms are recorded as operations, so what is random stays random.

    It is not silently wrong. A model that changes something itself in each run (a counter, an iterator, Python's random
    numbers) is left to Pyro, with one warning. Whatever else changes between calls leads to a new recording, as far as
    the model's code mentions it. What nobody can watch, such as a file, is found by audits: at the 2nd, 4th, 8th, …
    replay, and later at one of 200 to 1000, plain Pyro computes loss and gradients on the same random numbers. If they
    differ, a warning says so, and Pyro runs as it is from then on. A replay validates no values, as Pyro does in each
    run where validation is on: data outside of a support, or an assertion that fails, show in the next audit or never.

    A model that decides by values what to do next (`if`, `.item()`, numpy) has no graph. Pyro then runs as it is, and
    one warning names the place. (`torch.nn.functional.one_hot(y, C)` reads values; `torch.eye(C)[y]` does not.) Pyro
    also runs as it is for arguments that require a gradient, and where effect handlers surround the call.

    Args:
        elbo: the objective; default `Trace_ELBO()`.
        backend: "inductor" generates fused code; where it cannot, it says once what is missing and goes on like
            "eager". "eager" replays operation by operation: nothing has to be generated first, and the floats are those
            of Pyro under the same seed (in `TraceEnum_ELBO` up to the order of sums).
        cache_size: how many recordings of a pair are kept, for example for other shapes (a ragged last batch) or modes.
            Beyond that, one that has not been used for long is dropped. The first call of each shape is left to Pyro.

    Attributes:
        plans: the recordings in use.
        reasons: why Pyro runs as it is, where it does.

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

    @checked
    def __init__(self, elbo: ELBO | None = None, *, backend: str = "inductor", cache_size: int = 8) -> None:
        check_choice("backend", backend, ("inductor", "eager"))
        self.elbo = Trace_ELBO() if elbo is None else elbo
        self.backend, self.cache_size = backend, cache_size
        self._pairs: OrderedDict[tuple, Recordings] = OrderedDict()  # the most recently used last
        self._steps = 0

    def __getattr__(self, name: str) -> Any:
        if name == "elbo":  # before __init__, as in unpickling
            raise AttributeError(name)
        return getattr(self.elbo, name)  # num_particles and the like

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets `num_particles` and the like where they are read."""
        own = name in ("elbo", "backend", "cache_size") or name.startswith("_")
        object.__setattr__(self if own else self.elbo, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Without recordings: a copy makes its own."""
        return vars(self) | {"_pairs": OrderedDict()}

    @property
    def plans(self) -> list[Plan]:
        """The recordings in use, of all pairs."""
        return [plan for pair in self._pairs.values() for plan in pair.plans]

    @property
    def reasons(self) -> list[str]:
        """Why Pyro runs as it is, where it does: empty if all calls but the first ones are compiled."""
        return [reason for pair in self._pairs.values() for reason in pair.reasons]

    @one_thread
    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss alone, for evaluation. It is not compiled."""
        return self.elbo.loss(model, guide, *args, **kwargs)

    @one_thread
    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Returns the loss and adds its gradients to those of the parameters.

        It calls `pyro.param` for each parameter, as this is how `pyro.infer.SVI` learns which ones to step.
        """
        schedule = annealed(self.elbo)
        if schedule is not None:  # it moves between runs: a recording of the move would repeat it
            schedule.set_step(self._steps)
            self._steps += 1
        found = self._run("loss_and_grads", model, guide, args, kwargs)
        if found is None:
            return self.elbo.loss_and_grads(model, guide, *args, **kwargs)
        for leaf, gradient in found.gradients:
            accumulate(leaf, gradient)
        value = found.loss.item()
        warn_if_nan(value, "loss")
        return value

    @one_thread
    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a tensor that can be differentiated once, with respect to the parameters."""
        found = self._run("differentiable_loss", model, guide, args, kwargs)
        if found is None:
            return self.elbo.differentiable_loss(model, guide, *args, **kwargs)
        if not found.gradients:
            return found.loss
        leaves, values = zip(*found.gradients, strict=True)
        return _Differentiable.apply(found.loss.to(leaves[0].dtype), values, *leaves)

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple:
        return self.elbo._get_trace(model, guide, args, kwargs)

    def _run(self, method: str, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> LossAndGradients | None:
        """Loss and gradients, with `pyro.param` called for each parameter. None if Pyro must run as it is."""
        call = self.find(model, guide, args, kwargs, method)
        state = random_state()
        try:
            found = None if call is None else self.run(model, guide, call)
        except Diverged as error:
            set_random_state(state)
            warn(f"CompiledELBO: {error}.")
            return None
        if found is not None:
            store = pyro.get_param_store()
            for name in found.stored:
                if name in store:  # not the parameters of modules that keep theirs to themselves
                    pyro.param(name)
        return found

    # -- for who takes the steps, as `fit` does -----------------------------------------------------------------------

    def find(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict[str, Any] | None = None,
        method: str | None = None,
    ) -> Call | None:
        """The call, with its recording if there is one. None if Pyro must run as it is.

        Args:
            model: the model.
            guide: the guide.
            args: what both are called with.
            kwargs: the same, by name.
            method: of the objective, "differentiable_loss" or "loss_and_grads"; default: the first where it has one.
                The second skips parameters of modules that Pyro's store does not know, if it knows of no others.
        """
        if not torch.is_grad_enabled() or any(not isinstance(handler, TraceMessenger) for handler in _PYRO_STACK):
            return None  # the next call may have other handlers around it
        return self._pair(model, guide).find(method, args, kwargs or {})

    def run(
        self, model: Callable, guide: Callable, call: Call, weight: Tensor | None = None, *, generate_code: bool = True
    ) -> LossAndGradients | None:
        """The loss, and the gradients of weight × loss. `.grad` stays as it is. None if Pyro must run as it is.

        Args:
            model: the model.
            guide: the guide.
            call: of both, as found.
            weight: the factor of the loss in the gradients, 0-dim; default: one.
            generate_code: False where these shapes are too rare to be worth generated code.

        Raises:
            Diverged: an audit found another loss than plain Pyro's.
        """
        device = call.inputs[0].device if call.inputs else None
        inputs = [*call.inputs, torch.ones((), device=device) if weight is None else weight]
        plan = call.plan
        if plan is None:
            return self._pair(model, guide).record(call, inputs)
        graph = plan.graph
        if self.backend == "inductor" and generate_code and plan.pays:
            graph.generate_code(*inputs)

        def replay() -> LossAndGradients:
            (loss, norm), gradients = graph(*inputs)
            return LossAndGradients(loss, norm, list(zip(graph.leaves, gradients, strict=True)), list(plan.stored))

        return plan.audit.replay(replay, call.args, call.kwargs, inputs, fused=graph.generated)

    def _pair(self, model: Callable, guide: Callable) -> Recordings:
        """The recordings of a pair."""
        key = (_identity(model), _identity(guide), id(self.elbo))
        if key not in self._pairs:
            self._pairs[key] = Recordings(model, guide, self.elbo, self.cache_size)
        self._pairs.move_to_end(key)
        while len(self._pairs) > self.cache_size:
            self._pairs.popitem(last=False)
        return self._pairs[key]


def _identity(function: Callable) -> tuple[int, ...]:
    """What tells functions apart: they may be unhashable, and a bound method is another object in each call."""
    if isinstance(function, MethodType):
        return id(function.__self__), id(function.__func__)
    return (id(function),)


def accumulate(leaf: Tensor, gradient: Tensor) -> None:
    """Adds a gradient to that of a leaf, as a backward pass would, and calls the hooks that wait for it."""
    leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
    for hook in (leaf._post_accumulate_grad_hooks or {}).values():
        hook(leaf)


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
