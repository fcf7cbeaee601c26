r"""Names for a VAE's weights in Pyro's parameter store, `name$$$role.parameter`.

`pyro.infer.SVI` trains the parameters that the model and guide pass to `pyro.param`, and the store is one for the whole
process. Two VAEs must not meet there: Pyro would give the second the weights of the first. A VAE whose name is taken
therefore gets the next free one of name, name_2, name_3, ….
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.distributions.structure import condition

__all__ = ["condition_registered", "store_name"]


def condition_registered(
    parts: Mapping[str, Any], role: str, name: str, *inputs: Tensor, event_dims: Sequence[int] | None = None
) -> Any:
    """The distribution of `parts[role]` given `inputs`, with its parameters passed through `pyro.param`.

    Args:
        parts: {role: conditional distribution}.
        role: the part to call.
        name: the name of the VAE in the parameter store, from `store_name`.
        *inputs: what to condition on.
        event_dims: see `condition`.
    """
    part = parts[role]
    parameters = dict(_trainable(part))
    values = {key: pyro.param(f"{name}$$${role}.{key}", p) for key, p in parameters.items()}
    changed = {f"part.{key}": v for key, v in values.items() if v is not parameters[key]}
    if changed:  # a handler, such as poutine.lift, replaced the weights by other values
        options = {"event_dims": event_dims, "role": role}
        return torch.func.functional_call(_Conditioned(part), changed, inputs, options)
    return condition(part, *inputs, event_dims=event_dims, role=role)


def store_name(parts: Mapping[str, Any], role: str, current: str, name: str) -> str:
    """The name under which to register the weights: one under which the store holds no other VAE's weights.

    Args:
        parts: {role: conditional distribution}.
        role: the part that is about to be registered.
        current: the name under which the weights were registered last.
        name: the name that the VAE was given.

    Returns:
        The first that is free of `current`, name, name_2, name_3, ….

    Raises:
        ValueError: the store holds a parameter of such a name that is not a weight of a VAE.
    """
    store = pyro.get_param_store()
    first = next(_trainable(parts[role]), None)
    if first is None:
        return current
    key = f"{current}$$${role}.{first[0]}"
    if key in store and store[key] is first[1]:
        return current  # the usual case: every run after the first
    mine = {f"{r}.{n}": p for r, part in parts.items() for n, p in _trainable(part)}
    for candidate in chain([current, name], (f"{name}_{i}" for i in count(2))):
        keys = {f"{candidate}$$${n}": p for n, p in mine.items()}
        clashes = [key for key, p in keys.items() if key in store and store[key] is not p]
        strange = [key for key in clashes if not hasattr(store[key], "_pyro_vae")]
        if strange:
            raise ValueError(
                f"VAE {name!r}: Pyro's parameter store already holds {strange[0]!r}, which is not a weight of a VAE. "
                "Pyro would train that one, and not the weight that this VAE uses. Try VAE(…, name=…) with another "
                "name, pyro.clear_param_store(), or load_state_dict to load weights."
            )
        if not clashes:
            break
    for p in mine.values():
        p._pyro_vae = True  # type: ignore[attr-defined]  # a mark, by which another VAE knows it
    return candidate


class _Conditioned(nn.Module):
    """A conditional distribution as a module that `torch.func.functional_call` can call."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *inputs: Tensor, **options: Any) -> Any:
        return condition(self.part, *inputs, **options)


def _trainable(part: Any) -> Iterator[tuple[str, nn.Parameter]]:
    named = part.named_parameters() if isinstance(part, nn.Module) else ()
    return ((name, p) for name, p in named if p.requires_grad)
