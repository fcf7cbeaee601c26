"""Files that are replaced whole: whatever happens meanwhile, there is the old file or the new one.

The new bytes go to a temporary file in the same folder, and from there to the disk, before it takes the name of the old
one. Its own name is random, it is created and never opened (so that nothing that lies there already is written to or
followed), and it is locked as long as somebody writes: one that nobody holds was left by a writer that was killed.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no locks, and what a killed writer left stays
    fcntl = None

__all__ = ["companion", "file_named", "replace_file", "try_lock"]

FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def file_named(path: str | Path, argument: str = "") -> Path:
    """The regular file that a path names, or is to name. Of a symbolic link: what it leads to; the link stays.

    Raises:
        ValueError: there is no such folder, or something other than a file.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ValueError(
            f"{argument}{path}: expected a file in a folder, got no folder {target.parent}. Try to make it first."
        )
    if target.is_dir():
        raise ValueError(
            f"{argument}{path}: expected the name of a file, got that of a folder. Try {target / 'weights.pt'}."
        )
    with suppress(OSError):  # a name that is too long, say: writing will tell
        if not stat.S_ISREG(target.stat().st_mode):
            raise ValueError(
                f"{argument}{path}: expected the name of a file, got a device, pipe or socket. Try another name."
            )
    return target


def replace_file(path: str | Path, data: bytes, *, trial: bool = False) -> None:
    """Writes a file whole, in the place of one that may be there, whose mode and owner it takes over.

    Args:
        path: of the file.
        data: its bytes.
        trial: whether to do all but the last step: the disk has taken the bytes once, and the file stays as it is.

    Raises:
        ValueError: as `file_named`.
        OSError: the system does not let it (a full disk, no permission, too long a name). The message has the path; the
            old file, if there is one, is as it was.
    """
    target = file_named(path)
    try:
        old = target.stat() if target.exists() else None
        _clear(target)
        with _temporary(target, 0o666 if old is None else 0o600) as (file, temporary):
            for _ in range(2 if trial and old is None else 1):  # from the second time on, the old file is there too
                left = memoryview(data)
                while left:
                    left = left[os.write(file, left) :]
            if old is not None:
                _take_over(file, old)
            os.fsync(file)
            if trial:
                return
            if fcntl is None:  # Windows moves no open file
                os.close(file)
            os.replace(temporary, target)  # atomic on one file system
        _flush_folder(target.parent)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} cannot be written: {error.strerror}. What was there before is as it was. Try another place, or to "
            "make room or get permission.",
        ) from error


def companion(target: Path, suffix: str) -> Path:
    """A hidden name beside a file, of a length that does not depend on that of the file's."""
    name = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    return target.with_name(f".pyro_vae-{name}{suffix}")


def try_lock(file: int) -> bool | None:
    """Locks an open file until it is closed, at the latest as its process ends. None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


@contextmanager
def _temporary(target: Path, mode: int) -> Iterator[tuple[int, Path]]:
    """A new file beside the target, open, locked and empty. It is removed if it is still there in the end."""
    path = companion(target, f"-{secrets.token_hex(8)}.partial")
    file = os.open(path, FLAGS, mode)
    try:
        if try_lock(file) is False or not os.fstat(file).st_nlink:  # taken for a leftover before it was locked
            with _temporary(target, mode) as other:
                yield other
            return
        yield file, path
    finally:
        with suppress(OSError):
            os.unlink(path)
        with suppress(OSError):
            os.close(file)


def _clear(target: Path) -> None:
    """Removes what killed writers of this file left: temporary files that nobody holds."""
    for path in target.parent.glob(companion(target, "-*.partial").name):
        with suppress(OSError):
            file = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                if try_lock(file):
                    os.unlink(path)
            finally:
                os.close(file)


def _take_over(file: int, old: os.stat_result) -> None:
    if hasattr(os, "fchown"):
        with suppress(OSError):  # only root may give files away
            os.fchown(file, old.st_uid, old.st_gid)
        os.fchmod(file, stat.S_IMODE(old.st_mode))


def _flush_folder(folder: Path) -> None:
    """Brings the new name to the disk too. Some systems know no such thing; the file is whole on any."""
    with suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
