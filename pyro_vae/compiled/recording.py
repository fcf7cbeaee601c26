r"""Recording: one run of a function of tensors becomes one graph of tensor operations.

The function runs as it is, effect handlers and all, while `make_fx` of `torch.fx` writes down the operations that it
asks for. A replay of these costs none of the function's Python, and generated code can fuse them.

- Tensors that existed before the run (parameters, buffers, constants in closures) are inputs of the graph: each replay
  reads their present values.
- Random draws are operations of the graph: each replay draws anew.
- Everything else stays what it was in the recorded run.
- The backward pass is recorded too. It gives the gradients of the leaves that it reaches.

A function that decides by values what to do next has no such graph. `Untraceable` then names the place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.compiled.codegen import generate
from pyro_vae.compiled.handler import Handler
from pyro_vae.compiled.untraceable import Untraceable, place
from pyro_vae.pairs.modes import recording

__all__ = ["Graph", "Untraceable", "record", "record_gradients"]


class Graph:
    """A recorded function of tensors. Call it with as many tensors as were recorded, of the same shapes.

    Args:
        module: the graph. Its inputs are `tensors`, then those of the function.
        tensors: what the function read besides its arguments. They are kept alive, and read in each call.
        leaves: those of `tensors` that have gradients. The graph returns these after the function's results.
        num_results: how many tensors the function returns.
        reads: (function, tensor, value): what the run has read from tensors, and kept as numbers.

    Attributes:
        generated: whether `generate_code` has been called.
    """

    def __init__(
        self,
        module: GraphModule,
        tensors: list[Tensor],
        leaves: list[Tensor],
        num_results: int,
        reads: Sequence[tuple[Callable, Tensor, Any]] = (),
    ) -> None:
        self.module, self.tensors, self.leaves, self.num_results = module, tensors, leaves, num_results
        self.reads = reads
        self.generated = False
        self._run: Callable = module.forward

    def __call__(self, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the function's results, and the gradients of `leaves`."""
        return self._replay(self._run, inputs)

    def by_operation(self, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """As a call, but one operation after the other, also where there is generated code."""
        return self._replay(self.module.forward, inputs)

    def _replay(self, run: Callable, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        with torch.no_grad():
            outputs = run(*self.tensors, *inputs)
        return list(outputs[: self.num_results]), list(outputs[self.num_results :])

    def reads_the_same(self) -> bool:
        """Whether the values that the run has read are what they were."""
        return all(function(tensor) == value for function, tensor, value in self.reads)

    def generate_code(self, *inputs: Tensor) -> None:
        """Goes on with code that torch's inductor generates, if it can. `inputs` are examples."""
        if not self.generated:
            self.generated = True
            self._run = generate(self.module, self.tensors, list(inputs))


def record(function: Callable, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor], Graph]:
    """Runs a function of tensors once and records it together with its backward pass.

    Args:
        function: returns a list of tensors. It may call `Tensor.backward`; the gradients are then recorded, and not
            added to the `.grad` of the leaves.
        *inputs: its arguments.

    Returns:
        What the function returned, the gradients, and the function's `Graph`.

    Raises:
        Untraceable: the function has no graph. The message names the place.
    """
    return _record(function, inputs, None)


def record_gradients(function: Callable, *inputs: Tensor, weight: Tensor) -> tuple[list[Tensor], list[Tensor], Graph]:
    """Like `record`, but `Tensor.backward` differentiates weight × tensor, and one more result is the gradients' norm.

    `weight` (0-dim) is the last input of the graph. The norm is that of all gradients together.
    """
    return _record(function, (*inputs, weight), weight)


def _record(
    function: Callable, inputs: tuple[Tensor, ...], weight: Tensor | None
) -> tuple[list[Tensor], list[Tensor], Graph]:
    handler = Handler()
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
        raise Untraceable(place(error)) from error
    tensors, leaves = _lift(module), list(handler.gradients)
    if not all(isinstance(t, Tensor) for t in tensors):
        raise Untraceable("it draws from a random generator of its own")
    known = {id(t) for t in tensors}
    if any(t.requires_grad and not t.is_leaf for t in tensors):
        raise Untraceable("a tensor that was computed outside of the function requires a gradient")
    if any(id(leaf) not in known for leaf in leaves):
        raise Untraceable("a parameter is made in each call")
    module.graph.eliminate_dead_code()  # it keeps unused draws, so that later ones get the same random numbers
    module.recompile()
    return values[:num_results], values[num_results:], Graph(module, tensors, leaves, num_results, handler.reads)


def _lift(module: GraphModule) -> list[Tensor]:
    """Makes the tensors that a graph holds its first inputs, and returns them."""
    graph = module.graph
    lifted: dict[int, tuple[Tensor, Node]] = {}
    first = next(node for node in graph.nodes if node.op != "get_attr")  # those are erased, and nothing stands at them
    for node in list(graph.nodes):
        if node.op == "get_attr":
            tensor = getattr(module, node.target)
            if id(tensor) not in lifted:
                with graph.inserting_before(first):
                    lifted[id(tensor)] = tensor, graph.placeholder(f"tensor_{len(lifted)}")
            node.replace_all_uses_with(lifted[id(tensor)][1])
            graph.erase_node(node)
    return [tensor for tensor, _ in lifted.values()]
