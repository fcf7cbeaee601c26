"""A fit's state, which it writes to a file and goes on from: both as a whole or not at all."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_vae.checkpoint.container import read, write
from pyro_vae.checkpoint.held import hold
from pyro_vae.checkpoint.plain import differences, listed, map_tensors
from pyro_vae.pairs.libraries import warn
from pyro_vae.pairs.modes import random_state, set_random_state
from pyro_vae.training.loaders import LoaderStates, not_a_state
from pyro_vae.training.optimizer_state import after_a_step, what_does_not_fit
from pyro_vae.training.parameters import Weights
from pyro_vae.training.result import FitResult
from pyro_vae.training.steps import Steps
from pyro_vae.training.warm_up import warm_up

__all__ = ["FitState"]

SECONDS_BETWEEN = 10.0  # writes, but for the first and the last one
KEEPING = 0.05  # share of the time that copies of the state may take, for Ctrl-C to write; epochs may be short


class FitState:
    """All that a fit needs to go on, after every epoch.

    Args:
        weights: of the pair.
        steps: whose optimizer and count belong to the state.
        schedule: of the learning rate, if there is one.
        patience: epochs without a lower validation loss, or None; with it the best weights are kept.
        num_epochs: that the fit is to have in the end.
        arguments: of the fit, plain values by name, which have to be the same when it goes on.
        validation: what tells the validation data apart. With others, the best epoch is looked for anew.
        loaders: by name, whose random generators belong to the state.

    Attributes:
        result: what the fit has found so far.
        best: the weights of the best epoch by name, if they are kept.
    """

    def __init__(
        self,
        weights: Weights,
        steps: Steps,
        schedule: Any,
        patience: int | None,
        num_epochs: int,
        arguments: dict[str, Any],
        validation: str | None = None,
        loaders: dict[str, DataLoader] | None = None,
    ) -> None:
        self.weights, self.steps, self.schedule, self.patience = weights, steps, schedule, patience
        self.num_epochs, self.arguments, self.validation = num_epochs, arguments, validation
        self.loaders = LoaderStates(loaders or {})
        self._ranks = steps.batches.ranks
        self._random = self._ranks.gather(random_state())
        self.result = FitResult()
        self.best: dict[str, Tensor] | None = None
        self._path: str | Path | None = None
        self._kept: dict[str, Any] | None = None  # of the last epoch, until it is written
        self._kept_at = self._written_at = -math.inf
        self._seconds = 0.0  # that keeping took

    @property
    def stalled(self) -> bool:
        """Whether the last epochs brought no lower validation loss."""
        return self.result.stalled(self.patience)

    def end_epoch(self, loss: float, validation_loss: float | None) -> None:
        """Takes an epoch's losses, keeps its weights if they are the best, and moves the learning rate."""
        self._random = self._ranks.gather(random_state())
        lowest = self.result.add_epoch(loss, validation_loss, self.steps.count)
        if lowest and self.patience is not None:
            self.best = map_tensors(_copy, self.weights.named_state(moved=True))
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(loss if validation_loss is None else validation_loss)
        elif self.schedule is not None:
            self.schedule.step()

    def keep_best(self) -> None:
        """Brings back the weights of the best epoch, if they were kept."""
        if self.best is not None:
            self.weights.load(self.best)

    # -- file ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def kept_in(self, path: str | Path | None) -> Iterator[None]:
        """Holds the file, goes on from it if it exists, and makes sure that it can be written.

        Raises:
            ValueError: the path is in no folder; another fit is writing the file; it is damaged, or of another model,
                guide or optimizer, of a fit with other arguments, or of something else altogether. All is as it was.
            TypeError: the state of the optimizer or scheduler cannot be written.
            OSError: the system does not let the file be written.
        """
        if path is None:
            yield
            return
        self._path = own = Path(path).absolute()  # wherever the script goes meanwhile
        with ExitStack() as held:
            saved = self._ranks.first_does(lambda: _open(own, held))
            if saved is not None:
                self._resume(Path(path), saved)
            self._ranks.first_does(self._try_out)
            yield

    def write(self, *, last: bool = False) -> None:
        """Writes the state after an epoch, at most every ten seconds but for the first and the last."""
        if self._path is None or not self._ranks.is_first:
            return
        now = time.monotonic()
        due = last or now - self._written_at >= SECONDS_BETWEEN
        if due or now - self._kept_at >= self._seconds / KEEPING:
            self._kept = map_tensors(_copy_to_cpu, self._entries())
            self._kept_at = time.monotonic()
            self._seconds = self._kept_at - now
        if due:
            self._write_kept()

    def interrupt(self) -> None:
        """Ends a fit that is not done: writes the last epoch that was kept."""
        self.result.interrupted, self.result.num_steps = True, self.steps.count
        self._write_kept()
        file = "" if self._path is None else f" The same call goes on from the last epoch in {self._path}."
        warn(
            f"fit: interrupted after {len(self.result.loss)} epochs and {self.steps.count} steps. The weights are as "
            f"the last step left them{'' if self.best is None else ', or the best ones, with patience'}.{file}"
        )

    def _write_kept(self) -> None:
        if self._kept is not None:
            write(self._kept, self._path, "fit")
            self._kept, self._written_at = None, time.monotonic()

    def _try_out(self) -> None:
        """Writes as much as after an epoch, but not to the file itself."""
        entries = self._entries()
        if self.patience is not None and self.best is None:
            entries["best"] = entries["weights"]
        if not entries["optimizer"]["state"]:
            entries["optimizer"] = after_a_step(self.steps.optimizer) or entries["optimizer"]
        try:
            write(entries, self._path, "fit", trial=True)
        except TypeError as error:
            raise TypeError(f"checkpoint: {error}") from error

    def _entries(self) -> dict[str, Any]:
        """The state, with the tensors themselves."""
        random = [{"cpu": cpu, "cuda": cuda} for cpu, cuda in self._random]
        losses = {name: value for name, value in vars(self.result).items() if name != "interrupted"}
        return {
            "weights": map_tensors(Tensor.detach, self.weights.named_state()),
            "best": self.best,
            "optimizer_type": type(self.steps.optimizer).__name__,
            "optimizer": self.steps.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "steps": self.steps.count,
            "replays": [] if self.steps.compiled is None else [p.audit.replays for p in self.steps.compiled.plans],
            "losses": losses,
            "arguments": self.arguments,
            "validation": self.validation,
            "random": random,  # of each rank
            "loaders": self.loaders.state(),
        }

    # -- going on -----------------------------------------------------------------------------------------------------

    def _resume(self, path: Path, saved: Any) -> None:
        now = self._entries()
        if not (isinstance(saved, dict) and saved.keys() == now.keys()):
            raise ValueError(f"checkpoint: {path} was not written by fit(checkpoint=…). Try another name.")
        self._refuse_other(path, listed(differences(now["weights"], saved["weights"], "weights")))
        was, this = saved["arguments"] if isinstance(saved["arguments"], dict) else {}, self.arguments
        differ = [name for name in this if was.get(name) != this[name]]
        if differ:
            written, given = (", ".join(f"{name}={values.get(name)!r}" for name in differ) for values in (was, this))
            raise ValueError(
                f"checkpoint: {path} was written with {written}; this call has {given}. Try the same arguments, "
                "or another file."
            )
        try:
            self._refuse_other(path, listed(self._what_does_not_fit(now, saved)))
        except (AttributeError, LookupError, TypeError) as error:  # of a file that somebody made up
            self._refuse_other(path, f"{type(error).__name__}: {error}")
        epochs = len(saved["losses"]["loss"])
        if epochs > self.num_epochs:
            raise ValueError(
                f"checkpoint: {path} is of {epochs} epochs already; this call has num_epochs={self.num_epochs}. Try "
                f"num_epochs={epochs} or more, or another file."
            )
        before = map_tensors(_copy, now)
        try:
            self._load(saved)
            warm_up(self.steps, epochs)
            self._load(saved)
        except BaseException as error:
            self._load(before)
            if not isinstance(error, Exception):
                raise
            raise ValueError(
                f"checkpoint: what is in {path} is not taken by this call: {type(error).__name__}: {error} All is as "
                "it was. Try the optimizer, scheduler and loader that it was written with, or another file."
            ) from error

    @staticmethod
    def _refuse_other(path: Path, differences: str) -> None:
        if differences:
            raise ValueError(
                f"checkpoint: {path} is of another model, guide, optimizer, scheduler or loader ({differences}); all "
                "is as it was. Try those that it was written with, or another file."
            )

    def _what_does_not_fit(self, now: dict[str, Any], saved: dict[str, Any]) -> Iterator[str]:
        if saved["best"] is not None:
            yield from differences(self.weights.named_state(moved=True), saved["best"], "best")
        if now["optimizer_type"] != saved["optimizer_type"]:
            yield f"optimizer: expected {now['optimizer_type']}, got {saved['optimizer_type']}"
            return
        yield from what_does_not_fit(self.steps.optimizer, saved["optimizer"])
        yield from self._of_the_schedule(now["schedule"], saved["schedule"])
        for rank, random in enumerate(saved["random"]):
            yield from not_a_state(torch.default_generator, random.get("cpu"), f"random/{rank}/cpu")
            for i, (state, own) in enumerate(zip(random.get("cuda"), now["random"][0]["cuda"], strict=False)):
                yield from differences(own, state, f"random/{rank}/cuda/{i}")
        if not len(saved["random"]):
            yield "random: expected the state of a random generator, got none"
        for name, numbers in (("steps", [saved["steps"]]), ("replays", saved["replays"])):
            if not all(type(n) is int and n >= 0 for n in numbers):
                yield f"{name}: expected numbers of steps, got others"
        yield from _wrong_losses(saved["losses"])
        yield from self.loaders.what_does_not_fit(saved["loaders"])

    def _of_the_schedule(self, now: Any, saved: Any) -> Iterator[str]:
        if type(now) is not type(saved):
            yield f"schedule: expected {type(now).__name__}, got {type(saved).__name__}"
        elif now is not None:  # a scheduler of somebody else's may come to have further values
            if type(self.schedule).__module__.startswith("torch.") and now.keys() != saved.keys():
                yield f"schedule: expected {sorted(now)}, got {sorted(saved)}"
            yield from differences(now, saved, "schedule", loose=True)

    def _load(self, saved: dict[str, Any]) -> None:
        self.steps.optimizer.load_state_dict(map_tensors(_copy, saved["optimizer"]))
        if self.schedule is not None:
            self.schedule.load_state_dict(copy.deepcopy(saved["schedule"]))  # some take things out of it
        self.loaders.load(saved["loaders"])
        self.weights.load(saved["weights"])
        self.steps.go_on(saved["steps"])
        plans = [] if self.steps.compiled is None else self.steps.compiled.plans
        if len(plans) == len(saved["replays"]):  # code pays after so many
            for plan, replays in zip(plans, saved["replays"], strict=True):
                plan.audit.replays = replays
        vars(self.result).update(saved["losses"])
        self.best = None
        same = saved["validation"] == self.validation
        if self.patience is not None and saved["best"] is not None and same:
            self.best = map_tensors(lambda t: t.to(self.weights.device), saved["best"])
        elif self.patience is not None or not same:
            self.result.best_epoch = None  # its weights were not kept, or not compared: the best is looked for anew
        same = len(saved["random"]) == self._ranks.size
        random = saved["random"][self._ranks.rank if same else 0]
        set_random_state((random["cpu"], random["cuda"][: torch.cuda.device_count()]))
        if not same:
            self._ranks.part_ways()
        self._random = self._ranks.gather(random_state())


def _open(path: Path, held: ExitStack) -> Any:
    """Holds the file; what is in it, or None."""
    held.enter_context(hold(path))
    try:
        return read(path, "fit") if path.exists() else None
    except ValueError as error:
        raise ValueError(f"checkpoint: {error}") from error


def _wrong_losses(losses: Any) -> Iterator[str]:
    """Says what is wrong with the losses of a file."""
    fresh = {name: value for name, value in vars(FitResult()).items() if name != "interrupted"}
    yield from differences(fresh, losses, "losses", loose=True)
    if isinstance(losses, dict) and losses.keys() == fresh.keys():
        values, best = [*losses["loss"], *losses["validation_loss"]], losses["best_epoch"]
        if not all(type(value) is float for value in values):
            yield "losses: expected numbers, got others"
        if not (best is None or (type(best) is int and 0 <= best < len(losses["validation_loss"]))):
            yield f"losses/best_epoch: expected an epoch with a validation loss, got {best}"
    else:
        yield "losses: expected those of a fit, got others"


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
