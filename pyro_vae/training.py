r"""Training: `fit` minimises −ELBO per data point of any (model, guide) pair with one torch optimizer.

What `pyro.infer.SVI` does, with an epoch around it: one (fused) optimizer over all parameters instead of one for each,
clipping by the global norm, mini-batches with a ragged last one, validation, early stopping, and an answer to
"where did the NaN come from". All parameters that take part are trained: those of `pyro.param` and `pyro.module`, and
those of every module that model and guide call; `requires_grad_(False)` freezes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae.batches import Batch, Batches
from pyro_vae.progress import progress_bar
from pyro_vae.traces import evaluation_mode

__all__ = ["FitResult", "fit"]


@dataclass
class FitResult:
    """What a fit did; losses are −ELBO (or another loss), in nats per data point, one for each epoch.

    Attributes:
        loss: mean over the epoch's batches, weighted by their rows, while the weights moved.
        validation_loss: after the epoch, in evaluation mode, with the same random numbers each time.
        num_steps: optimizer steps taken.
        best_epoch: index of the lowest validation loss, whose weights were kept if `patience` was given.
    """

    loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    num_steps: int = 0
    best_epoch: int | None = None


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
        clip_norm: largest global norm of the gradient of the loss per data point.
        validation_data: as `data`; its loss is computed after every epoch.
        patience: stop after so many epochs without a lower validation loss, and keep the best weights.
        plate: name of the plate of data points.
        seed: makes the run repeatable; the global random state is then left as it was.
        device: where to train; "auto" is CUDA where there is one; default: where the parameters are. Modules that take
            part stay there afterwards.
        progress: show a progress bar, if on a terminal.

    Returns:
        `FitResult`.

    Raises:
        ValueError: empty or unequal data, rows that are not finite or outside the support of their likelihood, two
            modules under one name in Pyro's parameter store, a loss that is not finite (the message names step, site
            and row; the last finite weights stay in place).
        TypeError: arguments of the wrong type or dtype.

    Example:
        >>> from pyro_vae import VAE
        >>> from pyro_vae.distributions import ConditionalNormal, StandardNormal
        >>> from pyro_vae.networks import MLP
        >>> vae = VAE(StandardNormal(1), ConditionalNormal(MLP(1, []), 3, scale=1.0), ConditionalNormal(MLP(3, []), 1))
        >>> result = fit(vae.model, vae.guide, torch.randn(100, 3), num_epochs=5, learning_rate=0.01, seed=0)
        >>> len(result.loss), result.num_steps
        (5, 5)
    """
    _check_arguments(num_epochs, batch_size, loss, patience, validation_data)
    result = FitResult()
    with ExitStack() as stack:
        if seed is not None:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(seed)
        batches = Batches(data, batch_size)
        validation = None if validation_data is None else Batches(validation_data, batch_size, name="validation_data")
        pair = _Pair(model, guide, plate)
        everything = [batches] if validation is None else [batches, validation]
        for rows in everything:
            rows.check()
        pair.look(next(iter(batches.to(pair.device))))
        for rows in everything:
            rows.to(pair.move(device))
            pair.check_support(rows)
        elbo = copy.copy(Trace_ELBO() if loss is None else loss)
        optim = _make_optimizer(optimizer, pair.parameters, learning_rate)
        schedule = None if scheduler is None else scheduler(optim)
        total = None if batches.num_rows is None else num_epochs * batches.num_rows
        bar = stack.enter_context(progress_bar(total, "", progress, unit="row", leave=True))
        best: list[Tensor] | None = None
        for epoch in range(num_epochs):
            bar.set_description(f"epoch {epoch + 1}/{num_epochs}")
            pair.remember()
            total, rows = torch.zeros((), dtype=torch.float64, device=pair.device), 0
            for batch in batches.shuffled():
                value = _step(pair, elbo, optim, batch, clip_norm, result.num_steps)
                total += value * batch.size
                rows += batch.size
                result.num_steps += 1
                bar.update(batch.size)
            result.loss.append(total.item() / rows)
            note = f"loss {result.loss[-1]:.3f}"
            if validation is not None:
                result.validation_loss.append(_evaluate(pair, elbo, validation))
                note += f", validation {result.validation_loss[-1]:.3f}"
                if result.best_epoch is None or result.validation_loss[-1] < result.validation_loss[result.best_epoch]:
                    result.best_epoch = epoch
                    best = None if patience is None else pair.state_copy()
            bar.set_postfix_str(f"{note} nats/row")
            if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                schedule.step((result.validation_loss or result.loss)[-1])
            elif schedule is not None:
                schedule.step()
            if patience is not None and epoch - result.best_epoch >= patience:
                break
        if best is not None:
            pair.restore(best)
        optim.zero_grad(set_to_none=True)
    return result


def _step(
    pair: _Pair, elbo: ELBO, optim: torch.optim.Optimizer, batch: Batch, clip_norm: float | None, step: int
) -> Tensor:
    """One gradient step; returns the loss per data point. Nothing is changed unless loss and gradient are finite."""
    random_state = _random_state(pair.device)
    size = pair.data_points(batch)
    optim.zero_grad(set_to_none=True)
    # the first step runs under the user's validation settings, so that Pyro says what it has to say
    with nullcontext() if step == 0 else pyro.validation_enabled(False):
        if hasattr(elbo, "differentiable_loss"):
            loss = elbo.differentiable_loss(pair.model, pair.guide, *batch.inputs) / size
            loss.backward()
            value = loss.detach()
        else:  # TraceGraph_ELBO, RenyiELBO, ReweightedWakeSleep do their own backward pass
            value = elbo.loss_and_grads(pair.model, pair.guide, *batch.inputs)
            value = torch.as_tensor(value[0] if isinstance(value, tuple) else value, device=pair.device) / size
            for p in pair.parameters:
                if p.grad is not None:
                    p.grad /= size
    norm = torch.nn.utils.get_total_norm([p.grad for p in pair.parameters if p.grad is not None])
    if not (torch.isfinite(value) & torch.isfinite(norm)):
        pair.recover()
        optim.zero_grad(set_to_none=True)
        raise ValueError(_diagnosis(pair, batch, random_state, step, value, norm))
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(pair.parameters, clip_norm, norm)
    optim.step()
    return value


def _evaluate(pair: _Pair, elbo: ELBO, batches: Batches) -> float:
    """Loss per data point in evaluation mode, with the same random numbers each time so that epochs compare."""
    total, rows = 0.0, 0
    with torch.random.fork_rng(), torch.no_grad(), evaluation_mode(), pyro.validation_enabled(False):
        torch.manual_seed(0)
        for batch in batches:
            value = elbo.loss(pair.model, pair.guide, *batch.inputs)
            total += float(value[0] if isinstance(value, tuple) else value) / pair.data_points(batch) * batch.size
            rows += batch.size
    return total / rows if math.isfinite(total) else math.inf  # which is never the lowest


class _Pair:
    """A model and guide, and what takes part in their loss: parameters, modules, the data plate."""

    def __init__(self, model: Callable, guide: Callable, plate: str) -> None:
        self.model, self.guide, self.plate = model, guide, plate
        owners = (f if isinstance(f, nn.Module) else getattr(f, "__self__", None) for f in (model, guide))
        self.modules = list({id(m): m for m in owners if isinstance(m, nn.Module)}.values())
        self.parameters = [p for m in self.modules for p in m.parameters()]
        self._remembered: list[Tensor] = []

    @property
    def device(self) -> torch.device | None:
        return self.parameters[0].device if self.parameters else None

    def look(self, batch: Batch) -> None:
        """Runs the pair once, moving nothing, and notes the parameters and modules that it uses."""
        modules = {id(m): m for m in self.modules}
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, _: modules.update({id(module): module})
        )
        try:
            clash = None
            for _ in range(2):  # the first run may settle one: pyro.module(…, update_module_params=True)
                with torch.no_grad(), torch.random.fork_rng(), evaluation_mode(), _Registrations() as seen:
                    self.traces = self.run(batch)
                clash = seen.clash
        finally:
            hook.remove()
        if clash is not None:
            raise ValueError(
                f"Pyro's parameter store holds another tensor under {clash!r} than the module that is called, which "
                "would never train. Try pyro.clear_param_store() before a second model, or another name for it."
            )
        self.modules = list(modules.values())
        tensors = [p for m in self.modules for p in m.parameters(recurse=False)] + seen.parameters
        self.parameters = list({id(p): p for p in tensors if p.requires_grad}.values())
        if not self.parameters:
            raise ValueError("nothing to train: model and guide use no parameter that requires a gradient.")
        frames = [f for trace in self.traces for s in trace.nodes.values() for f in s.get("cond_indep_stack", ())]
        sizes = {f.full_size for f in frames if f.name == self.plate and f.full_size > 0}
        # a plate that does not follow the rows of the batch scales their loss up to all data points
        self.full_size = None if not sizes or sizes == {batch.size} else max(sizes)

    def run(self, batch: Batch) -> tuple[poutine.Trace, poutine.Trace]:
        guide = poutine.trace(self.guide).get_trace(*batch.inputs)
        return guide, poutine.trace(poutine.replay(self.model, guide)).get_trace(*batch.inputs)

    def data_points(self, batch: Batch) -> int:
        return self.full_size or batch.size

    def move(self, device: str | torch.device | None) -> torch.device:
        if device is not None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
            for module in self.modules:
                module.to(device)
            for p in self.parameters:
                p.data = p.data.to(device)
        return self.device

    def check_support(self, batches: Batches) -> None:
        """Looks at the columns that are observed as they are, before anything is trained."""
        for name, site in self.traces[1].nodes.items():
            if site["type"] == "sample" and site["is_observed"]:
                for column in (i for i, x in enumerate(self.traces[1].nodes["_INPUT"]["args"]) if x is site["value"]):
                    batches.check_column(column, name, site)

    def state(self) -> list[Tensor]:
        return [*self.parameters, *(b for m in self.modules for b in m.buffers(recurse=False))]

    def state_copy(self) -> list[Tensor]:
        return [t.detach().clone() for t in self.state()]

    def restore(self, state: list[Tensor]) -> None:
        with torch.no_grad():
            for t, saved in zip(self.state(), state, strict=True):
                t.copy_(saved)

    def remember(self) -> None:
        self._remembered = self.state_copy()

    def recover(self) -> None:
        """Back to what was remembered, if the weights are not finite as they are."""
        if not all(torch.isfinite(t).all() for t in self.state()):
            self.restore(self._remembered)


class _Registrations(Messenger):
    """Collects the parameters that pass through `pyro.param`, and notes a name that holds somebody else's tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: list[Tensor] = []
        self.clash: str | None = None

    def _pyro_post_param(self, msg: dict) -> None:
        value = msg["value"]
        if hasattr(value, "_pyro_unconstrained_param"):
            value = value._pyro_unconstrained_param
        elif hasattr(value, "unconstrained"):
            value = value.unconstrained()
        self.parameters.append(value)
        own = msg["args"][1] if len(msg["args"]) > 1 else None
        if isinstance(own, nn.Parameter) and own is not value:
            self.clash = msg["name"]


def _make_optimizer(make: Callable | None, parameters: list[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    if make is None:
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
        return torch.optim.Adam(parameters, lr=learning_rate, fused=fused)
    optim = make(parameters) if callable(make) else make
    if not isinstance(optim, torch.optim.Optimizer):
        raise TypeError(
            "optimizer: expected a callable that makes a torch optimizer from a list of parameters, got "
            f"{type(optim).__name__}. Try optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3)."
        )
    return optim


def _check_arguments(num_epochs: int, batch_size: int, loss: Any, patience: int | None, validation_data: Any) -> None:
    for name, value in (("num_epochs", num_epochs), ("batch_size", batch_size), ("patience", patience or 1)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}.")
    if patience is not None and validation_data is None:
        raise ValueError("patience needs validation_data, whose loss says when to stop. Try to hold some rows out.")
    if loss is not None and not isinstance(loss, ELBO):
        raise TypeError(f"loss: expected a pyro.infer.ELBO, got {loss!r}. Try loss=pyro.infer.Trace_ELBO().")


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    return (torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []))


def _diagnosis(
    pair: _Pair, batch: Batch, random_state: tuple[Tensor, ...], step: int, value: Tensor, norm: Tensor
) -> str:
    """Where a loss or gradient stopped being finite, found by running the step's traces again."""
    with torch.random.fork_rng(), torch.no_grad(), pyro.validation_enabled(False):
        torch.set_rng_state(random_state[0])
        if len(random_state) > 1:
            torch.cuda.set_rng_state(random_state[1], pair.device)
        guide, model = pair.run(batch)
        found = _first_bad_site(pair, batch, (("guide", guide), ("model", model)))
    what = f"loss {value.item():.4g}"
    if torch.isfinite(value):
        what += f", but a gradient of norm {norm.item():.4g}"
    return (
        f"fit stopped before step {step}: {what}{found or ''}. The weights are the last finite ones. Try a lower "
        "learning_rate, clip_norm=10.0, or data scaled to about unit size."
    )


def _first_bad_site(pair: _Pair, batch: Batch, traces: Any) -> str | None:
    for where, trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            event_dim = len(site["fn"].event_shape)
            for what, tensor, right in (("value", site["value"], event_dim), ("log-probability", log_prob, 0)):
                bad = ~torch.isfinite(tensor)
                if not bad.any():
                    continue
                axes = [f.dim - right + tensor.dim() for f in site["cond_indep_stack"] if f.name == pair.plate]
                text = f", from the {what} of site {name!r} of the {where}"
                if axes and axes[0] >= 0 and tensor.shape[axes[0]] == batch.size:
                    rows = bad.movedim(axes[0], 0).reshape(batch.size, -1).any(1).nonzero().flatten()
                    first = int(rows[0]) if batch.rows is None else int(batch.rows[int(rows[0])])
                    of = "its batch" if batch.rows is None else "the data"
                    text += f" ({len(rows)} of {batch.size} rows of the batch, the first is row {first} of {of})"
                return text
    return None
