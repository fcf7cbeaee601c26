"""A model and guide in training: what takes part in their loss, and where it stopped being finite."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Independent, StudentT

from pyro_vae.pairs.checks import ignores_missing
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.sites import sample_sites
from pyro_vae.training.data import Batch, Batches

__all__ = ["Pair"]


class Pair:
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
                with ExitStack() as stack:
                    # without Pyro's checks: what is not finite is for `check_rows` to say
                    for context in (torch.no_grad(), torch.random.fork_rng(), evaluation_mode()):
                        stack.enter_context(context)
                    stack.enter_context(pyro.validation_enabled(False))
                    seen = stack.enter_context(_Registrations())
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

    def try_out(self, batches: Batches) -> None:
        """Runs the pair on the first rows of other data than it was looked at with.

        Raises:
            ValueError: it does not take them. Those of a DataLoader cannot be looked at beforehand.
        """
        if not batches.columns:
            return
        batch = next(iter(batches))
        try:
            with torch.no_grad(), torch.random.fork_rng(), evaluation_mode(), pyro.validation_enabled(False):
                self.run(batch)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            got = ", ".join(str(tuple(x.shape[1:])) for x in batch.inputs)
            refusal = ValueError(
                f"{batches.name}: expected rows that model and guide take as they take those of data, got rows of "
                f"shape {got}. Try data prepared in the same way. The error was: {error}"
            )
            batches.explain(refusal)
            raise refusal from error

    def data_points(self, batch: Batch) -> int:
        return self.full_size or batch.size

    def move(self, device: str | torch.device | None) -> torch.device:
        if device is not None:
            device = _device(device)
            for module in self.modules:
                module.to(device)
            for p in self.parameters:
                p.data = p.data.to(device)
        return self.device

    def check(self, batches: Batches) -> None:
        """Looks at all rows, and at the columns that are observed as they are, before anything is trained."""
        observed = [
            (column, name, site)
            for name, site in sample_sites(self.traces[1]).items()
            for column, x in enumerate(self.traces[1].nodes["_INPUT"]["args"])
            if site["is_observed"] and x is site["value"]
        ]
        batches.check({column for column, _, site in observed if ignores_missing(site)})
        for column, name, site in observed:
            batches.check_column(column, name, site)

    def collapsed_scales(self, batch: Batch) -> str | None:
        """What to say of a Normal likelihood whose scale has shrunk to less than a thousandth of the data's spread."""
        with torch.no_grad(), torch.random.fork_rng(), evaluation_mode(), pyro.validation_enabled(False):
            sites = sample_sites(self.run(batch)[1])
        for name, site in sites.items():
            elements = getattr(site["fn"], "complete", site["fn"])
            while isinstance(elements, Independent):
                elements = elements.base_dist
            if not (site["is_observed"] and isinstance(elements, (torch.distributions.Normal, StudentT))):
                continue
            values = site["value"][torch.isfinite(site["value"])]
            if len(values) < 2:
                continue
            spread = values.std()
            small = elements.scale < 1e-3 * spread
            if small.any():
                return (
                    f"the scale of site {name!r} has collapsed: {small.float().mean():.1%} of it is below a thousandth "
                    f"of the data's spread ({spread:.3g}), the smallest {elements.scale.min():.2g}. Its density, and "
                    "with it the ELBO, has no largest value there, so that neither says how good the model is. Try "
                    "LearnedScale(…) for one scale, smallest=… at the precision of the data, or to leave out columns "
                    "that are constant."
                )
        return None

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


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'device: expected \'auto\' or a device of torch, got {device!r}. Try device="auto" or device="cpu".'
        ) from error
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise ValueError(
                f"device: expected one that is there, got {str(device)!r}, and this torch has "
                f'{f"{found} CUDA devices" if found else "no CUDA device"}. Try device="auto" or device="cpu".'
            )
    return device


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
