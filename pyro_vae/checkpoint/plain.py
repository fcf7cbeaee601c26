"""Plain states: tensors, numbers, strings and None, in lists and dicts; what they consist of, and where two differ."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["bytes_of", "describe", "differences", "kind", "listed", "map_tensors"]

DICTS, LISTS = (dict, OrderedDict, Counter), (list, tuple, set)
NUMBERS = (bool, int, float, complex, str, bytes, type(None))
TENSORS = (Tensor, nn.Parameter, nn.Buffer)
NOTHING = object()


def describe(state: Any, where: str = "") -> dict[str, str]:
    """{place in the state: shape and dtype} of its tensors.

    Raises:
        TypeError: something in it is not plain, or a tensor without values. The message says where.
    """
    if type(state) in DICTS:
        items = [(str(key), value) for key, value in state.items() if type(key) in NUMBERS]
        if len(items) < len(state):
            raise TypeError(f"{where or 'a state'}: expected names or numbers as keys of a dict, got others.")
    elif type(state) in LISTS:
        items = [(str(i), value) for i, value in enumerate(state)]
    elif type(state) in TENSORS and state.device.type != "meta":
        return {where: kind(state)}
    elif type(state) in NUMBERS:
        return {}
    else:
        what = "a tensor without values" if isinstance(state, Tensor) and state.is_meta else type(state).__name__
        raise TypeError(
            f"{where or 'a state'}: expected tensors, numbers, strings, lists and dicts, which can be read back "
            f"without running code, got {what}. Try to convert it."
        )
    return {k: v for name, value in items for k, v in describe(value, f"{where}/{name}" if where else name).items()}


def kind(value: Any) -> str:
    """What has to be the same of two values for one to take the place of the other; "nothing" for none."""
    if isinstance(value, Tensor):
        layout = "" if str(value.layout) == "torch.strided" else f", {value.layout}"
        return f"{tuple(value.shape)} of {value.dtype}{layout}".replace("torch.", "")
    if isinstance(value, bool):
        return "True or False"
    if isinstance(value, (int, float)):
        return "a finite number" if math.isfinite(value) else "a number that is not finite"
    return "nothing" if value is NOTHING else type(value).__name__


def differences(expected: Any, got: Any, where: str = "", *, loose: bool = False) -> Iterator[str]:
    """Says what keeps a state from taking the place of another: other names, shapes, dtypes, types or lengths.

    Args:
        expected: the state that is there.
        got: the one that is to take its place.
        where: the place of both in what they are part of.
        loose: whether values may come later that are not there yet: None, empty lists, further names.
    """
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in [*expected, *(key for key in got if key not in expected and not loose)]:
            place = f"{where}/{key}" if where else str(key)
            yield from differences(expected.get(key, NOTHING), got.get(key, NOTHING), place, loose=loose)
    elif isinstance(expected, (list, tuple)) and type(expected) is type(got):
        if len(expected) == len(got):
            for i, pair in enumerate(zip(expected, got, strict=True)):
                yield from differences(*pair, f"{where}/{i}", loose=loose)
        elif not (loose and not expected):
            yield f"{where}: expected {len(expected)} values, got {len(got)}"
    elif loose and (expected is None or (got is None)):
        return
    elif kind(expected) != kind(got) and kind(expected) != "a number that is not finite":
        yield f"{where}: expected {kind(expected)}, got {kind(got)}"
    elif kind(expected) == "a number that is not finite" and not isinstance(got, (int, float)):
        yield f"{where}: expected a number, got {kind(got)}"


def listed(differences: Iterator[str] | list[str], most: int = 5) -> str:
    """The first of them, in one line; empty if there are none."""
    found = list(differences)
    return "; ".join(found[:most]) + ("; …" if len(found) > most else "")


def bytes_of(x: Tensor) -> bytes:
    """The values of a tensor, row by row, whatever its strides are."""
    values = torch.empty(x.numel(), dtype=x.dtype).copy_(x.detach().reshape(-1))
    return values.view(torch.uint8).numpy().tobytes()


def map_tensors(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """The state with other tensors. Its lists and dicts are new ones."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        new = type(state)()
        new.update({key: map_tensors(function, value) for key, value in state.items()})
        return new
    if isinstance(state, (list, tuple)):
        return type(state)(map_tensors(function, value) for value in state)
    return state
