"""What an amortized guide's network reads: rows of the arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

__all__ = ["PlateRows", "features_of", "first_tensor"]


class PlateRows(NamedTuple):
    """The rows of the data plate in a call.

    Attributes:
        size: their number.
        full_size: of how many.
        indices: which ones, where they are not all.
        permuted: whether they are all, in an order that the plate was given.
    """

    size: int
    full_size: int
    indices: Tensor | None
    permuted: bool

    def check_order(self, guide: str) -> None:
        """Raises ValueError where arguments may be in the order of the plate, or in another."""
        if self.permuted:
            raise ValueError(
                f"{guide}: the plate is given all {self.size} rows in an order of its own; expected to know whether "
                "the arguments are in that order too. Try inputs=…, a function of the arguments that gives rows in the "
                "order of the plate, such as inputs=lambda x, index: x[index]."
            )


def first_tensor(*args: Any, **kwargs: Any) -> Tensor:
    """The first argument that is a tensor with rows; a vector is a column of rows."""
    rows = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()), None)
    if rows is None:
        raise ValueError(
            "amortized guide: expected a tensor among the arguments, whose rows the network reads, got none. Try "
            "inputs=…, a function of the arguments."
        )
    return rows.unsqueeze(-1) if rows.dim() == 1 else rows


def features_of(network: Callable, rows: Any, guide: str, plate: PlateRows | None = None) -> Tensor:
    """h of the rows, (N, F).

    Args:
        network: maps rows to features.
        rows: a tensor, or a tuple of these.
        guide: name of the guide, for messages.
        plate: the rows of the call; None does not compare.

    Raises:
        ValueError: another number of rows than the plate has, rows of another width than the network takes, or an
            output that is not (N, F) or, where Pyro validates, not finite.
    """
    rows = rows if isinstance(rows, tuple) else (rows,)
    for r in rows:
        if not isinstance(r, Tensor) or r.dim() == 0:
            raise ValueError(
                f"{guide}: inputs: expected a tensor with a row for each data point, or a tuple of these, got "
                f"{type(r).__name__}. Try inputs=lambda x: x."
            )
    lengths = {len(r) for r in rows}
    if plate is not None and lengths != {plate.size}:
        if plate.indices is None or lengths != {plate.full_size}:
            raise ValueError(
                f"{guide}: inputs: expected {plate.size} rows, as the plate has, got "
                f"{', '.join(map(str, sorted(lengths)))}. Try inputs=…, a function of the arguments "
                "that gives a row for each data point."
            )
        rows = tuple(r[plate.indices] for r in rows)
    weight = next(iter(network.parameters()), None) if isinstance(network, nn.Module) else None
    if weight is not None:  # counts and masks are read as numbers
        rows = tuple(r.to(weight.dtype) if not r.is_floating_point() and not _embeds(network) else r for r in rows)
        for r in rows:
            if r.is_floating_point() and r.dtype != weight.dtype:
                raise TypeError(
                    f"{guide}: inputs: expected rows of {weight.dtype}, the dtype of the network, got {r.dtype}. Try "
                    f"x.to({weight.dtype}), or network.double()."
                )
    try:
        features = network(*rows)
    except RuntimeError as error:
        shapes = " and ".join(str(tuple(r.shape[1:])) for r in rows)
        raise ValueError(
            f"{guide}: network: it does not take rows of shape {shapes}{_expects(network)}: {error}. Try a network "
            f"whose input has the width {rows[0].shape[-1]}, or inputs=…, a function of the arguments."
        ) from error
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(rows[0]):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"{guide}: network: expected features of shape ({len(rows[0])}, width), a row for each data point, got "
            f"{got}. Try nn.Flatten() at its end."
        )
    if is_validation_enabled():  # as Pyro asks its distributions
        _check_finite(features, rows, guide)
    return features


def _check_finite(features: Tensor, rows: tuple[Tensor, ...], guide: str) -> None:
    bad = ~features.isfinite().all(1)
    if not bad.any():
        return
    first = int(bad.nonzero()[0])
    finite = all(bool(r[bad].isfinite().all()) for r in rows)
    advice = (
        "a look at the weights: where training lost them, a lower learning rate, or clip_norm=10.0 in `fit`"
        if finite
        else "to fill these rows in, or to drop them; for missing values, MaskedInput(network)"
    )
    raise ValueError(
        f"{guide}: network: expected finite features, got NaN or infinite ones in {int(bad.sum())} of {len(bad)} rows, "
        f"the first at row {first}{'' if finite else ', where its inputs are NaN or infinite'}. Try {advice}."
    )


def _embeds(network: Any) -> bool:
    return any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in network.modules())


def _expects(network: Any) -> str:
    modules = network.modules() if isinstance(network, nn.Module) else ()
    first = next((m for m in modules if isinstance(m, nn.Linear)), None)
    return "" if first is None else f" (its first layer takes a width of {first.in_features})"
