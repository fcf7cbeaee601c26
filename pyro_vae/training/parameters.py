"""`Weights`: the parameters and buffers that a fit moves, copies and brings back; also those that are frozen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.pairs.libraries import warn

__all__ = ["Weights", "find_device"]


class Weights:
    """What is trained of a pair.

    Args:
        parameters: {name: tensor}, all that require a gradient.
        modules: those that take part, whose buffers belong to the state too.
        frozen: {name: tensor}, further ones, which stay as they are.
    """

    def __init__(
        self, parameters: dict[str, Tensor], modules: list[nn.Module], frozen: dict[str, Tensor] | None = None
    ) -> None:
        self.named, self.modules, self.frozen = parameters, modules, frozen or {}
        self.parameters = list(parameters.values())

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def to(self, device: str | torch.device | None) -> torch.device:
        """Moves parameters and modules in place, if a device is given; returns the one they are on."""
        if device is not None:
            device = find_device(device)
            for module in self.modules:
                module.to(device)
            for p in self.parameters:
                p.data = p.data.to(device)
        return self.device

    @property
    def buffers(self) -> list[Tensor]:
        return [b for m in self.modules for b in m.buffers(recurse=False)]

    def state(self) -> list[Tensor]:
        """The tensors themselves, parameters first."""
        return [*self.parameters, *self.buffers]

    def copy(self) -> list[Tensor]:
        """Copies of the tensors of `state`."""
        return [t.detach().clone() for t in self.state()]

    def restore(self, state: list[Tensor]) -> None:
        """Brings back what `copy` returned."""
        with torch.no_grad():
            for t, saved in zip(self.state(), state, strict=True):
                t.copy_(saved)

    def named_state(self, *, moved: bool = False) -> dict[str, Tensor]:
        """The tensors themselves by name: parameters, buffers and, unless only those that are `moved`, frozen ones.

        Names are those in the modules, which a model that is built again has too; in Pyro's store it may have others.
        """
        own: dict[int, tuple[str, Tensor]] = {}
        for module in self.modules:
            for name, t in (*module.named_parameters(), *module.named_buffers()):
                own.setdefault(id(t), (f"{type(module).__name__}.{name}", t))
        trained = [(own.get(id(t), (name,))[0], t) for name, t in self.named.items()]
        frozen = [(own.get(id(t), (name,))[0], t) for name, t in self.frozen.items()]
        parameters = {id(t) for _, t in (*trained, *frozen)}
        buffers = [found for key, found in own.items() if key not in parameters]
        state: dict[str, Tensor] = {}
        for name, t in (*trained, *buffers, *(() if moved else frozen)):
            state[name if name not in state else f"{name} ({len(state)})"] = t
        return state

    def load(self, named: dict[str, Tensor]) -> None:
        """Takes over values of `named_state`."""
        state = self.named_state()
        with torch.no_grad():
            for name, saved in named.items():
                state[name].copy_(saved)

    def are_finite(self) -> bool:
        return all(bool(torch.isfinite(t).all()) for t in self.state())

    def warn_of_unreached(self) -> None:
        """Says which parameters a backward pass of the loss gave no gradient: they stay as they are."""
        names = [name for name, p in self.named.items() if p.grad is None]
        if names:
            warn(
                f"fit: the loss does not reach {len(names)} of {len(self.parameters)} parameters, which will not "
                f"train: {_listed(map(repr, names))}. Try to use them in the model or guide, or "
                "requires_grad_(False) to freeze them."
            )

    def warn_of_unregistered(self, trace: poutine.Trace) -> None:
        """Says which parameters have a gradient and are none of Pyro's, which `pyro.infer.SVI` would not train.

        Args:
            trace: the `pyro.param` statements of a step, by which SVI finds what it trains.
        """
        registered = {id(_unconstrained(site["value"])) for site in trace.nodes.values() if site["type"] == "param"}
        modules = [m for module in self.modules for m in module.modules()]
        own = {id(p): f"{n!r} of {type(m).__name__}" for m in modules for n, p in m.named_parameters(recurse=False)}
        names = [
            own.get(id(p), name) for name, p in self.named.items() if p.grad is not None and id(p) not in registered
        ]
        if names:
            warn(
                f"fit: trains {len(names)} of {len(self.parameters)} parameters that are not registered with Pyro: "
                f"{_listed(names)}. pyro.infer.SVI would leave them as they are, and Pyro's parameter store neither "
                'holds nor saves them. Try pyro.module("net", net) in the model or guide that uses the module net, or '
                'pyro.param("w", w) for a tensor w.'
            )

    def refuse_sparse(self) -> None:
        """Raises ValueError for sparse gradients, which neither the global norm nor the usual optimizers take."""
        names = [name for name, p in self.named.items() if p.grad is not None and p.grad.layout is not torch.strided]
        if names:
            for p in self.parameters:
                p.grad = None
            raise ValueError(
                f"fit: expected dense gradients, got sparse ones of {_listed(map(repr, names))}: their norm and the "
                "steps of Adam are not defined for them. Try nn.Embedding(…, sparse=False)."
            )


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _unconstrained(value: Any) -> Any:
    """The tensor that is trained, of the value of a `pyro.param`."""
    if hasattr(value, "_pyro_unconstrained_param"):  # the rows of one that a plate subsamples
        return value._pyro_unconstrained_param
    unconstrained = getattr(value, "unconstrained", None)
    return value if unconstrained is None else unconstrained()


def find_device(device: str | torch.device) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: torch knows no such device, or it is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'device: expected \'auto\' or a device of torch, got {device!r}. Try device="auto" or device="cpu".'
        ) from error
    if device.type == "meta":
        raise ValueError('device: expected one that holds numbers, got "meta". Try device="cpu".')
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise ValueError(
                f"device: expected one that is there, got {str(device)!r}, and this torch has "
                f'{f"{found} CUDA devices" if found else "no CUDA device"}. Try device="auto" or device="cpu".'
            )
    return device
