"""Weights on disk. They are written and loaded completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["load_weights", "read", "save_weights", "write"]


def save_weights(module: nn.Module, path: str | Path) -> None:
    """Writes the `state_dict` of a module atomically: an interrupted call leaves the previous file in place.

    The file contains only plain tensors, and opens with `torch.load(path, weights_only=True)`.

    Args:
        module: any module, e.g. a `VAE`.
        path: name of the file, in a folder that exists.

    Raises:
        TypeError: no module, such as a path and a module in the wrong order.
        ValueError: the folder does not exist, or `path` is itself a folder.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> first, second = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(first, f"{folder}/weights.pt")
        ...     load_weights(second, f"{folder}/weights.pt")
        >>> bool((first.weight == second.weight).all())
        True
    """
    _check_order("save_weights", module, path)
    write({name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}, path)


def write(state: Any, path: str | Path) -> None:
    """Writes plain tensors, numbers, lists and dicts for `torch.load(path, weights_only=True)`, atomically."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: expected a file in a folder, got no folder {path.parent}. Try to make it first.")
    if path.is_dir():
        raise ValueError(f"{path}: expected the name of a file, got that of a folder. Try {path / 'weights.pt'}.")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)  # atomic on one file system
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: str | Path, refusal: str) -> Any:
    """Reads what `write` wrote. ValueError with the message `refusal` if `write` cannot have written what is there."""
    if Path(path).is_dir():
        raise ValueError(refusal)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch.load raises many kinds of errors on foreign bytes
        raise ValueError(refusal) from error


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Loads weights that `save_weights` wrote, onto the module's device. If anything does not fit, nothing changes.

    Args:
        module: built like the module that was saved.
        path: name of the file.

    Raises:
        TypeError: no module, such as a path and a module in the wrong order.
        ValueError: names, shapes or dtypes differ (the message lists them), or `save_weights` did not write the file.
    """
    _check_order("load_weights", module, path)
    refusal = (
        f"path: expected a file of save_weights, got another: {path} was not written by save_weights. Try another "
        "file, or save the weights again."
    )
    saved = read(path, refusal)
    if not (isinstance(saved, dict) and all(isinstance(tensor, Tensor) for tensor in saved.values())):
        raise ValueError(refusal)
    expected, got = ({name: _kind(t) for name, t in state.items()} for state in (module.state_dict(), saved))
    wrong = [
        f"{name}: expected {expected.get(name, 'nothing')}, got {got.get(name, 'nothing')}"
        for name in sorted(expected | got)
        if expected.get(name) != got.get(name)
    ]
    if wrong:
        shown = "; ".join(wrong[:5]) + ("; …" if len(wrong) > 5 else "")
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        same_shapes = shapes == {name: tensor.shape for name, tensor in saved.items()}
        advice = "in the dtype, as by module.double()," if same_shapes else "with the sizes"
        raise ValueError(
            f"{path} does not fit {type(module).__name__}, which stays as it was ({shown}). Try to build the module "
            f"{advice} that it was saved with."
        )
    module.load_state_dict(saved)


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def _check_order(where: str, module: Any, path: Any) -> None:
    """Raises TypeError unless what is saved or loaded is a module, and goes to or comes from a path."""
    if isinstance(module, nn.Module) and isinstance(path, (str, Path)):
        return
    got = ", ".join(type(a).__name__ for a in (module, path))
    wrong_order = isinstance(path, nn.Module) and isinstance(module, (str, Path))
    advice = "them in the other order" if wrong_order else "a VAE, or another module, and the name of a file"
    raise TypeError(f'{where}: expected (module, path), got ({got}). Try {advice}: {where}(vae, "vae.pt").')
