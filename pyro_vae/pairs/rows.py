"""Rows: how to run a pair on some of its data points, and which of its arguments have a row for each of them.

An argument may be as long as the data by chance: the eight means of a mixture, beside eight data points. What it is
shows when the pair runs: with the same latents, the log-probabilities of some rows must be the same whether all
arguments are cut to these rows, or to a few more. An argument for which they are not is left whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.pairs.arrays import as_tensor, each, has_rows, unless_on_disk
from pyro_vae.pairs.look import Look
from pyro_vae.pairs.sites import base_distribution, sample_sites

__all__ = ["WINDOW", "Rows", "find_rows"]

WINDOW = 5  # rows of a probe, of which two are looked at again alone
MIDDLE = slice(1, 3)  # not the exact middle: on an even grid its mean would be that of the window
MOST_TRIED = 6  # arguments of one length, of which all subsets are tried; of more only those that leave one out
TOLERANCE = 1e-4  # of log-probabilities, absolute and relative

Key = int | str  # of an argument: its position, or its name


class Rows:
    """How a pair runs on some of the rows of its arguments.

    Args:
        args: of the pair.
        kwargs: of the pair.
        num_points: N, the size of the data plate (of the whole data set, if the plate subsamples it).
        cut_keys: positions and names of the arguments that have a row for each data point.
        fixed: rows of every pass, where the plate subsamples data that the pair holds itself.
        device: where rows go that are read from a memory map.
    """

    def __init__(
        self,
        args: tuple,
        kwargs: Mapping[str, Any],
        num_points: int,
        cut_keys: frozenset[Key],
        fixed: int | None,
        device: torch.device | None = None,
    ) -> None:
        self.num_points, self.cut_keys, self.fixed, self.device = num_points, cut_keys, fixed, device
        self._standing_in: tuple[tuple, dict] | None = None
        self._some: Tensor | None = None
        self.go_on(args, kwargs)

    def go_on(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Takes the next arguments, of the same kind: those of another batch, which may have more or fewer rows."""
        self._args, self._kwargs = each(unless_on_disk if self.cut_keys else as_tensor, args, kwargs, self.device)
        own = [a for key, a in (*enumerate(self._args), *self._kwargs.items()) if key in self.cut_keys]
        if own:
            self.num_points = len(own[0])

    @property
    def args(self) -> tuple:
        """Positional arguments, with all rows in memory."""
        return each(as_tensor, self._args, self._kwargs, self.device)[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments, with all rows in memory."""
        return each(as_tensor, self._args, self._kwargs, self.device)[1]

    @property
    def separable(self) -> bool:
        """Whether the pair can run on some of its rows by cutting arguments."""
        return bool(self.cut_keys)

    @contextmanager
    def using(self, args: tuple, kwargs: dict) -> Iterator[None]:
        """Uses these in place of the arguments, whatever rows are asked for."""
        before, self._standing_in = self._standing_in, (args, kwargs)
        try:
            yield
        finally:
            self._standing_in = before

    @contextmanager
    def only(self, index: Tensor) -> Iterator[None]:
        """Takes some of the data points for all there are, in this order."""
        before = self._some, self.num_points
        self._some, self.num_points = index, len(index)
        try:
            yield
        finally:
            self._some, self.num_points = before

    def cut(self, rows: slice | None) -> tuple[tuple, dict]:
        """The arguments for some rows (None: all), in memory."""
        if self._standing_in is not None:
            return self._standing_in
        if not self.separable or (rows is None and self._some is None):
            return self.args, self.kwargs
        where = rows if self._some is None else self._some[slice(None) if rows is None else rows]
        return _cut(self._args, self._kwargs, self.cut_keys, self.device, where)

    def subsample(self, rows: slice | None) -> Tensor:
        """Indices for a plate of fixed size, which end with `rows` or start the data."""
        assert self.fixed is not None
        stop = max(self.fixed, self.num_points if rows is None else rows.stop)
        return torch.arange(stop - self.fixed, stop)

    def select(self, value: Tensor, rows: slice | None) -> Tensor:
        """The part of (K, N', …) that belongs to `rows`: a plate of fixed size gives more than was asked for."""
        return value if self.fixed is None or rows is None else value[:, -(rows.stop - rows.start) :]


def find_rows(
    run: Callable[..., Look],
    args: tuple,
    kwargs: Mapping[str, Any],
    plate: str,
    device: torch.device | None = None,
) -> tuple[Look, frozenset[Key]] | None:
    """Finds the arguments that have rows, by running the pair on a few of them.

    Args:
        run: (args, kwargs, values=…) -> `Look`.
        args: of the pair.
        kwargs: of the pair.
        plate: name of the plate of data points.
        device: where rows go that are read from a memory map.

    Returns:
        A look at a few rows, and the positions and names of the arguments that were cut for it; None where no
        arguments can be cut, and all rows have to pass together.
    """
    arguments: list[tuple[Key, Any]] = [*enumerate(args), *kwargs.items()]
    lengths = {key: len(a) for key, a in arguments if has_rows(a) and len(a) >= WINDOW}
    for length in dict.fromkeys(lengths.values()):
        keys = [key for key, n in lengths.items() if n == length]
        starts = dict.fromkeys((0, length - WINDOW))
        for subset in _subsets(keys):
            cut = partial(_cut, args, kwargs, subset, device)
            looks = [_probe(run, cut, start, plate) for start in starts]
            if all(looks):
                return looks[0], subset
    return None


def _subsets(keys: list[Key]) -> Iterator[frozenset[Key]]:
    """Subsets that are not empty, the largest first."""
    sizes = range(len(keys), 0, -1) if len(keys) <= MOST_TRIED else [len(keys), len(keys) - 1]
    for size in sizes:
        yield from map(frozenset, combinations(keys, size))


def _probe(run: Callable[..., Look], cut: Callable[[slice], tuple[tuple, dict]], start: int, plate: str) -> Look | None:
    """A look at a window of rows, if the rows in its middle have the same log-probabilities alone."""
    middle = slice(start + MIDDLE.start, start + MIDDLE.stop)
    try:
        window = run(*cut(slice(start, start + WINDOW)))
        if window.size(plate) != WINDOW:
            return None
        values = {n: _middle(s, s["value"], plate, len(s["fn"].event_shape)) for n, s in _latents(window).items()}
        alone = run(*cut(middle), values=values)
    except Exception:  # not these arguments; if the pair itself is at fault, the run on all rows says so
        return None
    if alone.size(plate) != MIDDLE.stop - MIDDLE.start:
        return None
    agree = all(_agree(window, alone, i, plate) for i in range(2))
    return window if agree else None


def _latents(look: Look) -> dict[str, dict]:
    """Sites with a value to be set: not points, which follow from the others."""
    sites = sample_sites(look.model) | sample_sites(look.guide)
    return {
        n: s
        for n, s in sites.items()
        if not s["is_observed"] and not isinstance(base_distribution(s["fn"]), dist.Delta)
    }


def _agree(window: Look, alone: Look, index: int, plate: str) -> bool:
    """Whether the middle rows of a window have the log-probabilities that they have alone, in one of two traces."""
    others = sample_sites(alone[index])
    for name, site in sample_sites(window[index]).items():
        if name not in others:
            return False
        known = [look.log_probs[index] for look in (window, alone)]
        if isinstance(base_distribution(site["fn"]), dist.Delta) or not all(name in found for found in known):
            continue
        first, second = (found[name] for found in known)
        if first is None or second is None:
            return False
        try:
            first, second = torch.broadcast_tensors(_middle(site, first, plate, 0), second)
        except RuntimeError:
            return False
        if not torch.allclose(first, second, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
            return False
    return True


def _middle(site: dict, value: Tensor, plate: str, event_dim: int) -> Tensor:
    """The rows in the middle of a window, of a site's value or log-probability."""
    for frame in site["cond_indep_stack"]:
        axis = value.dim() - event_dim + frame.dim if frame.dim is not None else -1
        if frame.name == plate and axis >= 0 and value.shape[axis] == WINDOW:
            return value.narrow(axis, MIDDLE.start, MIDDLE.stop - MIDDLE.start)
    return value


def _cut(
    args: tuple,
    kwargs: Mapping[str, Any],
    keys: frozenset[Key],
    device: torch.device | None,
    rows: slice | Tensor,
) -> tuple[tuple, dict]:
    def cut(key: Key, a: Any) -> Any:
        if key not in keys:
            return as_tensor(a, device)
        if isinstance(a, Tensor):
            return a[rows if isinstance(rows, slice) else rows.to(a.device)]
        return as_tensor(a[rows if isinstance(rows, slice) else rows.numpy()], device)

    return tuple(cut(i, a) for i, a in enumerate(args)), {name: cut(name, a) for name, a in kwargs.items()}
