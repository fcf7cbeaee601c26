"""`Untraceable`: a function has no graph. The message names the line of the user's code that prevents it."""

from __future__ import annotations

import traceback

__all__ = ["Untraceable", "place", "summary"]

LIBRARIES = ("torch", __name__.partition(".")[0], "pyro")  # the user's code is what belongs to none of these


class Untraceable(RuntimeError):
    """The function has no graph: what it does next depends on values."""


def place(error: BaseException) -> str:
    """The last line of the user's code on the way to an error, and the reason.

    Where no line is the user's, it is the last one of Pyro, else of this package, else of torch.
    """
    steps = zip(traceback.walk_tb(error.__traceback__), traceback.extract_tb(error.__traceback__), strict=True)
    named = [(frame.f_globals.get("__name__", ""), line) for (frame, _), line in steps]
    frames = [(module.partition(".")[0], line) for module, line in named if not line.filename.startswith("<")]
    outside = [[line for package, line in frames if package not in LIBRARIES[:n]] for n in (3, 2, 1, 0)]
    where = next(found for found in outside if found)[-1]
    if "value out of a tracing tensor" in str(error):
        return f"{where.filename}:{where.lineno}: {where.line} (a value is read here)"
    return f"{where.filename}:{where.lineno}: {where.line} ({summary(error)})"


def summary(error: BaseException) -> str:
    """The type of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
