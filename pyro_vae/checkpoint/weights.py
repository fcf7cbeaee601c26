"""Weights on disk. They are written and loaded completely or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.checkpoint import tensors
from pyro_vae.checkpoint.container import read, write
from pyro_vae.checkpoint.plain import bytes_of, differences, listed
from pyro_vae.checkpoint.replacing import replace_file

__all__ = ["load_weights", "save_weights"]


def save_weights(module: nn.Module, path: str | Path) -> None:
    """Writes the `state_dict` of a module, whole or not at all: whatever happens, there is the old file or the new one.

    A file "….safetensors" has that format, which many programs and languages read. Any other opens with
    `torch.load(path, weights_only=True)`. Both have a checksum and the name, shape and dtype of each tensor.

    Args:
        module: any module, e.g. a `VAE`.
        path: name of the file, in a folder that exists. A file that is there is replaced and keeps its mode; a symbolic
            link stays, and the file that it leads to is replaced.

    Raises:
        TypeError: no module, such as a path and a module in the wrong order; a state that cannot be written.
        ValueError: the folder does not exist, or `path` names something other than a file.
        OSError: the system refuses (a full disk, no permission); what was there before is as it was.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> first, second = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(first, f"{folder}/weights.safetensors")
        ...     load_weights(second, f"{folder}/weights.safetensors")
        >>> bool((first.weight == second.weight).all())
        True
    """
    _check_order("save_weights", module, path)
    state = _state_of(module)
    for name, value in state.items():  # in place, as the versions of the module's parts are an attribute of it
        state[name] = _on_cpu(value)
    if _is_safetensors(path):
        replace_file(path, tensors.pack(state, str(path)))
    else:
        write(state, path)


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Loads weights that `save_weights` wrote, onto the module's device. If anything does not fit, nothing changes.

    Nothing in a file is run. A file "….safetensors" may also come from elsewhere, and then has no checksum.

    Args:
        module: built like the module that was saved.
        path: name of the file.

    Raises:
        TypeError: no module, such as a path and a module in the wrong order.
        ValueError: names, shapes or dtypes differ (the message lists them), `save_weights` did not write the file, or
            it is damaged.
        OSError: there is no file, or no permission to read it.
    """
    _check_order("load_weights", module, path)
    saved = tensors.read(path) if _is_safetensors(path) else read(path)
    if not isinstance(saved, dict):
        raise ValueError(f"{path} was not written by save_weights. Try another file, or save the weights again.")
    present = _state_of(module)
    wrong = listed(differences(present, saved)) or listed(_apart(present, saved))
    if wrong:
        shapes = [{name: getattr(t, "shape", None) for name, t in state.items()} for state in (present, saved)]
        advice = (
            "in the dtype, as by module.double(), and with the tied weights,"
            if shapes[0] == shapes[1]
            else "with the sizes"
        )
        raise ValueError(
            f"{path} does not fit {type(module).__name__}, which stays as it was ({wrong}). Try to build the module "
            f"{advice} that it was saved with."
        )
    before = {name: t.detach().clone() if isinstance(t, Tensor) else t for name, t in present.items()}
    try:
        module.load_state_dict(saved)
    except BaseException as error:
        module.load_state_dict(before)
        if not isinstance(error, Exception):
            raise
        raise ValueError(
            f"{path} cannot be loaded into {type(module).__name__}, which stays as it was: {error} Try to build the "
            "module as it was saved."
        ) from error


def _apart(present: dict[str, Any], saved: dict[str, Any]) -> Iterator[str]:
    """Says which tensors are one in the module (tied weights), and several of other values in the file."""
    first: dict[Any, str] = {}
    for name, t in present.items():
        if isinstance(t, Tensor) and t.layout is torch.strided and t.numel():
            other = first.setdefault((t.data_ptr(), t.shape, t.stride(), t.dtype), name)
            if other != name and bytes_of(saved[name]) != bytes_of(saved[other]):
                yield f"{other} and {name}: expected equal values, as they are one tensor, got others"


def _is_safetensors(path: str | Path) -> bool:
    return Path(path).suffix == ".safetensors"


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value  # else an "extra state" of a module


def _state_of(module: nn.Module) -> dict[str, Any]:
    """The state of a module. ValueError if a tensor has no values yet."""
    state = module.state_dict()
    empty = [n for n, t in state.items() if isinstance(t, Tensor) and (t.is_meta or nn.parameter.is_lazy(t))]
    if empty:
        raise ValueError(
            f"{type(module).__name__}: expected tensors with values, got {listed(empty)} without, on the device 'meta' "
            "or of a lazy module. Try module.to_empty(device='cpu'), or a first call of the module."
        )
    return state


def _check_order(where: str, module: Any, path: Any) -> None:
    """Raises TypeError unless what is saved or loaded is a module, and goes to or comes from a path."""
    if isinstance(module, nn.Module) and isinstance(path, (str, Path)):
        return
    got = ", ".join(type(a).__name__ for a in (module, path))
    wrong_order = isinstance(path, nn.Module) and isinstance(module, (str, Path))
    advice = "them in the other order" if wrong_order else "a VAE, or another module, and the name of a file"
    raise TypeError(f'{where}: expected (module, path), got ({got}). Try {advice}: {where}(vae, "vae.pt").')
