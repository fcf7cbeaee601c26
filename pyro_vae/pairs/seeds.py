"""Draws that can be repeated: the argument `seed` of every function that draws."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import pyro

from pyro_vae.arguments import check_seed
from pyro_vae.pairs.modes import fork_random_state

__all__ = ["seeded"]

P = ParamSpec("P")
R = TypeVar("R")


def seeded(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose keyword argument `seed`, where it is not None, decides its draws and disturbs no others.

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
            return function(*args, **kwargs)
        seed = check_seed("seed", seed)
        with fork_random_state():
            pyro.set_rng_seed(seed)
            return function(*args, **kwargs)

    return with_seed
