r"""Ranks: the processes of one run, as `torchrun` starts them, and what they tell each other.

Under `torchrun --nproc-per-node=R script.py` the same script runs in R processes. The functions of this package find
that out by themselves: `fit` takes a share of each batch in each rank, estimators a share of the rows, and all ranks
end with the same result. All of them have to make the same calls in the same order, as is checked where a call begins.

    with alone():  # what only one rank does
        evidence = importance_sampling(…)
"""

from __future__ import annotations

import atexit
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["Ranks", "alone", "ranks"]

S = TypeVar("S")
T = TypeVar("T")
F = TypeVar("F", bound=Callable)
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what it sets in the environment

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """What runs inside is run by this process by itself, whatever other ranks do.

    Example:
        >>> with alone():
        ...     ranks().size
        1
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def ranks() -> Ranks:
    """The ranks that this process is one of: those of torch's process group, or of `torchrun`, or itself alone.

    The process group is made where `torchrun` has started several processes and nobody has made one yet: gloo, and nccl
    for CUDA, where rank number r of a node has device r.
    """
    if _alone.get() or not dist.is_available():
        return Ranks()
    if not dist.is_initialized():
        if not all(name in os.environ for name in TORCHRUN) or int(os.environ["WORLD_SIZE"]) < 2:
            return Ranks()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _with_reason(function: F) -> F:
    """What the ranks do together fails where one of them is gone: an error that says so."""

    @wraps(function)
    def together(self: Ranks, *args: Any) -> Any:
        try:
            return function(self, *args)
        except RuntimeError as error:  # of torch.distributed
            raise RuntimeError(
                f"rank {self.rank} of {self.size}: expected all ranks to go on together, got no answer from one of "
                f"them, which has ended or cannot be reached ({str(error).splitlines()[0]}). Try to look at the first "
                "error of the other ranks, and to start the run again: with checkpoint=… it goes on, on any number of "
                "ranks."
            ) from error

    return together  # type: ignore[return-value]


class Ranks:
    """Processes that run the same script.

    Args:
        rank: which of them this one is, from 0.
        size: how many they are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def several(self) -> bool:
        return self.size > 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This rank's part of some rows: contiguous, of about the same size in each, maybe empty."""
        return rows.tensor_split(self.size)[self.rank]

    def device(self, device: str | torch.device | None) -> str | torch.device | None:
        """The device of this rank, where that asked for is "auto" or CUDA without a number."""
        asks = device is not None and str(device) in ("auto", "cuda")
        if self.several and asks and torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def part_ways(self, *, all_generators: bool = False) -> None:
        """Gives each rank random numbers of its own, all following from those of the first, which stay as they are.

        Args:
            all_generators: also those of NumPy and Python.
        """
        if self.several:
            state = self.from_first(torch.get_rng_state())
            if not self.is_first:
                torch.set_rng_state(state)
                seed = int(torch.randint(2**62, (self.rank,))[-1])
                torch.manual_seed(seed)
                if all_generators:
                    np.random.seed(seed % 2**32)
                    random.seed(seed)

    @_with_reason
    def from_first(self, value: T) -> T:
        """The value that the first rank has, of any type."""
        if not self.several:
            return value
        values = [value if self.is_first else None]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def first_does(self, function: Callable[[], T]) -> T:
        """What a function returns or raises in the first rank, the only one that runs it."""
        if not self.several:
            return function()
        found = error = None
        if self.is_first:
            try:
                found = function()
            except Exception as raised:  # whatever it is, the others have to know
                error = raised
        found, error = self.from_first((found, error))
        if error is not None:
            raise error
        return found

    def in_turns(self, items: Sequence[S], function: Callable[[S], T]) -> Iterator[tuple[S, T]]:
        """Each item with what the function makes of it, in their order; the ranks take one each at a time."""
        for i in range(0, len(items), self.size):
            some = items[i : i + self.size]
            found = error = None
            if self.rank < len(some):
                try:
                    found = function(some[self.rank])
                except Exception as raised:  # whatever it is, the others would wait for this rank
                    if not self.several:
                        raise
                    error = raised
            every = self.gather((found, error))
            for _, reason in every:
                if reason is not None:
                    raise reason
            yield from zip(some, (value for value, _ in every), strict=False)

    @_with_reason
    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if not self.several:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @_with_reason
    def copy_first(self, tensors: list[Tensor]) -> None:
        """Makes tensors what they are in the first rank."""
        if self.several:
            with torch.no_grad():
                for tensor in tensors:
                    own = tensor.detach().contiguous()
                    dist.broadcast(own, src=0)
                    tensor.copy_(own)

    @_with_reason
    def sum(self, tensors: list[Tensor]) -> None:
        """Makes tensors the sums of those of all ranks; they are on their way at the same time."""
        if self.several:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def agree(self, where: str, **values: Any) -> None:
        """Raises ValueError unless all ranks call the same function with the same values."""
        every = self.gather((where, values))
        functions = [name for name, _ in every]
        if len(set(functions)) > 1:
            raise ValueError(
                f"{where}: expected the same call in all {self.size} ranks, got {', '.join(functions)}. Try the same "
                "script in all of them, and pyro_vae.ranks.alone() around what only one is to do."
            )
        for name, value in values.items():
            others = [found.get(name) for _, found in every]
            if any(other != value for other in others):
                raise ValueError(
                    f"{where}: expected the same {name} in all {self.size} ranks, got {', '.join(map(str, others))}. "
                    "Try to give each rank all the data, of which it takes its share, and the same model; or "
                    "pyro_vae.ranks.alone() around runs that have nothing to do with each other."
                )
