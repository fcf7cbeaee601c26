r"""A VAE's weights in a run of Pyro: names for them, and the values that they have in this run.

`pyro.infer.SVI` trains the parameters that the model and guide pass to `pyro.param`. A VAE's weights are called
`name$$$role.parameter`, by a name that no other has (`pyro_vae.pairs.names`).

A network has one set of weights for all rows. They are therefore declared outside of all plates, also where the VAE is
called inside of one: under `poutine.lift`, and as a `PyroSample`, a weight is one latent of the whole model,

    w ~ p(w),    z_n ~ p(z),    x_n ~ p(x|z_n, w),

whose prior a mini-batch does not scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger, block_messengers
from torch import Tensor, nn

from pyro_vae.distributions.structure import condition
from pyro_vae.pairs.names import trainable

__all__ = ["Declared", "declare", "random_attributes"]

NOTHING: Mapping[str, Tensor] = {}
WHOLE_RUNS = ("particles_vectorized", "num_predictive_samples")  # how Pyro's plates of many runs at once are called


class Declared:
    """A conditional distribution whose weights have the values that they have in this run.

    Args:
        part: the conditional distribution.
        role: what error messages call it.
        weights: {name of a parameter: value}, of those that a handler such as `poutine.lift` replaced.
        sites: {name of a sample site: value}, of the `PyroSample`s.
    """

    def __init__(
        self,
        part: Any,
        role: str,
        weights: Mapping[str, Tensor] | None = None,
        sites: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.part, self.role = part, role
        self.weights, self.sites = weights or {}, sites or {}

    def __call__(self, *inputs: Tensor, event_dims: Sequence[int] | None = None) -> Any:
        """The distribution given `inputs`; `event_dims` as in `condition`."""
        options: dict[str, Any] = {"event_dims": event_dims, "role": self.role}
        with _Known(self.part, self.sites) if _pyro_modules(self.part) else nullcontext():
            if self.weights:
                weights = {f"part.{name}": value for name, value in self.weights.items()}
                return torch.func.functional_call(_Conditioned(self.part), weights, inputs, options)
            return condition(self.part, *inputs, **options)


def declare(parts: Mapping[str, Any], role: str, name: str) -> Declared:
    """`parts[role]`, with its parameters passed to `pyro.param` and its `PyroSample`s sampled, outside of all plates.

    Args:
        parts: {role: conditional distribution}.
        role: the part.
        name: the name of the VAE in the parameter store, from `pyro_vae.pairs.names.store_name`.

    Raises:
        ValueError: a weight comes back random and in another shape, such as one for each of many particles.
    """
    part = parts[role]
    parameters = dict(trainable(part))
    with block_messengers(_is_plate):
        values = {key: pyro.param(f"{name}$$${role}.{key}", p) for key, p in parameters.items()}
        sites = _sample_attributes(part)
    # a handler, such as poutine.lift, replaced the weights by other values
    changed = {key: v for key, v in values.items() if v is not parameters[key]}
    for key, value in changed.items():
        _check_shape(f"{name}$$${role}.{key}", value, parameters[key].shape)
    constrained = [key for key in changed if key.endswith("_unconstrained") and _pyro_modules(part)]
    if constrained:
        raise ValueError(
            f"{role}: {constrained[0]!r} is a PyroParam, which takes its value from Pyro's parameter store and from no "
            "handler. Try PyroSample for a weight that is to be random."
        )
    return Declared(part, role, changed, sites)


def random_attributes(part: Any) -> list[tuple[PyroModule, str]]:
    """The `PyroSample`s of a part: (module, name of the attribute)."""
    return [(module, name) for module in _pyro_modules(part) for name in module._pyro_samples]


def _sample_attributes(part: Any) -> dict[str, Tensor]:
    """Samples the `PyroSample`s, each once: {site: value}."""
    attributes = random_attributes(part)
    if not attributes:
        return {}
    with ExitStack() as stack:
        for module in _pyro_modules(part):
            stack.enter_context(module._pyro_context)  # inside of it an attribute is a site, and keeps its value
        stack.enter_context(poutine.block(hide_types=["param"]))  # of priors that depend on parameters, declared above
        sampled = stack.enter_context(_Sampled())
        for module, name in attributes:
            getattr(module, name)
    return sampled.values


def _pyro_modules(part: Any) -> list[PyroModule]:
    return [m for m in part.modules() if isinstance(m, PyroModule)] if isinstance(part, nn.Module) else []


def _is_plate(messenger: Messenger) -> bool:
    """Whether it is a plate, other than the plates of many runs: each run has weights of its own."""
    return isinstance(messenger, IndepMessenger) and not messenger.name.endswith(WHOLE_RUNS)


def _check_shape(name: str, value: Tensor, expected: torch.Size) -> None:
    if value.shape != expected:
        raise ValueError(
            f"the weight {name!r} is random: expected one set of weights, of shape {tuple(expected)}, got "
            f"{tuple(value.shape)}. A network cannot run with one set for each of many particles. Try one particle at "
            "a time (vectorize_particles=False in Pyro, parallel=False here), or a prior with the shape of the weight, "
            f"such as dist.Normal(0.0, 1.0).expand({list(expected)}).to_event({len(expected)})."
        )


class _Sampled(Messenger):
    """Keeps the values of sites, which must have the shapes that their distributions have outside of plates."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}

    def _pyro_sample(self, msg: dict) -> None:  # the innermost handler: no plate has expanded the distribution yet
        self._shapes[msg["name"]] = msg["fn"].shape()

    def _pyro_post_sample(self, msg: dict) -> None:
        _check_shape(msg["name"], msg["value"], self._shapes[msg["name"]])
        self.values[msg["name"]] = msg["value"]


class _Known(Messenger):
    """Inside a call of a part with `PyroModule`s, keeps from all other handlers what was declared before the call."""

    def __init__(self, part: nn.Module, sites: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.sites = sites
        self._parameters = {id(p) for p in part.parameters()}

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.sites:
            msg["value"] = self.sites[msg["name"]]
            msg["done"] = msg["stop"] = True

    def _pyro_param(self, msg: dict) -> None:
        if len(msg["args"]) > 1 and id(msg["args"][1]) in self._parameters:
            msg["value"] = msg["args"][1]
            msg["done"] = msg["stop"] = True


class _Conditioned(nn.Module):
    """A conditional distribution as a module that `torch.func.functional_call` can call."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *inputs: Tensor, **options: Any) -> Any:
        return condition(self.part, *inputs, **options)
