"""The arguments that a model was called with, as `constant_data`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn

from pyro_vae.integrations.arviz_groups import Groups

__all__ = ["called_with", "named_tensors", "observed_arguments", "put_constants"]


def called_with(predictions: Any) -> tuple[tuple, dict]:
    """(args, kwargs) of new data: a tuple has positional arguments, a mapping those by name, another one is the only
    one."""
    if isinstance(predictions, Mapping):
        return (), dict(predictions)
    return (predictions if isinstance(predictions, tuple) else (predictions,)), {}


def put_constants(
    groups: Groups,
    group: str,
    model: Callable,
    arguments: tuple[tuple, Mapping[str, Any]],
    plates: Mapping[str, int],
    skip: Collection[str],
) -> None:
    """Stores the tensors that a model is called with, by the names of its parameters.

    Args:
        groups: where to.
        group: "constant_data" or "predictions_constant_data".
        model: the model.
        arguments: (args, kwargs).
        plates: {plate: size}; an argument as long as exactly one of them has its rows there.
        skip: names of those that are observed.
    """
    for name, value in named_tensors(model, *arguments).items():
        if name not in skip:
            rows = [plate for plate, size in plates.items() if value.dim() and size == len(value) > 1]
            own = f"{name}_value" if name in plates else name  # no variable is called as a dimension
            groups.put(group, own, value, rows if len(rows) == 1 else [])


def observed_arguments(named: Mapping[str, Tensor], observed: Iterable[Tensor]) -> set[str]:
    """Which of these arguments are the value of an observed site, or of the same elements."""
    values = list(observed)
    return {name for name, argument in named.items() if any(_same(argument, value) for value in values)}


def named_tensors(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among a model's arguments, and in those that are dicts, by name."""
    try:
        signature = inspect.signature(_function(model))
        bound = signature.bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # no signature, as of what is written in C, or one that these do not fit
        return {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    found: dict[str, Any] = {}
    for name, value in bound.items():
        if kinds[name] is inspect.Parameter.VAR_POSITIONAL:
            found |= {f"{name}_{i}": v for i, v in enumerate(value)}
        elif isinstance(value, Mapping):  # **kwargs, or a batch that is a dict
            found |= {key: v for key, v in value.items() if isinstance(key, str)}
        else:
            found[name] = value
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _function(model: Any) -> Callable:
    """What a model is under Pyro's handlers, which take (*args, **kwargs)."""
    while True:
        if isinstance(model, nn.Module):
            return model.forward
        inner = unwrap(model)
        inner = getattr(inner, "fn", inner)
        if inner is model or not callable(inner):
            return model
        model = inner


def _same(value: Tensor, observed: Tensor) -> bool:
    if value.numel() != observed.numel():
        return False
    if value.data_ptr() == observed.data_ptr():
        return True
    return torch.equal(value.detach().flatten(), observed.detach().flatten().to(value.device, value.dtype))
