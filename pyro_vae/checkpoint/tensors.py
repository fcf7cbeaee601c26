"""Tensors by name in the format of the `safetensors` library, with a checksum over all of them in its metadata."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pyro_vae.checkpoint.container import read_bytes
from pyro_vae.checkpoint.plain import kind

__all__ = ["pack", "read"]


def pack(state: dict[str, Any], where: str) -> bytes:
    """The bytes of a file. TypeError if something in the state is no dense tensor, or has a dtype without a name."""
    other = next((f"{name} is {kind(t)}" for name, t in state.items() if not _is_dense(t)), None)
    if other is not None:
        raise TypeError(f"{where}: expected dense tensors, got another: {other}. Try a file without .safetensors.")
    own = {name: t.clone(memory_format=torch.contiguous_format) for name, t in state.items()}  # also of tied ones
    versions = json.dumps(getattr(state, "_metadata", {}))  # of the modules, which know by it what they once wrote
    try:
        about = {"format": "pt", "pyro_vae": "1", "versions": versions, "sha256": _digest(own, versions)}
        return safetensors.torch.save(own, about)
    except KeyError as error:
        raise TypeError(f"{where}: the format has no name for {error}. Try a file without .safetensors.") from error


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Raises:
        ValueError: it has another format, or is damaged.
        OSError: there is no file, or no permission to read it.
    """
    data = read_bytes(path)
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__", {})
        state = safetensors.torch.load(data)
    except MemoryError:
        raise
    except Exception as error:  # several kinds, of a JSON that is none, and of a library in another language
        raise ValueError(
            f"{path} is no whole file in the format of safetensors: {type(error).__name__}: {error}. Try a copy of it, "
            "or another file."
        ) from error
    versions = metadata.get("versions", "{}")
    if metadata.keys() & {"pyro_vae", "sha256"} and metadata.get("sha256") != _digest(state, versions):
        raise ValueError(
            f"{path} is damaged: its tensors do not have the checksum that was written with them. Try a copy of it."
        )
    found = OrderedDict(state)
    if "sha256" in metadata:
        found._metadata = json.loads(versions)  # type: ignore[attr-defined]
    return found


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized


def _digest(state: dict[str, Tensor], versions: str) -> str:
    """SHA-256 of names, shapes, dtypes and values, and of the versions."""
    found = hashlib.sha256(versions.encode())
    for name, tensor in sorted(state.items()):
        found.update(f"{name}: {kind(tensor)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
