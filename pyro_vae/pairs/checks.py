"""What data must be before anything is computed from them, and the errors that say so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["check_rows", "check_support", "ignores_missing"]


def check_rows(data: Any, *, start: int = 0, incomplete: Iterable[Tensor] = ()) -> None:
    """Raises ValueError if a floating tensor in `data` (nested tuples and dicts) has a row that is not finite.

    `start` is the index of the first row, for the message; `incomplete` are tensors in which NaN stands for a missing
    value.
    """
    values = data.values() if isinstance(data, dict) else data if isinstance(data, (tuple, list)) else [data]
    for i, x in enumerate(values):
        if isinstance(x, (tuple, list, dict)):
            check_rows(x, start=start, incomplete=incomplete)
        elif isinstance(x, Tensor) and x.is_floating_point() and x.dim() and not torch.isfinite(x.sum()):
            may_miss = any(x is y for y in incomplete)
            bad = (x.isinf() if may_miss else ~torch.isfinite(x)).reshape(len(x), -1).any(1)
            if bad.any():
                raise ValueError(
                    f"argument {i}: {int(bad.sum())} of {len(x)} rows are {'' if may_miss else 'NaN or '}infinite, the "
                    f"first at row {start + int(bad.nonzero()[0])}. Try x[torch.isfinite(x).flatten(1).all(1)], or to "
                    "fill them in; for missing values, ObservedPart(likelihood) and MaskedInput(network)."
                )


def ignores_missing(site: dict) -> bool:
    """Whether NaN in the observed value of a trace's site stands for a missing element, as with `ObservedPart`."""
    return getattr(site["fn"], "ignores_missing", False)


def check_support(name: str, site: dict, start: int = 0) -> None:
    """Raises ValueError if the observed value of a trace's site lies outside the support of its distribution."""
    fn, value = site["fn"], site["value"]
    if site["mask"] is not None or isinstance(fn, dist.MaskedDistribution):
        return
    try:
        inside = fn.support.check(value)
    except (AttributeError, NotImplementedError):
        return
    if bool(inside.all()):
        return
    bad = (~inside).reshape(len(inside), -1).any(1) if inside.dim() else ~inside.reshape(1)
    row = int(bad.nonzero()[0])
    base = getattr(fn, "complete", fn)
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    family = type(base).__name__
    advice = "Try another likelihood, or transform the data."
    if base.support is constraints.boolean:
        advice = "Try (x > 0.5).to(x.dtype), or torch.bernoulli(x) for a fresh binarisation, or a Normal likelihood."
    elif isinstance(base, dist.Normal):
        advice = "Try to fill in or drop values that are not finite."
    outside = value.reshape(len(inside), -1)[row] if inside.dim() else value.reshape(-1)
    outside = outside[~outside.isnan()] if ignores_missing(site) else outside
    raise ValueError(
        f"site {name!r}: {int(bad.sum())} of {bad.numel()} rows lie outside the support of {family} ({base.support}), "
        f"the first at row {start + row}, with values from {float(outside.min()):.4g} to {float(outside.max()):.4g}. "
        + advice
    )
