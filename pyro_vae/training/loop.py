r"""Training: `fit` minimises −ELBO per data point of any (model, guide) pair with one torch optimizer.

It does what `pyro.infer.SVI` does, with an epoch around it: one (fused) optimizer over all parameters instead of one
for each, clipping by the global norm, mini-batches with a ragged last one, validation, early stopping, and an answer to
"where did the NaN come from". Every parameter that requires a gradient and that the loss reaches is trained, wherever
the pair keeps it; `requires_grad_(False)` freezes one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.arguments import checked
from pyro_vae.compiled.elbo import CompiledELBO
from pyro_vae.compiled.policy import TRAINING, backend_for
from pyro_vae.pairs.modes import evaluation_mode, owners
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.threads import one_thread
from pyro_vae.progress import progress_bar
from pyro_vae.ranks import Ranks, ranks
from pyro_vae.training.data import Batches
from pyro_vae.training.diagnosis import check_data, look_at, try_out, warn_of_collapse, warn_of_objective
from pyro_vae.training.joint import check_sum_over_rows
from pyro_vae.training.parameters import Weights
from pyro_vae.training.result import FitResult
from pyro_vae.training.resume import FitState
from pyro_vae.training.settings import known_by, settings_of
from pyro_vae.training.shared_loader import begin_epoch
from pyro_vae.training.steps import Steps

__all__ = ["FitResult", "fit"]


@one_thread
@checked
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
        model: a Pyro model, called with a batch. Arguments that all batches share are set by
            `functools.partial(model, name=value)`, and the same of the guide.
        guide: its guide.
        data: a tensor, a numpy array or memory map, a tuple of these with equal first dimensions (x, *context), a dict
            of them, which are passed as keyword arguments, or a torch `DataLoader`, whose tuples (or dicts) may hold
            anything beside tensors. Floating numpy arrays take torch's default dtype; integers reach the model as they
            are, and it converts each batch: `lambda x: model(x.float() / 255)`. All rows come in one batch and in their
            order where the guide has parameters for each of them, as `AutoNormal` has for latents of each row.
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
        checkpoint: a file that everything needed to go on is written to, whole or not at all: weights (of frozen
            parameters too), optimizer, scheduler, random state (also of the generators of a DataLoader), losses, the
            best weights; after the first epoch, the last, and others at most every ten seconds. Where the file exists,
            it is looked at as a whole, and then the run goes on from it, on the same random numbers: the same call,
            started again, ends at the same bits as an uninterrupted one, compiled or not (compiled steps on the batches
            of a DataLoader's batch sampler: at the same numbers but for rounding). `num_epochs` may be
            larger then, `validation_data` and `patience` may be new; a call whose data, batch size, seed, learning
            rate, clipping, scheduler or loss is another is refused, as far as their numbers and types tell (of the
            data: shapes, dtypes and some rows; code cannot be compared). A writing is tried
            before training starts, and a second process that trains with the same file is refused. Random numbers of
            NumPy and Python, those of a DataLoader's persistent workers, and what modules and datasets keep in plain
            Python attributes, are no part of the state.
        progress: show a progress bar, if on a terminal.

    Returns:
        `FitResult`. Ctrl-C ends the training, with what there is: the weights as the last step left them (the best
        ones, with `patience`), and a checkpoint of the last epoch (where epochs take
        milliseconds, of one of the last). `FitResult.interrupted` is true then.

    Raises:
        OSError: the checkpoint cannot be written (a full disk, no permission); an older one is as it was.
        ValueError: empty or unequal data, rows that are not finite or outside the support of their likelihood, two
            modules under one name in Pyro's parameter store, a device that is not there, a checkpoint of another fit, a
            loss that is not finite (the message names step, site and row; the last finite weights stay in place),
            sparse gradients, mini-batches where the guide has parameters for each row.
        TypeError: arguments of the wrong type or dtype.

    Warns:
        UserWarning: a learned scale of a likelihood that has collapsed; an objective that ends at a weight of the KL
            term other than one, or has a capacity; parameters that are trained here and that `pyro.infer.SVI` would
            not train, as nobody registered them with `pyro.module` or `pyro.param`; latents outside of the data plate
            in mini-batches that each count as all data.

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
    _check_patience(patience, validation_data)
    group = ranks()
    with _seeded(seed):
        batches = Batches(data, batch_size, ranks=group)
        validation = None
        if validation_data is not None:
            validation = Batches(validation_data, batch_size, name="validation_data", ranks=group)
        group.agree("fit", rows=batches.num_rows, batch_size=batch_size, num_epochs=num_epochs, seed=seed)
        group.part_ways()
        pair, weights = _prepare(model, guide, plate, batches, validation, group.device(device))
        _agree(group, weights, batches, validation)
        elbo, compiled = _objective(loss, compile, num_epochs * (batches.num_batches or 0))
        if group.several:
            check_sum_over_rows(elbo)
        optim = _make_optimizer(optimizer, weights.parameters, learning_rate)
        steps = Steps(pair, weights, batches, elbo, optim, clip_norm, compiled)
        schedule = None if scheduler is None else _make_scheduler(scheduler, optim)
        told, held = {}, None
        if checkpoint is not None:
            told = settings_of(batches, optim, schedule, elbo, seed=seed, clip_norm=clip_norm, plate=plate)
            held = None if validation is None else known_by(validation)
        loaders = {b.name: b.given for b in (batches, validation) if b is not None and b.loader is not None}
        state = FitState(weights, steps, schedule, patience, num_epochs, told, held, loaders)
        total = None if batches.num_rows is None else num_epochs * batches.num_rows
        show = progress and group.is_first
        bars = progress_bar(total, "", show, unit="row", leave=True)
        with state.kept_in(checkpoint), steps.joint.interrupted_together(), bars as bar:
            bar.update(len(state.result.loss) * (batches.num_rows or 0))
            try:
                while len(state.result.loss) < num_epochs and not state.stalled:
                    bar.set_description(f"epoch {len(state.result.loss) + 1}/{num_epochs}")
                    begin_epoch(batches.loader, len(state.result.loss))
                    mean = _epoch(steps, batches, bar)
                    group.copy_first(weights.buffers)  # as of batch norm, which each rank has of its own rows
                    held_out = None if validation is None else _evaluate(pair, steps, elbo, validation)
                    state.end_epoch(mean, held_out)
                    note = "" if held_out is None else f", validation {held_out:.3f}"
                    bar.set_postfix_str(f"loss {mean:.3f}{note} nats/row")
                    state.write(last=len(state.result.loss) == num_epochs or state.stalled)
            except KeyboardInterrupt:
                state.interrupt()
        state.keep_best()
        optim.zero_grad(set_to_none=True)
        warn_of_objective(elbo)
        warn_of_collapse(pair)
    return state.result


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Runs from this seed and leaves the global random state as it was; with None, runs from the global state."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _prepare(
    model: Callable,
    guide: Callable,
    plate: str,
    batches: Batches,
    validation: Batches | None,
    device: str | torch.device | None,
) -> tuple[Pair, Weights]:
    """Looks at the pair, moves its weights and the data to where it trains, and checks all rows."""
    known = next((p for owner in owners(model, guide) for p in owner.parameters()), None)
    pair = look_at(model, guide, batches.to(None if known is None else known.device), validation, plate)
    weights = Weights(*pair.participants)
    for rows in (batches, validation):
        if rows is not None:
            rows.to(weights.to(device))
            if rows is validation:
                try_out(pair, rows)
            check_data(pair, rows)
    return pair, weights


def _objective(loss: ELBO | None, compile: bool | str, num_steps: int) -> tuple[ELBO, CompiledELBO | None]:
    """The objective, and the compiled one that takes its steps, if any.

    The choice depends on the number of steps, not on their time, so that the same call does the same thing again.
    """
    if isinstance(loss, CompiledELBO):
        return copy.copy(loss.elbo), loss
    elbo = Trace_ELBO() if loss is None else copy.copy(loss)
    backend = backend_for(compile, num_steps, TRAINING)
    return elbo, None if backend is None else CompiledELBO(elbo, backend=backend)


def _epoch(steps: Steps, batches: Batches, bar: tqdm) -> float:
    """Takes a step on each batch; returns the mean loss per data point, weighted by rows."""
    steps.begin_epoch()
    total, rows = torch.zeros((), dtype=torch.float64, device=steps.weights.device), 0
    for batch in batches.shuffled():
        value, joint = steps(batch)
        total += value * joint
        rows += joint
        bar.update(joint)
    steps.end_epoch()
    return total.item() / rows


def _evaluate(pair: Pair, steps: Steps, elbo: ELBO, batches: Batches) -> float:
    """Loss per data point in evaluation mode, with the same random numbers each time so that epochs compare."""
    total, rows = 0.0, 0
    with (
        torch.random.fork_rng(),
        torch.no_grad(),
        evaluation_mode(pair.model, pair.guide),
        pyro.validation_enabled(False),
    ):
        torch.manual_seed(batches.ranks.rank)
        for batch in batches:
            if not batch.size:
                continue
            value = elbo.loss(pair.model, pair.guide, *batch.args, **batch.kwargs)
            total += float(value[0] if isinstance(value, tuple) else value) / steps.data_points(batch) * batch.size
            rows += batch.size
    total, rows = map(sum, zip(*batches.ranks.gather((total, rows)), strict=True))
    return total / rows if math.isfinite(total) else math.inf  # infinity is never the lowest


def _agree(group: Ranks, weights: Weights, batches: Batches, validation: Batches | None) -> None:
    """All ranks go on from the weights of the first. Raises ValueError if they have other parameters, or other data."""
    if group.several:
        shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in weights.named.items()]
        others = None if validation is None else (validation.num_rows, validation.fingerprint())
        group.agree("fit", parameters=shapes, data=batches.fingerprint(), validation_data=others)
        group.copy_first(list(weights.named_state().values()))


def _make_optimizer(make: Callable | None, parameters: list[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    if make is None:
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
        return torch.optim.Adam(parameters, lr=learning_rate, fused=fused)
    got = f"a {type(make).__module__}.{type(make).__name__}"
    if callable(make) and not isinstance(make, (torch.optim.Optimizer, PyroOptim)):
        optim = make(parameters)
        if isinstance(optim, torch.optim.LBFGS):
            raise TypeError(
                "optimizer: expected one that steps by the gradient of one batch, got LBFGS, which takes a function "
                "that it evaluates many times. Try torch.optim.Adam, or a loop of your own over "
                "elbo.differentiable_loss."
            )
        if isinstance(optim, torch.optim.Optimizer):
            return optim
        got = f"one that makes a {type(optim).__module__}.{type(optim).__name__}"
    raise TypeError(
        f"optimizer: expected a callable that makes a torch optimizer from a list of parameters, got {got}. "
        "Try optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3)."
    )


def _make_scheduler(make: Any, optimizer: torch.optim.Optimizer) -> Any:
    schedule = make(optimizer) if callable(make) else make
    if callable(make) and hasattr(schedule, "step"):
        return schedule
    raise TypeError(
        f"scheduler: expected a callable that makes a learning-rate scheduler from the optimizer, got {make!r}. "
        "Try scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10)."
    )


def _check_patience(patience: int | None, validation_data: Any) -> None:
    if patience is not None and validation_data is None:
        raise ValueError(
            "patience needs validation_data, whose loss says when to stop: expected some, got none. Try to hold some "
            "rows out."
        )
