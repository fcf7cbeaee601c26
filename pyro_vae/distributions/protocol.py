"""`TakesMissing`: what a distribution says of itself if NaN in its value stands for a missing element."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

__all__ = ["TakesMissing", "complete"]


@runtime_checkable
class TakesMissing(Protocol):
    """A distribution of data with missing elements, such as that of `ObservedPart`.

    Attributes:
        complete: the distribution of complete data.
    """

    complete: Any


def complete(distribution: Any) -> Any:
    """The distribution of complete data; most distributions are that themselves."""
    return distribution.complete if isinstance(distribution, TakesMissing) else distribution
