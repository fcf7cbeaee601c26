r"""Log-weights of one trace at a time, by Pyro alone: log w = log p(x, z) − log q(z|x), z ~ q(z|x).

Nothing here imports the project. Sites that only the model has are summed out by `TraceEnum_ELBO`, whose loss for one
draw of the guide is −log w; what the guide marks for enumeration is summed by setting it to each of its values,
w = Σ_y p(x, y, z_y) / q(z_y|x, y), z_y ~ q(z|x, y). Log-probabilities have no scales.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_examples.example import Example

__all__ = ["Serial", "draw_serially"]

MOST_SECONDS = 4.0


@dataclass
class Serial:
    """M draws, one after the other.

    Attributes:
        drawn: log-weights with the guide's discrete latents drawn, (M, N); N = 1 where there is the joint only.
        summed: the same with them summed out; None where there are none.
        latents: {site: (M, …)}.
    """

    drawn: list[Tensor] = field(default_factory=list)
    summed: list[Tensor] = field(default_factory=list)
    latents: dict[str, list[Tensor]] = field(default_factory=dict)


class _Unmasked(Messenger):
    """Enumerated sites lose their masks: a masked site would count its values, where it has to sum to one."""

    def _pyro_sample(self, msg: dict) -> None:
        if not msg["is_observed"] and msg["infer"].get("enumerate") == "parallel":
            msg["mask"] = None


class _Unscaled(Messenger):
    def _pyro_sample(self, msg: dict) -> None:
        msg["scale"] = 1.0


def draw_serially(example: Example, count: int) -> Serial:
    """At most `count` draws, in a few seconds."""
    serial, start = Serial(), time.perf_counter()
    with torch.no_grad(), pyro.validation_enabled(False):
        while len(serial.drawn) < count and time.perf_counter() - start < MOST_SECONDS:
            serial.drawn.append(_drawn(example, serial.latents))
            if example.enumerated:
                serial.summed.append(_summed(example))
    return serial


def _drawn(example: Example, latents: dict[str, list[Tensor]]) -> Tensor:
    guide = poutine.trace(example.guide).get_trace(*example.args, **example.kwargs)
    for name, site in _sites(guide).items():
        if not site["is_observed"] and not site["infer"].get("is_auxiliary"):
            latents.setdefault(name, []).append(site["value"].detach())
    if example.summed is not None:
        model = _Unmasked()(_Unscaled()(example.model))
        values = poutine.replay(example.guide, guide)  # the draw is made; the objective scores it
        elbo = TraceEnum_ELBO(max_plate_nesting=example.summed, strict_enumeration_warning=False)
        return -torch.as_tensor(elbo.loss(model, _Unscaled()(values), *example.args, **example.kwargs)).reshape(1)
    model = poutine.trace(poutine.replay(example.model, guide)).get_trace(*example.args, **example.kwargs)
    return _log_prob(model, example) - _log_prob(guide, example, latent=True)


def _summed(example: Example) -> Tensor:
    """log Σ_y p(x, y, z_y) / q(z_y|x, y): guide and model with y set to each of its values. What the guide draws before
    y is the same for all of them."""
    before: dict[str, Tensor] = {}
    for name, site in _sites(poutine.trace(example.guide).get_trace(*example.args, **example.kwargs)).items():
        if name in example.enumerated:
            break
        before[name] = site["value"]
    found = []
    for values in product(*example.enumerated.values()):
        given = dict(zip(example.enumerated, values, strict=True))
        guide = poutine.trace(_Set(before, given)(example.guide)).get_trace(*example.args, **example.kwargs)
        replayed = poutine.replay(example.model, guide)
        model = poutine.trace(replayed).get_trace(*example.args, **example.kwargs)
        left_out = set(example.enumerated)
        found.append(_log_prob(model, example) - _log_prob(guide, example, latent=True, left_out=left_out))
    return torch.stack(found).logsumexp(0)


class _Set(Messenger):
    """Sets sites to values, and others to a value that is the same in all rows."""

    def __init__(self, values: Mapping[str, Tensor], alike: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values, self.alike = values, alike

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True
        if msg["name"] in self.alike:
            value = self.alike[msg["name"]]
            msg["value"], msg["done"] = value.expand(msg["fn"].batch_shape + value.shape), True


def _sites(trace: poutine.Trace) -> dict[str, dict[str, Any]]:
    return {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}


def _log_prob(
    trace: poutine.Trace, example: Example, *, latent: bool = False, left_out: set[str] | frozenset = frozenset()
) -> Tensor:
    """Log-probability of the sites of a trace, (N,), or in total, (1,). `latent`: without those that are observed."""
    total = torch.zeros(1)
    for name, site in _sites(trace).items():
        if name in left_out or (latent and site["is_observed"]):
            continue
        value = site["fn"].log_prob(site["value"])
        if site["mask"] is not None:
            value = torch.where(torch.as_tensor(site["mask"]), value, 0.0)
        dim = next((f.dim for f in site["cond_indep_stack"] if f.name == example.plate), None)
        if example.joint or dim is None:
            value = value.sum().reshape(1)
        else:
            value = value.movedim(dim, 0).flatten(1).sum(1) if value.dim() > 1 else value
        total = total + value
    return total
