"""`hold`: one writer of a file at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyro_vae.checkpoint.replacing import companion, file_named, try_lock

__all__ = ["hold"]

_held: set[int] = set()  # open files


@contextmanager
def hold(path: str | Path) -> Iterator[None]:
    """Holds a file, for as long as this process writes it again and again.

    It is let go when the process ends, however it does. Where the system has no locks, nothing is held.

    Raises:
        ValueError: another process, or another call in this one, holds it; or there is no such folder.
        OSError: nothing can be written in the folder.
    """
    target = file_named(path, "checkpoint: ")
    lock = companion(target, ".lock")
    file = _open(lock, path)
    _held.add(file)
    try:
        with suppress(OSError):  # a full disk: that will be said of the file itself
            os.ftruncate(file, 0)
            os.write(file, str(os.getpid()).encode())
        yield
    finally:
        if file in _held:  # not in a child process
            _held.remove(file)
            with suppress(OSError):
                os.unlink(lock)
            os.close(file)


def _open(lock: Path, path: str | Path) -> int:
    while True:
        try:
            file = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            message = f"{path} cannot be written: {error.strerror}. Try another place, or to get permission."
            raise OSError(error.errno, message) from error
        if try_lock(file) is False:
            with os.fdopen(file, "rb") as other:
                by = other.read(20).decode(errors="replace")
            raise ValueError(
                f"checkpoint: {path} is being written by another fit, in process {by or '?'}. Try another file, or to "
                "wait until that is done."
            )
        with suppress(OSError):
            if os.path.samestat(os.fstat(file), os.stat(lock)):
                return file
        os.close(file)  # whoever held it has removed it meanwhile


def _let_go() -> None:
    """In a child process, such as a worker of a DataLoader: it may outlive its parent, and holds nothing."""
    for file in _held:
        os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
