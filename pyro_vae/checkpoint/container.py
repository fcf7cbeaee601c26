"""The container: torch's own file of plain tensors, with a description beside them and a checksum over every byte.

`torch.load(path, weights_only=True)` and any zip program open it. One more record, `pyro_vae.json`, says in which
format and for what it was written, and has the name, shape and dtype of each tensor. The comment at the end of the file
is the SHA-256 of all bytes before. So a file that was cut off, or of which a bit has changed, is known before anything
in it is read, and nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import io
import json
import stat
import zipfile
from pathlib import Path
from typing import Any

import torch

from pyro_vae.checkpoint.plain import describe
from pyro_vae.checkpoint.replacing import replace_file

__all__ = ["pack", "read", "read_bytes", "unpack", "write"]

VERSION = 1
RECORD, MARK, DIGITS = "pyro_vae.json", b"pyro_vae sha256 ", 64
WRITERS = {"weights": "save_weights", "fit": "fit(checkpoint=…)", "evidence": "an estimate of evidence(checkpoint=…)"}


def write(state: Any, path: str | Path, kind: str = "weights", *, trial: bool = False) -> None:
    """Writes tensors, numbers, strings, lists and dicts, whole or not at all.

    Args:
        state: of these.
        path: of the file.
        kind: what it is written for, a key of `WRITERS`.
        trial: whether to stop before the file is replaced, when all is known to work.

    Raises:
        TypeError: there is something else in the state.
        ValueError, OSError: as `replace_file`.
    """
    data = pack(state, kind)
    if trial:
        unpack(data, str(path), kind)
    replace_file(path, data, trial=trial)


def read(path: str | Path, kind: str = "weights") -> Any:
    """Reads what `write` wrote, onto the CPU.

    Raises:
        ValueError: `write` wrote no such file for this kind, or its bytes are not those that were written.
        OSError: there is no file, or no permission to read it.
    """
    return unpack(read_bytes(path, kind), str(path), kind)


def read_bytes(path: str | Path, kind: str = "weights") -> bytes:
    """All bytes of a regular file."""
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} was not written by {WRITERS[kind]}: expected a file, got none. Try another name.")
    return path.read_bytes()


def pack(state: Any, kind: str) -> bytes:
    """The bytes of a file that holds the state."""
    about = {"version": VERSION, "kind": kind, "tensors": describe(state)}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{folder}/{RECORD}", json.dumps(about, indent=1))
        archive.comment = MARK + b"0" * DIGITS
    # No view of the buffer: in the traceback of a write that failed, its garbage collection crashes Python 3.12.1
    # (python/cpython#111049). `getvalue` shares the bytes as long as nothing is written: nothing is copied here.
    checksum = hashlib.sha256(memoryview(buffer.getvalue())[:-DIGITS]).hexdigest()
    buffer.seek(-DIGITS, io.SEEK_END)
    buffer.write(checksum.encode())
    return buffer.getvalue()


def unpack(data: bytes, where: str, kind: str) -> Any:
    """The state in the bytes of a file. ValueError, with `where`, if they are not as `pack` made them."""
    writer = WRITERS[kind]
    if data[-DIGITS - len(MARK) : -DIGITS] != MARK:
        raise ValueError(
            f"{where} was not written by {writer}, or not to its end, as its last bytes are no checksum. Try another "
            "file, or a copy; delete it if it is an incomplete one."
        )
    if hashlib.sha256(memoryview(data)[:-DIGITS]).hexdigest().encode() != data[-DIGITS:]:
        raise ValueError(
            f"{where} is damaged: its bytes do not have the checksum that {writer} wrote with them. Try a copy of it, "
            "or delete it."
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            about = json.loads(archive.read(next(n for n in archive.namelist() if n.endswith(f"/{RECORD}"))))
        version, written_for, tensors = (about[name] for name in ("version", "kind", "tensors"))
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True) if version == VERSION else None
        described = describe(state)
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises many kinds of errors on foreign bytes
        raise ValueError(f"{where} was not written by {writer}: {_short(error)} Try another file.") from error
    if version != VERSION:
        raise ValueError(
            f"{where} has format {version}, this version of pyro_vae reads format {VERSION}. Try another version."
        )
    if written_for != kind:
        by = WRITERS.get(written_for, written_for)
        raise ValueError(f"{where} was not written by {writer}, but by {by}. Try another file.")
    if described != tensors:
        raise ValueError(
            f"{where} was not written by {writer}: its tensors are not those that it describes. Try another."
        )
    return state


def _short(error: Exception) -> str:
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return line[:120] + ("…" if len(line) > 120 else ".")
