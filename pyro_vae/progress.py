"""One progress bar for everything that takes longer than a second."""

from __future__ import annotations

from tqdm.auto import tqdm

__all__ = ["progress_bar"]


def progress_bar(total: int | None, what: str, show: bool, *, unit: str = "", leave: bool = False) -> tqdm:
    """A `tqdm` progress bar. It is silent if `show` is false or if standard error is not a terminal."""
    return tqdm(total=total, desc=what, disable=None if show else True, unit=unit, unit_scale=True, leave=leave)
