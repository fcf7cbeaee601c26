r"""Figures of the results of a fit: functions that draw arrays on matplotlib axes and return the axes.

Arrays are numpy arrays, tensors (on any device) or lists. Without `ax`, `pyplot` makes a new figure. Matplotlib is
imported when the first figure is drawn; the rest of the package does not need it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.arguments import check_dense, checked

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_embedding",
    "plot_images",
    "plot_interpolation",
    "plot_khat",
    "plot_latent_usage",
    "plot_training",
    "plot_traversal",
]


def plot_training(
    loss: Any, validation_loss: Any = (), *, label: str | None = None, quantity: str = "−ELBO", ax: Axes | None = None
) -> Axes:
    """Plots the loss of each epoch. To add a further run, call it again with the same axes.

    The training loss is a dashed line and the validation loss a solid line, both in the colour of the run. Losses that
    are not finite leave a gap.

    Args:
        loss: training loss, nats per data point, (epochs,), such as `FitResult.loss`.
        validation_loss: nats per data point, (epochs,), such as `FitResult.validation_loss`; empty for none.
        label: name of the run.
        quantity: name of the loss, for the label of the axis.
        ax: where to draw; default: a new figure.

    Returns:
        The axes.

    Example:
        >>> ax = plot_training([120.0, 101.0, 98.0], [105.0, 100.0, 99.0], label="diagonal")
        >>> ax = plot_training([119.0, 99.0, 95.0], [103.0, 97.0, 96.0], label="full", ax=ax)
        >>> ax.get_legend_handles_labels()[1]
        ['diagonal, training', 'diagonal, validation', 'full, training', 'full, validation']
        >>> from matplotlib import pyplot
        >>> pyplot.close(ax.figure)
    """
    ax = _axes(ax)
    colour = None
    for values, what, style in ((loss, "training", "--"), (validation_loss, "validation", "-")):
        values = _array(values)
        if len(values):
            name = what if label is None else f"{label}, {what}"
            marker = "." if len(values) < 2 else None  # one epoch makes no line
            (line,) = ax.plot(np.arange(1, len(values) + 1), values, style, marker=marker, color=colour, label=name)
            colour = line.get_color()
    ax.set(xlabel="epoch", ylabel=f"{quantity} (nats per data point)")
    ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    ax.legend(frameon=False)
    return _lean(ax)


@checked
def plot_images(
    images: Any,
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    cmap: str = "gray_r",
    limits: tuple[float, float] = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Draws a grid of grey images: originals above their reconstructions, samples, or a walk through latent space.

    Args:
        images: (rows, columns, height, width).
        row_labels: a text for each row, shown to its left.
        column_labels: a text for each column, shown above it.
        cmap: name of a matplotlib colormap; the default draws dark on white.
        limits: values that get the first and the last colour.
        ax: where to draw; default: a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: `images` has another shape, or the number of labels differs from the number of rows or columns.

    Example:
        >>> ax = plot_images(np.zeros((2, 5, 8, 8)), row_labels=["data", "reconstruction"])
        >>> [text.get_text() for text in ax.get_yticklabels()]
        ['data', 'reconstruction']
        >>> from matplotlib import pyplot
        >>> pyplot.close(ax.figure)
    """
    images = _array(images).astype(float)
    if images.ndim != 4:
        raise ValueError(
            f"images: expected shape (rows, columns, height, width), got {images.shape}. Try x.unflatten(0, (2, 5)), "
            "or x[None] for one row."
        )
    rows, columns, height, width = images.shape
    for name, labels, number in (("row_labels", row_labels, rows), ("column_labels", column_labels, columns)):
        if labels is not None and len(labels) != number:
            raise ValueError(f"{name}: expected {number}, got {len(labels)}.")
    gap = max(1, round(height / 28))
    images = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=np.nan)  # NaN shows the background
    mosaic = images.swapaxes(1, 2).reshape(rows * (height + gap), columns * (width + gap))[:-gap, :-gap]
    ax = _axes(ax)
    ax.set_facecolor("0.85")  # shows where a white image ends
    ax.imshow(mosaic, cmap=cmap, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    ax.set_yticks(np.arange(rows) * (height + gap) + (height - 1) / 2 if row_labels else [], row_labels or [])
    ax.set_xticks(np.arange(columns) * (width + gap) + (width - 1) / 2 if column_labels else [], column_labels or [])
    ax.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    ax.spines[:].set_visible(False)
    return ax


@checked
def plot_traversal(
    decode: Callable[[Any], Any],
    z: Any,
    *,
    dimensions: Sequence[int] | None = None,
    steps: Sequence[float] = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0),
    row_labels: Sequence[str] | None = None,
    ax: Axes | None = None,
    **options: Any,
) -> Axes:
    """Shows what each latent dimension does: each row has images of z in which only one dimension moves.

    Args:
        decode: maps a tensor of codes (rows, columns, D) to images (rows, columns, height, width), such as
            `lambda z: vae.decode(z).mean`.
        z: the code that is moved, a tensor (D,), such as the posterior mean of an image.
        dimensions: the dimensions to move, from 0; default: all.
        steps: the amounts that are added to the dimension.
        row_labels: a text for each dimension; default: its number, from 1.
        ax: where to draw; default: a new figure.
        **options: passed to `plot_images`.

    Returns:
        The axes.

    Example:
        >>> import torch
        >>> ax = plot_traversal(lambda z: z[..., None, :].expand(*z.shape[:-1], 4, -1), torch.zeros(3))
        >>> [text.get_text() for text in ax.get_yticklabels()]
        ['$z_{1}$', '$z_{2}$', '$z_{3}$']
        >>> from matplotlib import pyplot
        >>> pyplot.close(ax.figure)
    """
    dimensions = range(len(z)) if dimensions is None else dimensions
    codes = z.repeat(len(dimensions), len(steps), 1)
    for row, dimension in enumerate(dimensions):
        codes[row, :, dimension] += codes.new_tensor(steps)
    labels = [f"$z_{{{d + 1}}}$" for d in dimensions] if row_labels is None else row_labels
    columns = ["0" if s == 0 else f"{s:+g}".replace("-", "−") for s in steps]
    return plot_images(decode(codes), row_labels=labels, column_labels=columns, ax=ax, **options)


@checked
def plot_interpolation(
    decode: Callable[[Any], Any], start: Any, stop: Any, *, num: int = 9, ax: Axes | None = None, **options: Any
) -> Axes:
    """Draws images along straight lines in latent space from `start` to `stop`, one row for each line.

    Args:
        decode: as for `plot_traversal`.
        start: codes at the left ends, a tensor (rows, D).
        stop: codes at the right ends, a tensor (rows, D).
        num: number of images in a row, including both ends.
        ax: where to draw; default: a new figure.
        **options: passed to `plot_images`.

    Returns:
        The axes.

    Example:
        >>> import torch
        >>> ax = plot_interpolation(lambda z: z[..., None], torch.zeros(2, 3), torch.ones(2, 3), num=5)
        >>> from matplotlib import pyplot
        >>> pyplot.close(ax.figure)
    """
    share = start.new_tensor(np.linspace(0.0, 1.0, num)).reshape(1, num, 1)
    return plot_images(decode(start.unsqueeze(1) * (1 - share) + stop.unsqueeze(1) * share), ax=ax, **options)


def plot_latent_usage(kl: Any, active: Any, *, label: str | None = None, ax: Axes | None = None) -> Axes:
    """Plots KL(q‖p) of each latent dimension, the largest first, with inactive dimensions in grey.

    Args:
        kl: (D,), nats, such as `LatentUsage.kl`.
        active: (D,), such as `LatentUsage.active`.
        label: text at the start of the title.
        ax: where to draw; default: a new figure.

    Returns:
        The axes.

    Example:
        >>> ax = plot_latent_usage([0.0, 2.1, 0.7], [False, True, True], label="beta = 1")
        >>> ax.get_title()
        'beta = 1: 2 of 3 active, 2.80 nats'
        >>> from matplotlib import pyplot
        >>> pyplot.close(ax.figure)
    """
    kl, active = _array(kl).astype(float), _array(active).astype(bool)
    order = np.argsort(-kl)
    ax = _axes(ax)
    ax.bar(np.arange(len(kl)), kl[order], color=np.where(active[order], "tab:blue", "0.7"))
    title = f"{int(active.sum())} of {len(active)} active, {kl.sum():.2f} nats"
    ax.set(xlabel="latent dimension, sorted", ylabel="KL(q‖p) (nats)", title=f"{label}: {title}" if label else title)
    ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    return _lean(ax)


def plot_embedding(
    points: Any, classes: Any = None, *, class_names: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Plots points in the plane, such as posterior means, coloured by class.

    Args:
        points: (N, 2). Project codes with more dimensions first, and say so in the axis labels.
        classes: (N,), integers from 0; default: one colour.
        class_names: a name for each class, for the legend; default: the numbers.
        ax: where to draw; default: a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: `points` has another shape.

    Example:
        >>> ax = plot_embedding(np.eye(2), [0, 1], class_names=["cat", "dog"])
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['cat', 'dog']
        >>> from matplotlib import pyplot
        >>> pyplot.close(ax.figure)
    """
    import matplotlib

    points = _array(points)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points: expected shape (N, 2), got {points.shape}. Try two of their principal components.")
    ax = _axes(ax)
    style = {"s": np.clip(4000 / max(len(points), 1), 4, 30), "alpha": 0.8, "linewidths": 0, "rasterized": True}
    if classes is None:
        ax.scatter(*points.T, **style)
    else:
        classes = _array(classes).astype(int)
        names = range(classes.max() + 1) if class_names is None else class_names
        # up to ten classes get distinct colours; more classes get a scale with even steps in lightness
        colours = np.array(
            matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
            if len(names) <= 10
            else matplotlib.colormaps["viridis"](np.linspace(0, 1, len(names)))[:, :3]
        )
        ax.scatter(*points.T, c=colours[classes], **style)  # type: ignore[misc]  # all at once: no class is drawn over the others
        for name, colour in zip(names, colours, strict=False):
            ax.scatter([], [], s=40, color=colour, label=name)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handletextpad=0.2)
    ax.set(xlabel="$z_1$", ylabel="$z_2$")
    ax.set_aspect("equal", adjustable="datalim")  # distances mean the same in all directions
    return _lean(ax)


def plot_khat(khat: Any, threshold: float = 0.7, *, label: str | None = None, ax: Axes | None = None) -> Axes:
    """Plots the Pareto k-hat of each data point and the line above which its importance weights cannot be trusted.

    Values that are not finite cannot be drawn. The title counts them separately from those above the threshold.

    Args:
        khat: (N,), such as `Evidence.pareto_khat`.
        threshold: the largest k-hat to trust, such as `Evidence.threshold`.
        label: text at the start of the title.
        ax: where to draw; default: a new figure.

    Returns:
        The axes.

    Example:
        >>> ax = plot_khat([0.1, 0.9, float("nan")], label="diagonal")
        >>> ax.get_title()
        'diagonal: 1 of 3 above 0.70, 1 not finite (not shown)'
        >>> from matplotlib import pyplot
        >>> pyplot.close(ax.figure)
    """
    khat = _array(khat).astype(float)
    finite = np.isfinite(khat)
    row = np.arange(len(khat))
    above = finite & (khat > threshold)
    ax = _axes(ax)
    size = np.clip(9000 / max(len(khat), 1), 6, 30)
    for which, colour in ((finite & ~above, "tab:blue"), (above, "tab:red")):
        ax.scatter(row[which], khat[which], s=size, alpha=0.7, linewidths=0, color=colour)
    ax.axhline(threshold, color="0.2", linestyle="--", linewidth=1)
    title = f"{int(above.sum())} of {len(khat)} above {threshold:.2f}"
    if not finite.all():
        title += f", {int((~finite).sum())} not finite (not shown)"
    ax.set(xlabel="data point", ylabel="Pareto k-hat", title=title if label is None else f"{label}: {title}")
    return _lean(ax)


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        check_dense("plots", values)
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if not array.ndim or array.dtype.kind not in "fiub":
        raise TypeError(f"plots: expected an array of real numbers, got {values!r}. Try np.asarray(x, float).")
    return array


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(layout="constrained")[1]


def _lean(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    return ax
