r"""Training: `fit` minimises −ELBO per data point of any (model, guide) pair with one torch optimizer.

What `pyro.infer.SVI` does, with an epoch around it: one (fused) optimizer over all parameters instead of one for each,
clipping by the global norm, mini-batches with a ragged last one, validation, early stopping, and an answer to
"where did the NaN come from". All parameters that take part are trained: those of `pyro.param` and `pyro.module`, and
those of every module that model and guide call; `requires_grad_(False)` freezes.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_vae.compiled.elbo import CompiledELBO
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.progress import progress_bar
from pyro_vae.training.data import Batches
from pyro_vae.training.parameters import Pair
from pyro_vae.training.resume import Resumable
from pyro_vae.training.steps import Steps

__all__ = ["FitResult", "fit"]


@dataclass
class FitResult:
    """What a fit did; losses are −ELBO (or another loss), in nats per data point, one for each epoch.

    Attributes:
        loss: mean over the epoch's batches, weighted by their rows, while the weights moved.
        validation_loss: after the epoch, in evaluation mode, with the same random numbers each time; NaN for epochs of
            a checkpoint that had no validation data yet.
        num_steps: optimizer steps taken.
        best_epoch: index of the lowest validation loss, whose weights were kept if `patience` was given (where it was
            added to a checkpoint, the lowest since then).
    """

    loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    num_steps: int = 0
    best_epoch: int | None = None

    def __repr__(self) -> str:
        parts = [f"{len(self.loss)} epochs", f"{self.num_steps} steps"]
        if self.loss:
            parts.append(f"last loss {self.loss[-1]:.3f}")
        if self.best_epoch is not None:
            parts.append(f"best validation loss {self.validation_loss[self.best_epoch]:.3f} at [{self.best_epoch}]")
        return f"FitResult({', '.join(parts)})"

    def _stalled(self, patience: int | None) -> bool:
        """Whether the last `patience` epochs brought no lower validation loss."""
        return patience is not None and self.best_epoch is not None and len(self.loss) > self.best_epoch + patience


def fit(
    model: Callable,
    guide: Callable,
    data: Any,
    *,
    num_epochs: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    loss: ELBO | None = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip_norm: float | None = None,
    validation_data: Any = None,
    patience: int | None = None,
    plate: str = "data",
    seed: int | None = None,
    device: str | torch.device | None = None,
    compile: bool | str = "auto",
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> FitResult:
    """Trains a Pyro model and guide by stochastic variational inference, in epochs of mini-batches.

    Each step takes the gradient of loss(model, guide, *batch) / N', with N' the size of the data plate (the rows of the
    batch, or all rows where the plate scales a batch up to them), so that it estimates −ELBO per data point.

    Args:
        model: a Pyro model, called with the tensors of a batch.
        guide: its guide.
        data: a tensor, a numpy array or memory map, a tuple of these with equal first dimensions (x, *context), or a
            torch `DataLoader` of tensors or tuples. Floating numpy arrays take the dtype of the parameters.
        num_epochs: passes over the data.
        batch_size: rows of a batch; the last of an epoch may be smaller. Unused with a DataLoader.
        learning_rate: of the default optimizer, Adam (fused where torch has it).
        loss: any `pyro.infer.ELBO`; default `Trace_ELBO()`. It is copied, never changed.
        optimizer: makes a torch optimizer from a list of parameters.
        scheduler: makes a learning-rate scheduler from the optimizer; stepped after every epoch (a
            `ReduceLROnPlateau` with the validation loss, or the loss).
        clip_norm: largest global norm of the gradient of the loss per data point, positive.
        validation_data: as `data`; its loss is computed after every epoch.
        patience: stop after so many epochs without a lower validation loss, and keep the best weights.
        plate: name of the plate of data points.
        seed: makes the run repeatable; the global random state is then left as it was.
        device: where to train; "auto" is CUDA where there is one; default: where the parameters are. Modules that take
            part stay there afterwards.
        compile: whether steps are compiled (`CompiledELBO`): True, False, or "auto": Pyro as it is for less than 300
            steps, its operations recorded and replayed for less than 3000, beyond that through generated code, which
            takes seconds to make. A pair that cannot be compiled runs as it is, with a warning.
        checkpoint: a file that everything needed to go on is written to, atomically: weights, optimizer, scheduler,
            random state, losses, the best weights; after the first epoch, the last, and others at most every ten
            seconds. Where the file exists, the run goes on from it, on the same random numbers: the same call, started
            again, ends where an uninterrupted one would (to the rounding of compiled code). `num_epochs` may be larger
            then, `validation_data` and `patience` may be new; a call whose rows, batch size, seed, learning rate,
            scheduler or loss is another is refused, as far as their numbers and types tell.
        progress: show a progress bar, if on a terminal.

    Returns:
        `FitResult`.

    Raises:
        ValueError: empty or unequal data, rows that are not finite or outside the support of their likelihood, two
            modules under one name in Pyro's parameter store, a device that is not there, a checkpoint of another fit, a
            loss that is not finite (the message names step, site and row; the last finite weights stay in place).
        TypeError: arguments of the wrong type or dtype.

    Warns:
        UserWarning: a learned scale of a likelihood that has collapsed; an objective that ends at a weight of the KL
            term other than one, or has a capacity.

    Example:
        >>> from pyro_vae import VAE
        >>> from pyro_vae.distributions import ConditionalNormal, StandardNormal
        >>> from pyro_vae.networks import MLP
        >>> vae = VAE(StandardNormal(1), ConditionalNormal(MLP(1, []), 3, scale=1.0), ConditionalNormal(MLP(3, []), 1))
        >>> result = fit(vae.model, vae.guide, torch.randn(100, 3), num_epochs=5, learning_rate=0.01, seed=0)
        >>> len(result.loss), result.num_steps
        (5, 5)
        >>> result
        FitResult(5 epochs, 5 steps, last loss ...)
    """
    _check_arguments(num_epochs, batch_size, loss, clip_norm, patience, validation_data, compile)
    result = FitResult()
    with ExitStack() as stack:
        if seed is not None:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(seed)
        batches = Batches(data, batch_size)
        validation = None if validation_data is None else Batches(validation_data, batch_size, name="validation_data")
        pair = Pair(model, guide, plate)
        everything = [batches] if validation is None else [batches, validation]
        first = next(iter(batches.to(pair.device)))
        try:
            pair.look(first)
        except Exception as error:
            batches.explain(error)
            raise
        for rows in everything:
            rows.to(pair.move(device))
            if rows is validation:
                pair.try_out(rows)
            pair.check(rows)
        compiled = loss if isinstance(loss, CompiledELBO) else None
        elbo = copy.copy(compiled.elbo if compiled else Trace_ELBO() if loss is None else loss)
        optim = _make_optimizer(optimizer, pair.parameters, learning_rate)
        steps = Steps(pair, batches, elbo, optim, clip_norm, compiled or _compiled(elbo, compile, num_epochs, batches))
        rates = [float(group["lr"]) if "lr" in group else None for group in optim.param_groups]
        schedule = None if scheduler is None else scheduler(optim)
        total = None if batches.num_rows is None else num_epochs * batches.num_rows
        bar = stack.enter_context(progress_bar(total, "", progress, unit="row", leave=True))
        arguments = {
            "rows": batches.num_rows,
            "batch_size": batch_size if batches.loader is None else batches.loader.batch_size,
            "seed": None if seed is None else int(seed),
            "learning_rate": rates[0] if len(rates) == 1 else rates,
            "scheduler": None if schedule is None else type(schedule).__name__,
            "loss": type(elbo).__name__,
        }
        state = Resumable(checkpoint, pair, steps, optim, schedule, vars(result), arguments)
        state.resume()
        if patience is None:
            state.best = None
        elif state.best is None:
            result.best_epoch = None  # whose weights nobody has
        if validation is not None:
            result.validation_loss += [math.nan] * (len(result.loss) - len(result.validation_loss))
        bar.update(len(result.loss) * (batches.num_rows or 0))
        for epoch in range(len(result.loss), num_epochs):
            if result._stalled(patience):
                break
            bar.set_description(f"epoch {epoch + 1}/{num_epochs}")
            pair.remember()
            total, rows = torch.zeros((), dtype=torch.float64, device=pair.device), 0
            for batch in batches.shuffled():
                total += steps(batch) * batch.size
                rows += batch.size
                bar.update(batch.size)
            steps.end_epoch()
            result.num_steps = steps.count
            result.loss.append(total.item() / rows)
            note = f"loss {result.loss[-1]:.3f}"
            if validation is not None:
                result.validation_loss.append(_evaluate(pair, elbo, validation))
                note += f", validation {result.validation_loss[-1]:.3f}"
                if result.best_epoch is None or result.validation_loss[-1] < result.validation_loss[result.best_epoch]:
                    result.best_epoch = epoch
                    state.best = None if patience is None else pair.state_copy()
            bar.set_postfix_str(f"{note} nats/row")
            if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                schedule.step((result.validation_loss or result.loss)[-1])
            elif schedule is not None:
                schedule.step()
            state.write(last=epoch == num_epochs - 1 or result._stalled(patience))
        if state.best is not None:
            pair.restore(state.best)
        optim.zero_grad(set_to_none=True)
        beta = getattr(elbo, "beta", 1.0)
        capacity = getattr(elbo, "capacity", None) is not None
        if beta != 1.0 or capacity:
            warnings.warn(
                f"fit ended at beta = {beta:.4g}{' and a capacity' if capacity else ''}: its losses are no bound of "
                f"log p(x). Validation losses and evidence are those of beta = 1{' and none' if capacity else ''}.",
                stacklevel=2,
            )
        collapsed = pair.collapsed_scales(first)
        if collapsed:
            warnings.warn(f"fit: {collapsed}", stacklevel=2)
    return result


def _evaluate(pair: Pair, elbo: ELBO, batches: Batches) -> float:
    """Loss per data point in evaluation mode, with the same random numbers each time so that epochs compare."""
    total, rows = 0.0, 0
    with torch.random.fork_rng(), torch.no_grad(), evaluation_mode(), pyro.validation_enabled(False):
        torch.manual_seed(0)
        for batch in batches:
            value = elbo.loss(pair.model, pair.guide, *batch.inputs)
            total += float(value[0] if isinstance(value, tuple) else value) / pair.data_points(batch) * batch.size
            rows += batch.size
    return total / rows if math.isfinite(total) else math.inf  # which is never the lowest


def _make_optimizer(make: Callable | None, parameters: list[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    if make is None:
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
        return torch.optim.Adam(parameters, lr=learning_rate, fused=fused)
    got = f"a {type(make).__module__}.{type(make).__name__}"
    if callable(make) and not isinstance(make, (torch.optim.Optimizer, PyroOptim)):
        optim = make(parameters)
        if isinstance(optim, torch.optim.Optimizer):
            return optim
        got = f"one that makes a {type(optim).__module__}.{type(optim).__name__}"
    raise TypeError(
        f"optimizer: expected a callable that makes a torch optimizer from a list of parameters, got {got}. "
        "Try optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3)."
    )


def _compiled(elbo: ELBO, compile: bool | str, num_epochs: int, batches: Batches) -> CompiledELBO | None:
    """What takes the steps: by their number, not by their time, so that the same call does the same thing again."""
    if compile == "auto":
        steps = num_epochs * (batches.num_batches or 0)
        return None if steps < 300 else CompiledELBO(elbo, backend="eager" if steps < 3000 else "inductor")
    return CompiledELBO(elbo) if compile else None


def _check_arguments(
    num_epochs: int,
    batch_size: int,
    loss: Any,
    clip_norm: float | None,
    patience: int | None,
    validation_data: Any,
    compile: Any,
) -> None:
    for name, value in (
        ("num_epochs", num_epochs),
        ("batch_size", batch_size),
        ("patience", 1 if patience is None else patience),
    ):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}. Try a larger {name}.")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm: expected a positive norm, got {clip_norm}. Try clip_norm=10.0, or None.")
    if patience is not None and validation_data is None:
        raise ValueError("patience needs validation_data, whose loss says when to stop. Try to hold some rows out.")
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile: expected True, False or 'auto', got {compile!r}.")
    if loss is not None and not isinstance(loss, ELBO):
        raise TypeError(f"loss: expected a pyro.infer.ELBO, got {loss!r}. Try loss=pyro.infer.Trace_ELBO().")
