"""Figures of ranks and of coverage, within their simultaneous bands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_coverage", "plot_ranks"]

MOST_NAMED = 10  # lines with a label


def plot_ranks(ecdf: Mapping[str, Tensor], bands: tuple[Tensor, Tensor], ax: Axes | None = None) -> Axes:
    """Differences of distribution functions of ranks from the uniform one, {name: (L, …)}, and the band, 2 × (L,)."""
    ax, expected = _axes(ax), _expected(len(bands[0]))
    ax.fill_between(expected, bands[0] - expected, bands[1] - expected, color="0.85", lw=0, label="calibrated")
    columns = [(name, column) for name, value in ecdf.items() for column in value.reshape(len(value), -1).T.cpu()]
    for i, (name, column) in enumerate(columns):
        label = name if i == 0 or name != columns[i - 1][0] else None
        ax.plot(expected, column - expected, lw=1, label=label if i < MOST_NAMED else None)
    ax.axhline(0.0, color="0.5", lw=0.8)
    ax.set(xlabel="rank of z* among the draws, as a share", ylabel="share of lower ranks, less the expected one")
    return _finished(ax)


def plot_coverage(coverage: Mapping[str, Tensor], bands: tuple[Tensor, Tensor], ax: Axes | None = None) -> Axes:
    """Empirical coverage, {name: (L,)}, over the nominal one, and the band, 2 × (L,)."""
    ax, expected = _axes(ax), _expected(len(bands[0]))
    ax.fill_between(expected, bands[0], bands[1], color="0.85", lw=0, label="calibrated")
    for name, value in coverage.items():
        ax.plot(expected, value.cpu(), lw=1, label=name)
    ax.plot([0, 1], [0, 1], color="0.5", lw=0.8)
    ax.set(xlabel="nominal coverage", ylabel="empirical coverage")
    return _finished(ax)


def _expected(num_draws: int) -> Tensor:
    return torch.arange(1, num_draws + 1, dtype=torch.double) / (num_draws + 1)


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(layout="constrained")[1]


def _finished(ax: Axes) -> Axes:
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
