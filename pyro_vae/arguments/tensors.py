"""Tensors and arrays among arguments: those that would be misread, and those that may be behind an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.arguments.values import shown

__all__ = ["check_dense", "check_tensors", "refuse_unusual"]


def check_tensors(where: str, value: Any, *, nested: bool = True) -> Any:
    """Raises TypeError for arrays in `value` that would be taken for something else: masked ones, whose mask nobody
    reads, and tensors on the device "meta", which have no numbers; and for nested ones, where these cannot be."""
    for path, x in _leaves(where, value):
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(
                f"{path}: expected an array without a mask, which is not read, got a masked array. Try "
                "x.filled(np.nan), with ObservedPart(likelihood) and MaskedInput(network), or x.data where none is "
                "missing."
            )
        if isinstance(x, Tensor) and x.is_meta:
            raise TypeError(f'{path}: expected a tensor with values, got one on device "meta". Try device="cpu".')
        if not nested and isinstance(x, Tensor) and x.is_nested:
            raise TypeError(f"{path}: expected a tensor of rows, got a nested tensor. Try x.to_padded_tensor(0.0).")
    return value


def check_dense(where: str, x: Any, *, meta: bool = False) -> None:
    """Raises TypeError unless x is a dense tensor of real numbers; `meta`: it may be on the device "meta"."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: expected a tensor, got {shown(x)}. Try torch.as_tensor(x).float().")
    got, advice = ("one without values", 'device="cpu"') if x.is_meta and not meta else _unusual(x, "")
    if got is not None and (x.is_nested or x.numel()):
        raise TypeError(f"{where}: expected a dense tensor of real numbers, got {got}. Try {advice}.")


def refuse_unusual(where: str, value: Any, error: BaseException) -> None:
    """Raises TypeError if there is something in `value` that may have led to this error: anything but a dense tensor
    of numbers, which a model may take, and most do not."""
    for path, x in _leaves(where, value):
        got, advice = _unusual(x, str(error))
        if got is not None:
            raise TypeError(
                f"{path}: expected rows in a dense tensor of real numbers, as model and guide seem to take, got {got}. "
                f"Try {advice}. The error was: {type(error).__name__}: {error}"
            ) from error


def _unusual(x: Any, error: str) -> tuple[str | None, str]:
    if isinstance(x, Tensor):
        if x.is_nested or x.layout is not torch.strided:
            return ("a nested tensor", "x.to_padded_tensor(0.0)") if x.is_nested else ("a sparse one", "x.to_dense()")
        if x.is_complex() or x.is_quantized:
            return f"one of {x.dtype}", "torch.view_as_real(x)" if x.is_complex() else "x.dequantize()"
        if x.numel() == 0:
            return f"an empty one of shape {tuple(x.shape)}", "at least one row"
        return ("a single number", "x.reshape(1)") if x.dim() == 0 and "0-d" in error else (None, "")
    if isinstance(x, np.ndarray):
        return f"a numpy array of {x.dtype}", "torch.from_numpy(x.astype(np.float32))"
    if type(x).__name__ in ("DataFrame", "Series"):
        return f"a {type(x).__name__}", 'torch.from_numpy(x.to_numpy("float32"))'
    if x is None:
        return ("None", "a tensor of rows") if "NoneType" in error else (None, "")
    if isinstance(x, (bool, int)):  # flags and sizes
        return None, ""
    return shown(x), "torch.as_tensor(…)"


def _leaves(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, x in value.items():
            yield from _leaves(f"{where}[{key!r}]", x)
    elif isinstance(value, (tuple, list)) and any(
        isinstance(x, (Tensor, np.ndarray, tuple, list, dict)) for x in value
    ):
        for i, x in enumerate(value):
            yield from _leaves(f"{where}[{i}]", x)
    else:
        yield where, value
