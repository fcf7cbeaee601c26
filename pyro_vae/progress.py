"""One progress bar for everything that takes longer than a second."""

from __future__ import annotations

from tqdm.auto import tqdm

__all__ = ["progress_bar"]


def progress_bar(total: int | None, what: str, show: bool, *, unit: str = "", leave: bool = False) -> tqdm:
    """A `tqdm` bar that is silent when standard error is not a terminal, or where it is not to `show`."""
    return tqdm(total=total, desc=what, disable=None if show else True, unit=unit, unit_scale=True, leave=leave)
