r"""The evidence kernel: log-weights of new particles for some rows as one compiled graph.

What `ParticleSampler.log_weight` does (guide, model, log-probabilities, their sum over event and inner plates) is
recorded once for a number of particles and of rows, and replayed for all other rows. On the way to generated code two
rewritings spare what the matrix products do not cost:

- a bias is added where its sum is used, not copied into the product's result beforehand;
- the sum of Bernoulli log-likelihoods over D pixels with logits l takes D exponentials and D/G logarithms,

      Σ_d log p(x_d|l_d) = Σ_d (x_d l_d − max(l_d, 0)) − Σ_groups log Π_{d in group} (1 + exp(−|l_d|)),

  with groups of G ≤ 100: a product of so many factors in (1, 2] is at most 2¹⁰⁰, and no less exact than their logs.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.fx import Graph as Nodes
from torch.fx import GraphModule, Node

from pyro_vae.graphs import Graph, Untraceable, record
from pyro_vae.particles import ParticleSampler
from pyro_vae.traces import random_state, set_random_state

__all__ = ["CompiledLogWeight", "compiled_log_weight"]

aten = torch.ops.aten


def compiled_log_weight(sampler: ParticleSampler, compile: bool | str, passes: int) -> CompiledLogWeight | None:
    """What draws log-weights: by the number of passes, not by their time, so that a seed gives the same numbers again.

    Args:
        sampler: of the pair.
        compile: True, False, or "auto": Pyro as it is for less than 30 passes, its operations recorded for less than
            1000, beyond that through generated code.
        passes: how many are to come.
    """
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile: expected True, False or 'auto', got {compile!r}.")
    if sampler.layout.fixed is not None or not compile or (compile == "auto" and passes < 30):
        return None
    return CompiledLogWeight(sampler, generate_code=compile is True or passes >= 1000)


class CompiledLogWeight:
    """`sampler.log_weight`, recorded for each number of rows; code is generated for the first of these.

    Passes are to be of about the same size: where a few particles less are asked for, the others are thrown away.

    Args:
        sampler: of a pair whose rows can be told apart, or that has all in one pass.
        generate_code: go on with generated code.
    """

    def __init__(self, sampler: ParticleSampler, *, generate_code: bool) -> None:
        self.sampler, self.generate_code = sampler, generate_code
        self._graphs: dict[int, tuple[int, Graph]] = {}  # {rows: (particles, graph)}
        self._refused = False

    def __call__(self, num_particles: int, rows: slice) -> Tensor:
        """log w, (K, rows), nats; data that are not finite or not in support are not looked for."""
        if self._refused:
            return self.sampler.log_weight(num_particles, rows, check=False)
        layout, size = self.sampler.layout, rows.stop - rows.start
        args, kwargs = layout.cut(rows)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        recorded, graph = self._graphs.get(size, (0, None))
        if recorded >= num_particles:
            if self.generate_code and size == next(iter(self._graphs)):
                graph.generate_code(*tensors)
            return graph(*tensors)[0][0][:num_particles]

        def log_weight(*tensors: Tensor) -> list[Tensor]:
            left = iter(tensors)
            replaced = [next(left) if isinstance(a, Tensor) else a for a in (*args, *kwargs.values())]
            with layout.using(tuple(replaced[: len(args)]), dict(zip(kwargs, replaced[len(args) :], strict=True))):
                return [self.sampler.log_weight(num_particles, rows, check=False)]

        state = random_state()
        try:
            (value,), _, graph = record(log_weight, *tensors)
        except Untraceable as error:
            warnings.warn(f"Pyro runs as it is, not compiled: {error}. compile=False says so beforehand.", stacklevel=6)
            set_random_state(state)
            self._refused = True
            return self.sampler.log_weight(num_particles, rows, check=False)
        if self.generate_code:
            rewrite(graph.module)
        self._graphs[size] = num_particles, graph
        return value


def rewrite(module: GraphModule) -> None:
    """The two rewritings at the top of this file."""
    nodes = module.graph
    for node in list(nodes.nodes):
        if node.target is aten.addmm.default and not node.kwargs:
            bias, x, weight = node.args
            shape = list(node.meta["val"].shape)
            with nodes.inserting_before(node):
                # a dimension more, or inductor makes it addmm again
                product = nodes.call_function(
                    aten.view.default, (nodes.call_function(aten.mm.default, (x, weight)), [1, *shape])
                )
                total = nodes.call_function(aten.add.Tensor, (product, bias))
                node.replace_all_uses_with(nodes.call_function(aten.view.default, (total, shape)))
            nodes.erase_node(node)
        elif node.target is aten.binary_cross_entropy_with_logits.default:
            _sum_bernoulli(nodes, node)
    nodes.lint()
    module.recompile()


def _sum_bernoulli(nodes: Nodes, node: Node) -> None:
    """Rewrites sum(view(neg(cross entropy)), −1), as Pyro asks for it."""
    path = [node]
    for target in (aten.neg.default, aten.view.default, aten.sum.dim_IntList):
        users = list(path[-1].users)
        if len(users) != 1 or users[0].target is not target:
            return
        path.append(users[0])
    _, _, view, total = path
    logits, x, *options = node.args
    if options not in ([], [None, None, 0]) or node.kwargs or list(total.args[1]) != [-1] or len(total.args) > 2:
        return
    shape = list(view.meta["val"].shape)
    size = shape[-1]
    group = max(g for g in range(1, 101) if size % g == 0)

    def call(target: object, *args: object) -> Node:
        return nodes.call_function(target, args)

    with nodes.inserting_before(total):
        logits, x = (call(aten.reshape.default, t, shape) for t in (logits, x))
        linear = call(aten.sub.Tensor, call(aten.mul.Tensor, x, logits), call(aten.clamp_min.default, logits, 0))
        small = call(aten.exp.default, call(aten.neg.default, call(aten.abs.default, logits)))
        factors = call(aten.reshape.default, call(aten.add.Tensor, small, 1), [*shape[:-1], size // group, group])
        logs = call(aten.log.default, call(aten.prod.dim_int, factors, -1))
        sums = [call(aten.sum.dim_IntList, t, [-1]) for t in (linear, logs)]
        total.replace_all_uses_with(call(aten.sub.Tensor, *sums))
    for old in reversed(path):
        nodes.erase_node(old)
