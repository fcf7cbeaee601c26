"""What a VAE is called with: which dimensions of data, codes and contexts are rows, and whether all fit together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.poutine.util import is_validation_enabled
from torch import Size, Tensor

from pyro_vae.arguments import check_count, check_dense
from pyro_vae.distributions.structure import check_conditional, expected_value
from pyro_vae.pairs.checks import check_support

__all__ = [
    "check_contexts",
    "check_event",
    "check_likelihood",
    "check_parts",
    "check_posterior",
    "check_rows_and_contexts",
    "data_plate",
    "event_dims_of",
    "event_dims_of_rows",
    "in_chunks",
    "rows_to_generate",
    "value_of",
]

ROWS_AT_ONCE = 4096  # rows in one pass of generate, reconstruct and similar


def data_plate(size: int, total: int | None) -> Any:
    """The plate "data" of `size` rows; of `total` rows, `size` of which are here, where `total` is given."""
    size = check_count("VAE: size", size)
    if total is None:
        return pyro.plate("data", size)
    if check_count("VAE: total", total) < size:
        raise ValueError(
            f"VAE: expected total, the number of rows of all data, to be at least the {size} rows of this batch, got "
            f"{total}. Try total=len(data)."
        )
    return pyro.plate("data", total, subsample=torch.arange(size))


def event_dims_of_rows(*rows: Tensor) -> list[int]:
    """The number of event dimensions of each tensor of rows, (N, *event)."""
    for x in rows:
        if not isinstance(x, Tensor) or not (x.is_nested or x.dim()):
            got = f"a single number, {x}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"VAE: expected tensors of rows, (N, *event), got {got}. Try torch.as_tensor(x).float().")
        check_dense("VAE", x)
    return [x.dim() - 1 for x in rows]


def event_dims_of(likelihood: Any, x: Tensor, *context: Tensor) -> list[int]:
    """The number of event dimensions of x and contexts in any plates, (*plates, *event): from the likelihood's event
    shape where it tells it, else as for `event_dims_of_rows`."""
    shape = getattr(likelihood, "event_shape", None)
    if shape is None or not isinstance(x, Tensor) or x.is_nested or x.dim() < len(shape):
        return event_dims_of_rows(x, *context)
    for tensor in (x, *context):
        check_dense("VAE", tensor)
    plates = x.dim() - len(shape)
    for c in context:
        if c.dim() < plates:
            raise ValueError(
                f"VAE: expected context in the {plates} plates of x, (*plates, *event), got shape {tuple(c.shape)} "
                f"beside {tuple(x.shape)}. Try c.expand(…)."
            )
    return [len(shape), *(c.dim() - plates for c in context)]


def check_contexts(where: str, size: int, *context: Tensor) -> None:
    """Raises ValueError if a context has not as many rows as the data."""
    event_dims_of_rows(*context)
    for c in context:
        if len(c) != size:
            raise ValueError(
                f"{where}: expected context with one row for each of the {size} rows, got {len(c)} rows. Try "
                f"c[:{size}], or c.expand({size}, …) for one context for all rows."
            )


def check_rows_and_contexts(where: str, x: Tensor, *context: Tensor) -> None:
    event_dims_of_rows(x)
    check_contexts(where, len(x), *context)


def rows_to_generate(size: Any, context: tuple[Tensor, ...]) -> int:
    if isinstance(size, Tensor) and size.dim():
        raise TypeError("generate: expected an int or None as size, got Tensor. Try generate(None, c).")
    return check_count("generate: size", size) if size is not None else len(context[0]) if context else 1


def check_parts(prior: Any, likelihood: Any, posterior: Any) -> tuple[Any, Any, Any]:
    """What a VAE is made of, if each part may be a conditional distribution."""
    return (
        check_conditional("VAE: prior", prior),
        check_conditional("VAE: likelihood", likelihood),
        check_conditional("VAE: posterior", posterior),
    )


def check_event(role: str, distribution: Any, expected: Size, of: str) -> None:
    if distribution.event_shape != expected:
        _mismatch(role, distribution, f"event shape {tuple(expected)}, that of {of}")


def check_posterior(q_z: Any, event: Size, batch: Size) -> None:
    check_event("posterior", q_z, event, "the prior")
    if q_z.batch_shape not in (batch, Size()):
        _mismatch("posterior", q_z, f"batch shape {tuple(batch)}, one distribution for each row")


def check_likelihood(p_x: Any, x: Tensor, event: Size) -> None:
    check_event("likelihood", p_x, event, "a row of the data")
    if is_validation_enabled():
        check_support("x", {"fn": p_x, "value": x, "mask": None})


def value_of(distribution: Any, mean: bool) -> Tensor:
    """A draw, or the mean where it is asked for and known."""
    value = expected_value(distribution) if mean else None
    return distribution.sample() if value is None else value


def in_chunks(rows: Callable[[int, int], Tensor], size: int, draws: int = 1) -> Tensor:
    """rows(start, stop) for all of `size` rows, of which each gives `draws`."""
    if size < 1:
        raise ValueError(f"expected at least one row of data, or one to generate, got {size}. Try x[:1].")
    at_once = max(1, ROWS_AT_ONCE // draws)
    return torch.cat([rows(i, min(i + at_once, size)) for i in range(0, size, at_once)])


def _mismatch(role: str, distribution: Any, expected: str) -> None:
    raise ValueError(
        f"{role}: expected {expected}, got event shape {tuple(distribution.event_shape)} and batch shape "
        f"{tuple(distribution.batch_shape)}. Try .to_event({max(1, len(distribution.batch_shape) - 1)}) on the "
        "distribution, or another event_shape."
    )
