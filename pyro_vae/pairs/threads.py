"""One thread at a time: the door of every function that runs a pair.

Pyro keeps its effect handlers in one stack, and its parameters in one store, for the whole process. Where two threads
run pairs at the same time, a site of one of them passes through the handlers of the other: draws and parameters change
places, and a fit may end at other weights without an error. So while one thread is inside, the door is shut to all
others. Calls inside a call, of the same thread, pass. Other processes have a stack of their own, and a door of their
own.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

__all__ = ["one_thread"]

P = ParamSpec("P")
R = TypeVar("R")


class _Entry:
    """A call of a function, on its way in or inside. `left` is set on its way out, whatever way that is."""

    __slots__ = ("left", "name", "thread")

    def __init__(self, name: str) -> None:
        self.name, self.thread, self.left = name, threading.current_thread(), False


_lock = threading.Lock()
_inside: _Entry | None = None  # the outermost call of the thread that is inside, or one that has left


def one_thread(function: Callable[P, R]) -> Callable[P, R]:
    """A function that refuses to run while another thread is inside such a function. It may call others, and itself.

    Args:
        function: no generator and no coroutine function, as these come back before they are done.

    Returns:
        The function, with its name, docstring and signature. It raises a RuntimeError that names both functions and
        both threads while another thread is inside.

    Raises:
        TypeError: a generator or coroutine function.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> @one_thread
        ... def look():
        ...     return "seen"
        >>> @one_thread
        ... def from_another_thread():
        ...     with ThreadPoolExecutor(1) as pool:
        ...         return pool.submit(look).exception()
        >>> look(), type(from_another_thread()).__name__, look()
        ('seen', 'RuntimeError', 'seen')
    """
    name = function.__qualname__
    if any(f(function) for f in (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)):
        raise TypeError(
            f"one_thread: expected a function that is done when it returns, got {name}, a generator or coroutine "
            "function. Try to guard the functions that it calls."
        )

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        entry = _Entry(name)
        try:
            _enter(entry)
            return function(*args, **kwargs)
        finally:
            entry.left = True  # one step, which no interrupt (Ctrl-C) can come between

    return guarded


def _enter(entry: _Entry) -> None:
    """Lets this call in, or raises RuntimeError."""
    global _inside
    with _lock:
        if _inside is None or _inside.left:
            _inside = entry
        first = _inside
    if first.thread is not entry.thread:
        raise RuntimeError(
            f"{entry.name}: expected one thread at a time to run models and guides, as Pyro has one stack of effect "
            f"handlers for the whole process; got a call in thread {entry.thread.name!r} while {first.name} runs in "
            f"thread {first.thread.name!r}. Try one process for each (multiprocessing, joblib's 'loky'), or to wait "
            "until the other is done."
        )


def _reopen() -> None:
    """Opens the door in a child process: the thread that was inside did not come along, nor did what it held."""
    global _lock, _inside
    _lock, _inside = threading.Lock(), None


if hasattr(os, "register_at_fork"):  # not on Windows, where no process is forked
    os.register_at_fork(after_in_child=_reopen)
