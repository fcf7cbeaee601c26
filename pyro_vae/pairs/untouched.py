"""`Untouched`: puts back what running a model or guide changed in modules, objects and Pyro's parameter store."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from pyro_vae.pairs.modes import all_owners

__all__ = ["Untouched", "copy_of", "restore_tensor"]

CONTAINERS = (dict, list, set, deque)
SET_UP_IN = ("_parameters", "_buffers", "_modules")  # of a module: where a guide puts what it makes on its first run
LARGEST_DATA = 2**26  # bytes of a tensor that is no parameter and is copied, to put it back if a run changes it
LARGEST_COPY = 2**16  # elements of a tensor attribute that is copied; buffers always are


class Untouched:
    """A context in which a pair may run, and after which it is as it was before.

    Restored are the attributes of the functions' owners and of every module that is called inside, one level into
    their containers; buffers and small tensor attributes; the names in Pyro's parameter store. Parameters keep their
    values by themselves, as nothing trains inside.

    Args:
        *functions: that will run.
        keep: leave everything as the run left it, and only say what it set up.

    Attributes:
        set_up: whether the run set something up, as first runs do: made a parameter with an initial value of its own,
            gave a module new parameters or parts, or made the prototype of an autoguide.
    """

    def __init__(self, *functions: Callable, keep: bool = False) -> None:
        self.functions, self.keep = functions, keep
        self.set_up = False
        self._objects: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._tensors: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> Untouched:
        for owner in all_owners(*self.functions):
            if isinstance(owner, nn.Module):
                self._remember_all(owner)
            else:
                self._remember(owner)
        self._names = set(pyro.get_param_store().keys())
        self._made = _Made(self._names)
        self._made.__enter__()
        self._hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, _: self._remember_all(module)
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()
        self._made.__exit__(*error)
        self.set_up = self._made.any or any(self._was_set_up(*entry) for entry in self._objects.values())
        if self.keep:
            return
        self._forget_new_names()
        for thing, attributes in self._objects.values():
            if isinstance(thing, nn.Module):  # its mode is `evaluation_mode`'s to put back
                attributes["training"] = thing.training
            _restore_dict(vars(thing), attributes)
        for container, content in self._containers.values():
            _restore(container, content)
        for tensor, value in self._tensors:
            restore_tensor(tensor, value)

    def _forget_new_names(self) -> None:
        store = pyro.get_param_store()
        for name in set(store.keys()) - self._names:
            with suppress(KeyError):  # of a tensor with two names: the store knows it by the last one only
                del store[name]
        unknown = {name: value for name, value in store.named_parameters() if store.param_name(value) is None}
        store.set_state({"params": unknown, "constraints": {}})

    def _remember_all(self, module: nn.Module) -> None:
        for part in module.modules():
            self._remember(part)

    def _remember(self, thing: Any) -> None:
        if isinstance(thing, LazyModuleMixin) and thing.has_uninitialized_params():  # type: ignore[misc]
            return  # its first call makes it a module of another class, for good
        if id(thing) in self._objects or not hasattr(thing, "__dict__") or isinstance(thing, type):
            return
        attributes = dict(vars(thing))
        self._objects[id(thing)] = thing, attributes
        for value in attributes.values():
            if isinstance(value, CONTAINERS):
                self._containers.setdefault(id(value), (value, copy.copy(value)))
            if isinstance(value, Tensor) and value.numel() <= LARGEST_COPY and value.is_leaf:
                self._tensors.append((value, value.detach().clone()))
        if isinstance(thing, nn.Module):
            buffers = [b for b in thing.buffers(recurse=False) if not torch.nn.parameter.is_lazy(b)]
            self._tensors += [(buffer, buffer.detach().clone()) for buffer in buffers]

    def _was_set_up(self, thing: Any, attributes: dict[str, Any]) -> bool:
        if not isinstance(thing, nn.Module):
            return False
        known = {name: self._containers.get(id(attributes.get(name))) for name in SET_UP_IN}  # none of a ScriptModule
        grown = any(vars(thing)[name].keys() != entry[1].keys() for name, entry in known.items() if entry is not None)
        # autoguides and easyguides of Pyro look at the model on their first run, and size themselves by it
        prototypes = (values.get("prototype_trace", self) for values in (attributes, vars(thing)))
        return grown or next(prototypes) is not next(prototypes)


class _Made(Messenger):
    """Notes whether a parameter was made that is not somebody's `nn.Parameter`."""

    def __init__(self, known: set[str]) -> None:
        super().__init__()
        self.known, self.any = known, False

    def _pyro_post_param(self, msg: dict) -> None:
        value = msg["args"][1] if len(msg["args"]) > 1 else None
        self.any |= msg["name"] not in self.known and not isinstance(value, nn.Parameter)


def copy_of(tensor: Tensor) -> Tensor | None:
    """A copy to restore a value from. None of what is too large to be copied and is data, or is sparse."""
    if tensor.layout is not torch.strided or (tensor.nbytes > LARGEST_DATA and not tensor.requires_grad):
        return None
    return tensor.detach().clone()


def restore_tensor(tensor: Tensor, value: Tensor | None) -> bool:
    """Puts back a value of which `copy_of` made a copy, if it has changed; returns whether it had."""
    if (
        value is None
        or tensor.layout is not torch.strided
        or (tensor.shape == value.shape and torch.equal(tensor, value))
    ):
        return False
    if tensor.shape == value.shape:
        tensor.data.copy_(value)
    else:
        tensor.data = value
    return True


def _restore(container: Any, content: Any) -> None:
    if isinstance(container, dict):
        _restore_dict(container, content)
    elif isinstance(container, set):
        if container != content:
            container.clear()
            container.update(content)
    elif len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
        container.clear()
        container.extend(content)


def _restore_dict(now: dict, before: dict) -> None:
    """Changes only what differs, so that objects which watch their attributes see nothing of it."""
    for key in [key for key in now if key not in before]:
        del now[key]
    for key, value in before.items():
        if key not in now or now[key] is not value:
            now[key] = value
