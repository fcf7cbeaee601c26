r"""Recording: running a function of tensors once turns it into one graph of tensor operations.

The function runs as it is, effect handlers and all, while `torch.fx`'s `make_fx` writes down which operations it asks
for. Replaying these costs none of the function's Python, and a code-generating backend can fuse them. What was a tensor
before the run (parameters, buffers, constants in closures) is an input of the graph, looked at anew in every replay;
draws are drawn anew; all else is as it was in the recorded run. Where values decide what is done next there is no such
graph: `Untraceable`, with the place.

The backward pass is recorded along, as gradients of the leaves that it reaches.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pyro_vae.compiled.codegen import generate
from pyro_vae.pairs.modes import recording
from pyro_vae.pairs.parameters import graph_leaves

__all__ = ["Graph", "Untraceable", "record", "record_gradients"]

# Pyro reads losses only to report them, and asks for NaN only to warn; neither changes what it does next
READS_LOSSES = ("pyro.infer.", "pyro.distributions.util")
ASKS_FOR_NAN = ("pyro.util", "pyro.infer.util", "pyro.distributions.util")
READS_VALUES = (Tensor.numpy, Tensor.tolist, Tensor.__array__)
SELECTS = (Tensor.__getitem__, Tensor.__setitem__)
COUNTS = (torch.nonzero, Tensor.nonzero, torch.masked_select, Tensor.masked_select, torch.unique, Tensor.unique)


class Untraceable(RuntimeError):
    """The function has no graph: what it does next depends on values."""


class Graph:
    """A recorded function of tensors. Call it with the same number of tensors, of the same shapes.

    Args:
        module: the graph; its inputs are `tensors`, then the function's own.
        tensors: what the function read beside its arguments, alive.
        leaves: those of them whose gradients come after the function's results.
        num_results: how many tensors the function returns.

    Attributes:
        generated: whether code has been asked for.
    """

    def __init__(self, module: GraphModule, tensors: list[Tensor], leaves: list[Tensor], num_results: int) -> None:
        self.module, self.tensors, self.leaves, self.num_results = module, tensors, leaves, num_results
        self.generated = False
        self._run: Callable = module.forward

    def __call__(self, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Results, and the gradients of `leaves`."""
        with torch.no_grad():
            outputs = self._run(*self.tensors, *inputs)
        return list(outputs[: self.num_results]), list(outputs[self.num_results :])

    def generate_code(self, *inputs: Tensor) -> None:
        """Switches to code that torch's inductor generates, if it can. `inputs` are examples."""
        if not self.generated:
            self.generated = True
            self._run = generate(self.module, self.tensors, list(inputs))


def record(function: Callable, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor], Graph]:
    """Runs a function of tensors once and records it together with its backward pass.

    Args:
        function: returns a list of tensors; it may call `Tensor.backward`, whose gradients are recorded instead of
            added to those of the leaves.
        *inputs: its arguments.

    Returns:
        what the function returned, the gradients, and its `Graph`.

    Raises:
        Untraceable: naming the place.
    """
    return _record(function, inputs, None)


def record_gradients(function: Callable, *inputs: Tensor, weight: Tensor) -> tuple[list[Tensor], list[Tensor], Graph]:
    """Like `record`, but `backward` differentiates weight × tensor, and the norm of all gradients is the last result.

    `weight` (0-dim) is the last input of the graph.
    """
    return _record(function, (*inputs, weight), weight)


def _record(
    function: Callable, inputs: tuple[Tensor, ...], weight: Tensor | None
) -> tuple[list[Tensor], list[Tensor], Graph]:
    handler = _Handler()
    values: list[Tensor] = []
    num_results = 0

    def recorded(*inputs: Tensor) -> list[Tensor]:
        nonlocal num_results
        own = inputs
        if weight is not None:
            own, handler.weight = inputs[:-1], inputs[-1]
        with handler:
            results = list(function(*own))
        gradients = list(handler.gradients.values())
        if weight is not None:
            norms = [torch.linalg.vector_norm(g) for g in gradients]
            results.append(torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(()))
        num_results = len(results)
        values.extend(t.detach() for t in (*results, *gradients))
        return [*results, *gradients]

    try:
        with recording(), pyro.validation_enabled(False):
            module = make_fx(recorded)(*inputs)
    except Exception as error:
        raise Untraceable(_place(error)) from error
    tensors, leaves = _lift(module), list(handler.gradients)
    if not all(isinstance(t, Tensor) for t in tensors):
        raise Untraceable("it draws from a random generator of its own")
    known = {id(t) for t in tensors}
    if any(t.requires_grad and not t.is_leaf for t in tensors):
        raise Untraceable("a tensor that was computed outside of the function requires a gradient")
    if any(id(leaf) not in known for leaf in leaves):
        raise Untraceable("a parameter is made in each call")
    module.graph.eliminate_dead_code()  # draws are kept even if unused, so that random numbers stay in step
    module.recompile()
    return values[:num_results], values[num_results:], Graph(module, tensors, leaves, num_results)


def _lift(module: GraphModule) -> list[Tensor]:
    """Turns the tensors that a graph holds into its first inputs and returns them."""
    graph = module.graph
    lifted: dict[int, tuple[Tensor, Node]] = {}
    first = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node.op == "get_attr":
            tensor = getattr(module, node.target)
            if id(tensor) not in lifted:
                with graph.inserting_before(first):
                    lifted[id(tensor)] = tensor, graph.placeholder(f"tensor_{len(lifted)}")
            node.replace_all_uses_with(lifted[id(tensor)][1])
            graph.erase_node(node)
    return [tensor for tensor, _ in lifted.values()]


class _Handler(TorchFunctionMode):
    """Handles the operations that a recorded run must not perform as usual.

    Attributes:
        gradients: {leaf: gradient} of every `Tensor.backward`.
        weight: of every `Tensor.backward`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gradients: dict[Tensor, Tensor] = {}
        self.weight: Tensor | None = None
        self._made: dict[int, Tensor] = {}  # leaves that the function makes for itself: their gradients are not wanted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            kwargs = {name: value for name, value in (kwargs or {}).items() if name != "inputs"}
            return self._backward(*args, **kwargs)
        if func is Tensor.item and _caller().startswith(READS_LOSSES):
            return args[0].detach().double()  # Pyro adds these as Python's floats
        if func is Tensor.__bool__ and _caller() in ASKS_FOR_NAN:
            return False
        if func is Tensor.register_hook and getattr(args[1], "__module__", "") in ASKS_FOR_NAN:
            return None
        if (
            func is Tensor.masked_select and _caller() == "pyro.infer.util"
        ):  # the factors are summed: a zero instead of a gap does not change that
            return torch.where(args[1], args[0], 0).reshape(-1)
        if func is Tensor.requires_grad_:
            self._made[id(args[0])] = args[0]
        if func in READS_VALUES:
            raise Untraceable(f"{func.__name__} reads a value")
        by_mask = func in SELECTS and any(
            isinstance(t, Tensor) and t.dtype == torch.bool for t in pytree.tree_leaves(args[1])
        )
        if by_mask or func in COUNTS:
            raise Untraceable("how many elements are selected may be another number in each call")
        return func(*args, **(kwargs or {}))

    def _backward(
        self, loss: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: Any = False
    ) -> None:
        leaves = [leaf for leaf in graph_leaves(loss) if id(leaf) not in self._made]
        if not leaves:
            return
        if self.weight is not None and gradient is None:
            gradient = self.weight.to(loss)
        found = torch.autograd.grad(loss, leaves, gradient, retain_graph, create_graph, allow_unused=True)
        for leaf, grad in zip(leaves, found, strict=True):
            if grad is not None:
                self.gradients[leaf] = self.gradients[leaf] + grad if leaf in self.gradients else grad


def _caller() -> str:
    """Name of the module whose code called the torch function that is being handled."""
    return sys._getframe(2).f_globals.get("__name__", "")


def _place(error: BaseException) -> str:
    """The last line of a user's code on the way to an error, or the last of all."""
    steps = zip(traceback.walk_tb(error.__traceback__), traceback.extract_tb(error.__traceback__), strict=True)
    frames = [(frame.f_globals.get("__name__", ""), line) for (frame, _), line in steps]
    frames = [(module.partition(".")[0], line) for module, line in frames if not line.filename.startswith("<")]
    libraries = ["torch", __name__.partition(".")[0], "pyro"]
    outside = [[line for package, line in frames if package not in libraries[:n]] for n in (3, 2, 1, 0)]
    where = next(found for found in outside if found)[-1]
    if "value out of a tracing tensor" in str(error):
        return f"{where.filename}:{where.lineno}: {where.line} (a value is read here)"
    reason = str(error).strip().partition("\n")[0]
    return f"{where.filename}:{where.lineno}: {where.line} ({type(error).__name__}: {reason[:200]})"
