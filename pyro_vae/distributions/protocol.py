"""The protocol of distributions of incomplete data, p(x_observed|z): NaN in a value stands for a missing element.

`TakesMissing` is what such a distribution offers. The two functions ask any distribution, so that other modules need
not know which class implements the protocol.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

__all__ = ["TakesMissing", "complete", "ignores_missing"]


@runtime_checkable
class TakesMissing(Protocol):
    """A distribution of data with missing elements, such as that of `ObservedPart`.

    Attributes:
        complete: the distribution of complete data.
    """

    complete: Any


def ignores_missing(distribution: Any) -> bool:
    """Whether the distribution leaves out elements that are NaN, as that of `ObservedPart` does.

    Example:
        >>> import pyro.distributions as dist
        >>> ignores_missing(dist.Normal(0.0, 1.0))
        False
    """
    return isinstance(distribution, TakesMissing)


def complete(distribution: Any) -> Any:
    """The distribution of complete data: `distribution.complete` if it takes missing elements, otherwise itself."""
    return distribution.complete if ignores_missing(distribution) else distribution
