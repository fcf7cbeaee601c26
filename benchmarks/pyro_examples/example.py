"""`Example`: a pair with its data, and how to train it. `load` imports a module of a checkout of Pyro."""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

__all__ = ["Example", "Namespace", "digits", "load", "train"]

STUBS = ("visdom", "wget", "torchvision", "torchvision.transforms", "torchvision.datasets", "torchvision.utils")


@dataclass
class Example:
    """A pair.

    Attributes:
        model: a Pyro model.
        guide: its guide.
        args: what both are called with.
        kwargs: what both are called with.
        plate: of its data points; None if it has none.
        joint: whether latents are outside of the plate, so that there is only the joint evidence of all data.
        summed: latents that only the model has, summed out by `TraceEnum_ELBO`, and in how many plates all sites are.
        enumerated: {site: its values}, discrete latents that the guide draws and marks for enumeration.
        elbo: to train with.
        steps: of training.
        learning_rate: of Adam.
        modules: set to evaluation mode when trained.
    """

    model: Callable
    guide: Callable
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    plate: str | None = "data"
    joint: bool = False
    summed: int | None = None
    enumerated: Mapping[str, Tensor] = field(default_factory=dict)
    elbo: Any = field(default_factory=Trace_ELBO)
    steps: int = 200
    learning_rate: float = 0.02
    modules: tuple = ()


def load(checkout: Path, path: str) -> ModuleType:
    """A module of the checkout's examples, whose neighbours it may import; what would draw or download is a stub."""
    for name in STUBS:
        sys.modules.setdefault(name, MagicMock())
    file = checkout / "examples" / path
    sys.path.insert(0, str(file.parent))
    name = "pyro_example_" + file.stem.replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no module.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def train(example: Example) -> None:
    """Some steps, so that weights are not degenerate."""
    optimizer = pyro.optim.ClippedAdam({"lr": example.learning_rate})
    svi = SVI(example.model, example.guide, optimizer, loss=example.elbo)
    with pyro.validation_enabled(False):
        for _ in range(example.steps):
            svi.step(*example.args, **example.kwargs)
    for module in example.modules:
        module.eval()


def digits(count: int) -> Tensor:
    """Handwritten digits of scikit-learn in the shape of MNIST, (count, 1, 28, 28), in [0, 1]."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images[:count], dtype=torch.float32)[:, None] / 16
    return torch.nn.functional.interpolate(images, (28, 28), mode="bilinear")
