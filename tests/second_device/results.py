"""What results consist of."""

from functools import cached_property

import matplotlib.pyplot as plt
import torch
from torch import nn


def tensors_of(x):
    """All tensors and numbers in what a call has returned."""
    if isinstance(x, torch.Tensor | float | int | bool):
        yield x
    elif isinstance(x, nn.Module):
        yield from x.state_dict().values()
    elif isinstance(x, list | tuple | set | dict):
        for value in x.values() if isinstance(x, dict) else x:
            yield from tensors_of(value)
    if type(x).__module__.startswith("pyro_vae") and not isinstance(x, nn.Module):
        yield from tensors_of(list(getattr(x, "__dict__", {}).values()))


def computed_of(x):
    """Tensors and numbers of the properties of all results; they print and draw themselves, too."""
    if isinstance(x, list | tuple | dict):
        for value in x.values() if isinstance(x, dict) else x:
            yield from computed_of(value)
    if type(x).__module__.startswith("pyro_vae") and not isinstance(x, nn.Module):
        repr(x)
        if hasattr(x, "plot"):
            x.plot()
            plt.close("all")
        for name, member in vars(type(x)).items():
            if isinstance(member, property | cached_property):
                yield from tensors_of(getattr(x, name))
