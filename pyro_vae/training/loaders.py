"""What a `DataLoader` keeps from epoch to epoch: its random generators, and the state of parts that have one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_vae.pairs.modes import fork_random_state

__all__ = ["LoaderStates"]

PARTS = ("sampler", "sampler.sampler", "batch_sampler", "batch_sampler.sampler", "dataset")


class LoaderStates:
    """The states of some loaders: of torch's generators that they and their parts hold, and `state_dict()`s.

    Args:
        loaders: by name.

    Attributes:
        generators: {place: generator}, each once.
        stateful: {place: part with `state_dict` and `load_state_dict`, as loaders of torchdata have}.
    """

    def __init__(self, loaders: dict[str, DataLoader]) -> None:
        self.generators: dict[str, torch.Generator] = {}
        self.stateful: dict[str, Any] = {}
        for name, loader in loaders.items():
            whole = _has_state(loader)  # which then has those of its parts
            for place, part in _parts(name, loader):
                for attribute, value in getattr(part, "__dict__", {}).items():
                    if isinstance(value, torch.Generator) and all(value is not g for g in self.generators.values()):
                        self.generators[f"{place}.{attribute}"] = value
                if _has_state(part) and (part is loader or not whole):
                    self.stateful[place] = part

    def state(self) -> dict[str, Any]:
        """As plain values."""
        with fork_random_state():  # a loader may start an epoch to have a state
            states = {place: part.state_dict() for place, part in self.stateful.items()}
        return {"generators": {place: g.get_state() for place, g in self.generators.items()}, "states": states}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned."""
        for place, part in self.stateful.items():
            part.load_state_dict(state["states"][place])
        for place, generator in self.generators.items():
            generator.set_state(state["generators"][place])

    def what_does_not_fit(self, state: dict[str, Any]) -> Iterator[str]:
        """Says which generators would not take their state. Those of here are left alone."""
        for place, generator in self.generators.items():
            yield from not_a_state(generator, state["generators"].get(place), f"loaders/generators/{place}")
        for name, own in (("generators", self.generators), ("states", self.stateful)):
            if state[name].keys() != own.keys():
                yield f"loaders/{name}: expected {sorted(own) or 'none'}, got {sorted(state[name]) or 'none'}"


def not_a_state(generator: torch.Generator, state: Any, where: str) -> Iterator[str]:
    """Says why a generator would not take this state."""
    like = generator.get_state()
    if not isinstance(state, Tensor) or (state.shape, state.dtype) != (like.shape, like.dtype):
        yield f"{where}: expected the state of a random generator, got another"
        return
    try:
        torch.Generator(device=generator.device).set_state(state)
    except RuntimeError as error:
        yield f"{where}: {str(error).splitlines()[0]}"


def _has_state(part: Any) -> bool:
    return all(callable(getattr(part, name, None)) for name in ("state_dict", "load_state_dict"))


def _parts(name: str, loader: DataLoader) -> Iterator[tuple[str, Any]]:
    yield name, loader
    seen = {id(loader)}
    for path in PARTS:
        part: Any = loader
        for attribute in path.split("."):
            part = getattr(part, attribute, None)
        if part is not None and id(part) not in seen:
            seen.add(id(part))
            yield f"{name}.{path}", part
