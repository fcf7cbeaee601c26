"""Names of weights in Pyro's parameter store, under which two modules do not meet.

The store is one for the whole process, and gives a second module of the same name the weights of the first. A module
whose name is taken therefore gets the next free one of name, name_2, name_3, …; its weights are called
`name$$$part.parameter`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, count
from typing import Any

import pyro
from torch import nn

__all__ = ["store_name", "trainable"]


def trainable(part: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that require a gradient, of a module; none of anything else."""
    named = part.named_parameters() if isinstance(part, nn.Module) else ()
    return ((name, p) for name, p in named if p.requires_grad)


def store_name(parts: Mapping[str, Any], part: str, current: str, name: str, *, what: str) -> str:
    """The name under which to register weights: one under which the store holds none of another module.

    Args:
        parts: {part: module or anything else}, all that is to have this name.
        part: the one that is about to be registered.
        current: the name under which the weights were registered last.
        name: the name that was given.
        what: has this name, for the message.

    Returns:
        The first that is free of `current`, name, name_2, name_3, ….

    Raises:
        ValueError: the store holds a parameter of such a name that was not registered by this function's help.
    """
    store = pyro.get_param_store()
    first = next(trainable(parts[part]), None)
    if first is None:
        return current
    key = f"{current}$$${part}.{first[0]}"
    if key in store and store[key] is first[1]:
        return current  # the usual case: every run after the first
    mine = {f"{r}.{n}": p for r, module in parts.items() for n, p in trainable(module)}
    for candidate in chain([current, name], (f"{name}_{i}" for i in count(2))):
        keys = {f"{candidate}$$${n}": p for n, p in mine.items()}
        clashes = [key for key, p in keys.items() if key in store and store[key] is not p]
        strange = [key for key in clashes if getattr(store[key], "_pyro_vae", None) != id(store[key])]
        if strange:
            raise ValueError(
                f"{what} {name!r}: Pyro's parameter store already holds {strange[0]!r}, which is not a weight of a "
                f"{what}. Pyro would train that one, and not the weight that this {what} uses. Try another name=…, "
                "pyro.clear_param_store(), or load_state_dict to load weights."
            )
        if not clashes:
            break
    for p in mine.values():
        # a mark by which another one knows it; one that was read from a file or copied has the number of another
        p._pyro_vae = id(p)  # type: ignore[attr-defined]
    return candidate
