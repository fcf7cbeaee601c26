"""Draws that can be repeated: the argument `seed` of every function that draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from hashlib import blake2b
from typing import ParamSpec, TypeVar

import pyro

from pyro_vae.arguments import check_seed
from pyro_vae.pairs.modes import fork_random_state

__all__ = ["from_seed", "seeded", "store_as_it_was"]

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def from_seed(*parts: int | bytes) -> Iterator[None]:
    """Draws from a seed that is made of these parts; afterwards the generators are where they were.

    Work that is done in pieces comes out the same whatever pieces were done before, and in which process.
    """
    digest = blake2b(digest_size=4)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    with fork_random_state():
        pyro.set_rng_seed(int.from_bytes(digest.digest(), "big"))
        yield


def seeded(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose keyword argument `seed`, where it is not None, decides its draws and disturbs no others. A call
    that raises leaves no parameters in Pyro's store that were not there before.

    The generators of torch, NumPy and Python are seeded for the call, and afterwards are where they were before it.

    Raises:
        ValueError: a seed that is no whole number from 0 to 2³² − 1, which is what NumPy takes.

    Example:
        >>> import torch
        >>> @seeded
        ... def draw(*, seed=None):
        ...     return torch.rand(()).item()
        >>> draw(seed=3) == draw(seed=3), draw() == draw()
        (True, False)
    """

    @wraps(function)
    def with_seed(*args: P.args, **kwargs: P.kwargs) -> R:
        seed = kwargs.get("seed")
        if seed is None:
            with store_as_it_was():
                return function(*args, **kwargs)
        seed = check_seed("seed", seed)
        with fork_random_state(), store_as_it_was():
            pyro.set_rng_seed(seed)
            return function(*args, **kwargs)

    return with_seed


@contextmanager
def store_as_it_was() -> Iterator[None]:
    """Where something is raised, takes away the parameters that runs have put into Pyro's store until then."""
    store = pyro.get_param_store()
    before = set(store.keys())
    try:
        yield
    except BaseException:
        for name in set(store.keys()) - before:
            del store[name]
        raise
