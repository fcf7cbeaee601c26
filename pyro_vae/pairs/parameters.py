"""Which parameters and modules take part in a pair: those that Pyro knows, that are called, or that are reached.

What the log-probabilities of a run depend on is found in their autograd graph, so that a tensor takes part wherever it
is kept: in an `nn.ParameterList`, in a child whose weight is used without the child being called, in a closure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.pairs.modes import evaluation_mode, fork_random_state, owners
from pyro_vae.pairs.sites import sample_sites, site_log_prob
from pyro_vae.pairs.untouched import Untouched

__all__ = ["Participants", "graph_leaves", "participants"]


class Participants(NamedTuple):
    """What takes part in a pair.

    Attributes:
        parameters: {name: tensor}, each once, all that require a gradient.
        modules: those that were called, and the owners of model and guide.
        frozen: {name: tensor}, the other parameters of these modules, and of Pyro's store where the pair uses them.
    """

    parameters: dict[str, Tensor]
    modules: list[nn.Module]
    frozen: dict[str, Tensor]


def participants(model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Participants:
    """Runs a pair that is set up, as a step of its training would, and notes what it uses; changes nothing.

    Raises:
        ValueError: the store holds another tensor under a name than the module that is called, or nothing requires a
            gradient.
    """
    modules = {id(m): m for m in owners(model, guide)}
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda m, _: modules.update({id(m): m}))
    try:
        with (
            fork_random_state(),
            torch.enable_grad(),
            Untouched(model, guide),
            evaluation_mode(model, guide),
            pyro.validation_enabled(False),  # what is not finite is reported later, with its row
        ):
            for _ in range(2):  # the first run may settle a clash: pyro.module(…, update_module_params=True)
                with _Registrations() as seen:
                    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
                    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args, **kwargs)
                    reached = graph_leaves(*_log_probs(guide_trace), *_log_probs(model_trace))
    finally:
        hook.remove()
    if seen.clash is not None:
        raise ValueError(
            f"Pyro's parameter store holds another tensor under {seen.clash!r} than the module that is called, which "
            "would never train. Try pyro.clear_param_store() before a second model, or another name for it."
        )
    names = {id(p): name for module in modules.values() for name, p in module.named_parameters()}
    names |= {id(p): name for name, p in seen.parameters.items()}
    own = [p for module in modules.values() for p in module.parameters(recurse=False)]
    tensors = {id(t): t for t in (*own, *seen.parameters.values(), *reached) if t.requires_grad}
    if not tensors:
        raise ValueError("nothing to train: model and guide use no parameter that requires a gradient.")
    every = [p for module in modules.values() for p in module.parameters()]
    others = {id(t): t for t in (*every, *seen.parameters.values()) if id(t) not in tensors}
    return Participants(_named(tensors, names), list(modules.values()), _named(others, names))


def _named(tensors: dict[int, Tensor], names: dict[int, str]) -> dict[str, Tensor]:
    """{name: tensor} of {id: tensor}."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = names.get(key, f"a tensor of shape {tuple(tensor.shape)}")
        found[name if name not in found else f"{name} ({len(found)})"] = tensor
    return found


def graph_leaves(*tensors: Tensor) -> list[Tensor]:
    """The leaves that a backward pass from these tensors would give a gradient to, in the order it comes to them."""
    leaves: list[Tensor] = []
    seen: set[Any] = set()
    left = [t.grad_fn for t in reversed(tensors)]
    leaves += [t for t in tensors if t.grad_fn is None and t.requires_grad]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        left.extend(n for n, _ in reversed(node.next_functions))
    return leaves


def _log_probs(trace: poutine.Trace) -> list[Tensor]:
    found = []
    for site in sample_sites(trace).values():
        with suppress(NotImplementedError):  # a flow without an inverse; its modules were called
            found.append(site_log_prob(site))
    return found


class _Registrations(Messenger):
    """Collects the parameters that pass through `pyro.param`, and notes a name that holds somebody else's tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[str, Tensor] = {}
        self.clash: str | None = None

    def _pyro_post_param(self, msg: dict) -> None:
        value = msg["value"]
        unconstrained = getattr(value, "unconstrained", None)
        if hasattr(value, "_pyro_unconstrained_param"):  # the rows of one that a plate subsamples
            value = value._pyro_unconstrained_param
        elif unconstrained is not None:
            value = unconstrained()
        self.parameters[msg["name"]] = value
        own = msg["args"][1] if len(msg["args"]) > 1 else None
        if isinstance(own, nn.Parameter) and own is not value:
            self.clash = msg["name"]
