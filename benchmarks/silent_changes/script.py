"""What every way starts from: a user's script says `from silent_changes.script import *`.

The model is z ~ N(0, 1), x ~ N(z + b, 1) in a plate, and a way is how it gets at the number b. A script defines

- `model`, and perhaps a `guide`, an `elbo`;
- `change()`, called once before step `CHANGE`, or `every(step)`, called before each step, or `args(step)`, what model
  and guide are called with, or `around(step)`, a context manager around the step, or `with_svi(svi)`, called once with
  the `SVI` object; or none of these, where the model changes by itself;
- perhaps `final()`, a tensor that has to be the same at the end, and `undo()`.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

__all__ = [
    "PyroModule",
    "PyroParam",
    "Trace_ELBO",
    "X",
    "constraints",
    "contextlib",
    "dist",
    "guide",
    "itertools",
    "networks",
    "nn",
    "np",
    "observe",
    "partial",
    "poutine",
    "pyro",
    "random",
    "torch",
]

X = torch.randn(8, generator=torch.Generator().manual_seed(1)) + 1.0


def observe(x: Tensor, b: Any) -> None:
    """The model, given the number b."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + b, 1.0), obs=x)


def guide(x: Tensor, *_: Any, **__: Any) -> None:
    """Its guide."""
    slope = pyro.param("slope", torch.tensor(0.3))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, scale))


def networks(make: Callable[[], nn.Module]) -> tuple[nn.Module, Callable]:
    """A module that takes (…, 1) to (…, 1), from one seed, and a model that observes z + module(1) with it."""
    torch.manual_seed(3)
    net = make()

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + net(x.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

    return net, model
