r"""Rewrites a graph so that it does less work outside of its matrix products.

- A bias is added where the sum is used, instead of being copied into the result of the product beforehand.
- The sum of Bernoulli log-likelihoods over D pixels with logits l takes D exponentials and only D/G logarithms,

      Σ_d log p(x_d|l_d) = Σ_d (x_d l_d − max(l_d, 0)) − Σ_groups log Π_{d in group} (1 + exp(−|l_d|)),

  with groups of G ≤ 100 pixels. A product of so many factors in (1, 2] is at most 2¹⁰⁰, and its logarithm is no less
  exact than the sum of their logarithms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph as Nodes
from torch.fx import GraphModule, Node

__all__ = ["rewrite"]

aten = torch.ops.aten


def rewrite(module: GraphModule) -> None:
    """Applies both rewritings in place."""
    nodes = module.graph
    for node in list(nodes.nodes):
        if node.target is aten.addmm.default and not node.kwargs:
            bias, x, weight = node.args
            shape = list(node.meta["val"].shape)
            with nodes.inserting_before(node):
                # in one dimension more, as inductor would turn a plain sum into addmm again
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
    """Rewrites sum(view(neg(cross entropy)), −1), the form in which Pyro sums Bernoulli log-likelihoods."""
    path = [node]
    for target in (aten.neg.default, aten.view.default, aten.sum.dim_IntList):
        users = list(path[-1].users)
        if len(users) != 1 or users[0].target is not target:
            return
        path.append(users[0])
    _, _, view, total = path
    logits, x, *options = node.args
    dims: Any = total.args[1]
    if options not in ([], [None, None, 0]) or node.kwargs or list(dims) != [-1] or len(total.args) > 2:
        return
    shape = list(view.meta["val"].shape)
    size = shape[-1]
    group = max(g for g in range(1, 101) if size % g == 0)

    def call(target: Any, *args: Any) -> Node:
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
