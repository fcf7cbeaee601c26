"""Rows found again by their values: what was fitted for some data points belongs to them, in whatever call they come.

Rows with the same values in all arguments that have rows have the same posterior, given what is outside of the plate.
So values say which row it is: any selection of the rows, in any order, is found, and twins share what one of them has.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyro_vae.pairs.modes import is_recording
from pyro_vae.pairs.rows import Rows

__all__ = ["OwnRows"]

WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
AT_ONCE = 4096  # rows whose hash is computed together


class OwnRows:
    """The arguments that something was made for.

    Args:
        rows: of the pair.
        name: of what was made, for messages.
    """

    def __init__(self, rows: Rows, name: str) -> None:
        self.name, self.num_points = name, rows.num_points
        every: dict[Any, Any] = dict([*enumerate(rows.args), *rows.kwargs.items()])
        self.own = {key: _copy(value) for key, value in every.items() if key in rows.cut_keys}
        self.others = {key: _copy(value) for key, value in every.items() if key not in rows.cut_keys}
        generator = torch.Generator().manual_seed(0)
        sizes = [_bits(value[:1]).shape[1] for value in self.own.values()]
        # odd numbers, by which the bits of a row are summed: none of them is lost
        self.weights = [torch.randint(-(2**62), 2**62, (n,), generator=generator) * 2 + 1 for n in sizes]
        self._hashed: dict[torch.device, tuple[list[Tensor], Tensor, Tensor]] = {}

    def find(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Which of the rows these are, (n,), int64; None: all of them, as they were.

        Raises:
            ValueError: other arguments, or rows that are none of them.
        """
        every: dict[Any, Any] = dict([*enumerate(args), *kwargs.items()])
        for key, value in self.others.items():
            if not _same(value, every.get(key)):
                raise self._error(f"argument {key!r} has another value")
        parts = [(self.own[key], every.get(key)) for key in self.own]
        for key, (mine, given) in zip(self.own, parts, strict=True):
            if not isinstance(given, Tensor) or given.shape[1:] != mine.shape[1:] or given.dtype != mine.dtype:
                got = f"{tuple(given.shape)}, {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
                raise self._error(
                    f"argument {key!r}: expected rows of {tuple(mine.shape[1:])}, {mine.dtype}, got {got}"
                )
        if not parts:
            return None
        theirs = [given for _, given in parts]
        if len({len(given) for given in theirs}) > 1:
            raise self._error(f"got arguments of {' and '.join(str(len(given)) for given in theirs)} rows")
        weights, hashes, order = self._on(theirs[0].device)
        place = torch.searchsorted(hashes, _hash(theirs, weights)).clamp(max=self.num_points - 1)
        index = order[place]
        if not is_recording():
            found = torch.ones_like(index, dtype=torch.bool)
            for mine, given in parts:
                found &= (_bits(mine.to(given.device)[index]) == _bits(given)).all(1)
            if not bool(found.all()):
                count, first = int((~found).sum()), int((~found).nonzero()[0])
                raise self._error(f"{count} of {len(found)} rows are none of them, the first at row {first}")
        return index

    def _on(self, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor]:
        """Weights, sorted hashes and which row each is of, on a device."""
        if device not in self._hashed:
            weights = [weight.to(device) for weight in self.weights]
            hashes, order = _hash([value.to(device) for value in self.own.values()], weights).sort(stable=True)
            self._hashed[device] = weights, hashes, order
        return self._hashed[device]

    def _error(self, got: str) -> ValueError:
        return ValueError(
            f"{self.name}: it belongs to the {self.num_points} data points that it was made for; expected some of "
            f"these rows, with the same other arguments, got others: {got}. Try refine(model, guide, …) with the "
            "arguments at hand (for simulated data, with those that were simulated), or the amortized guide itself."
        )


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _same(first: Any, second: Any) -> bool:
    """Whether two arguments are the same; what cannot be compared is."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
            return False
        if first.shape != second.shape or first.dtype != second.dtype:
            return False
        return is_recording() or torch.equal(_bits(first.to(second.device)), _bits(second))
    if first is None or second is None or isinstance(first, (bool, int, float, str)):
        return type(first) is type(second) and first == second
    return True


def _bits(value: Tensor) -> Tensor:
    """The values of each row as whole numbers, (n, size): NaN, which stands for what is missing, equals itself."""
    value = value.detach().contiguous()
    value = value.reshape(len(value), prod(value.shape[1:])) if value.dim() else value.reshape(1, 1)
    if value.dtype is torch.bool:
        value = value.to(torch.uint8)
    return value.view(WIDTHS[value.element_size()])


def _mixed(bits: Tensor) -> Tensor:
    """Bits of which the lowest hang on the highest, which a product loses: 0.0 and 1.0 differ in these alone."""
    bits = bits.to(torch.int64)
    bits = bits ^ (bits >> 32)
    return bits ^ (bits >> 16)


def _hash(values: list[Tensor], weights: list[Tensor]) -> Tensor:
    """A number for the bits of each row, (n,), int64."""
    sums = []
    for value, weight in zip(values, weights, strict=True):
        sums.append(torch.cat([(_mixed(part) * weight).sum(1) for part in _bits(value).split(AT_ONCE)]))
    return torch.stack(sums).sum(0)
