"""`Weights`: the parameters and buffers that a fit moves, keeps copies of and brings back."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

__all__ = ["Weights", "find_device"]


class Weights:
    """What is trained of a pair.

    Args:
        parameters: {name: tensor}, all that require a gradient.
        modules: those that take part, whose buffers belong to the state too.
    """

    def __init__(self, parameters: dict[str, Tensor], modules: list[nn.Module]) -> None:
        self.named, self.modules = parameters, modules
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

    def state(self) -> list[Tensor]:
        """The tensors themselves, parameters first."""
        return [*self.parameters, *(b for m in self.modules for b in m.buffers(recurse=False))]

    def copy(self) -> list[Tensor]:
        """Copies of the tensors of `state`."""
        return [t.detach().clone() for t in self.state()]

    def restore(self, state: list[Tensor]) -> None:
        """Brings back what `copy` returned."""
        with torch.no_grad():
            for t, saved in zip(self.state(), state, strict=True):
                t.copy_(saved)

    def are_finite(self) -> bool:
        return all(bool(torch.isfinite(t).all()) for t in self.state())

    def warn_of_unreached(self) -> None:
        """Says which parameters a backward pass of the loss gave no gradient: they stay as they are."""
        names = [name for name, p in self.named.items() if p.grad is None]
        if names:
            shown = ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")
            warnings.warn(
                f"fit: the loss does not reach {len(names)} of {len(self.parameters)} parameters, which will not "
                f"train: {shown}. Try to use them in the model or guide, or requires_grad_(False) to freeze them.",
                stacklevel=6,
            )


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
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise ValueError(
                f"device: expected one that is there, got {str(device)!r}, and this torch has "
                f'{f"{found} CUDA devices" if found else "no CUDA device"}. Try device="auto" or device="cpu".'
            )
    return device
