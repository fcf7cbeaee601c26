"""Running Pyro functions and reading their traces: sites, log-probabilities, plates, sums over discrete latents."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

__all__ = [
    "SetSubsample",
    "SetValues",
    "StopAfter",
    "evaluation_mode",
    "plate_frames",
    "random_state",
    "sample_sites",
    "set_random_state",
    "site_log_prob",
    "sum_product",
    "unobserved",
]


@contextmanager
def evaluation_mode() -> Iterator[None]:
    """Runs every `nn.Module` called inside in evaluation mode (dropout off, batch norm frozen), and restores each.

    It needs no list of modules: it sees them as they are called, wherever a model or guide keeps them.
    """
    changed: list[nn.Module] = []

    def switch(module: nn.Module, _: Any) -> None:
        if module.training:
            module.training = False
            changed.append(module)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(switch)
    try:
        yield
    finally:
        handle.remove()
        for module in changed:
            module.training = True


def random_state() -> tuple[Tensor, list[Tensor]]:
    """Of torch's generators, on the CPU and on CUDA where that is in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    """Back to what `random_state` returned."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def sample_sites(trace: poutine.Trace) -> dict[str, dict]:
    """The sites that carry probability: not plates' subsamples, not `pyro.deterministic`."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not site["infer"].get("_deterministic")
    }


def site_log_prob(site: dict) -> Tensor:
    """log p of a trace's site with its mask, without its scale, over batch dimensions."""
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(value, mask=site["mask"])


def plate_frames(*traces: poutine.Trace) -> list[Any]:
    """The plates around the sites of traces, one entry for each site and plate."""
    return [f for trace in traces for site in sample_sites(trace).values() for f in site["cond_indep_stack"]]


def unobserved(model: Callable) -> Callable:
    """A model without its observed sites: the prior, in the role of a guide."""
    return poutine.block(model, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])


def sum_product(
    traces: Iterable[poutine.Trace], sign: Callable[[poutine.Trace, dict], int], keep: dict[str, int]
) -> Tensor:
    """log Σ_y Π_sites p^sign over the values y of enumerated sites, for each element of the plates `keep`.

    A site that is summed out inside a plate is summed before the product over that plate is taken, by Pyro's tensor
    variable elimination. The enumerated sites' own masks are left out: a masked site still sums to one.

    Args:
        traces: of functions run under one `EnumMessenger` dimension allocation, the guide's first.
        sign: 1, −1 or 0 (leave out) for each trace and site.
        keep: {name of a plate: its size}.

    Returns:
        A tensor with one dimension for each of `keep`, in this order.
    """
    symbols: dict[str, str] = {}
    tree: OrderedDict[frozenset, list[Tensor]] = OrderedDict()
    sum_dims: set[str] = set()
    sizes: dict[str, int] = {}
    for trace in traces:
        trace.symbolize_dims(symbols)
        for site in sample_sites(trace).values():
            if "_enumerate_symbol" in site["infer"]:
                sum_dims.add(site["infer"]["_enumerate_symbol"])
            for frame in site["cond_indep_stack"]:
                if frame.vectorized:
                    sizes.setdefault(symbols[frame.name], max(frame.size, 1))  # −1: declared without a size
            factor = sign(trace, site)
            if factor:
                enumerated = site["infer"].get("_enumerate_dim") is not None
                log_prob = site["fn"].log_prob(site["value"]) if enumerated else site_log_prob(site)
                ordinal = frozenset(symbols[f.name] for f in site["cond_indep_stack"] if f.vectorized)
                term = packed.pack(factor * log_prob, site["infer"]["_dim_to_symbol"])
                tree.setdefault(ordinal, []).append(term)
                sizes.update(zip(term._pyro_dims, term.shape, strict=True))
    for name, size in keep.items():
        sizes[symbols[name]] = size
    target = [symbols[name] for name in keep]
    result = contract_to_tensor(tree, sum_dims, frozenset(target), ring=LogRing(dim_to_size=sizes))
    dims = result._pyro_dims
    result = result.permute([dims.index(s) for s in target if s in dims])
    for axis, symbol in enumerate(target):  # Pyro drops dimensions of size one
        if symbol not in dims:
            result = result.unsqueeze(axis)
    return result.expand(list(keep.values()))


class SetValues(Messenger):
    """Sets latent sites to given values.

    Unlike `poutine.replay` it leaves the message open for an `EnumMessenger` outside, which so learns that a site's
    parameters depend on enumerated ones.
    """

    def __init__(self, latents: dict[str, Tensor]) -> None:
        super().__init__()
        self.latents = latents

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.latents:
            msg["value"] = self.latents[msg["name"]]


class StopAfter(Messenger):
    """Stops a function by `StopAfter.Done` as soon as these sites have been sampled: no decoder runs for a prior."""

    class Done(Exception):
        pass

    def __init__(self, sites: Iterable[str]) -> None:
        super().__init__()
        self.sites = set(sites)
        self._left: set[str] = set()

    def __enter__(self) -> Any:
        self._left = set(self.sites)
        return super().__enter__()

    def _pyro_post_sample(self, msg: dict) -> None:
        self._left.discard(msg["name"])
        if not self._left:
            raise self.Done


class SetSubsample(Messenger):
    """Sets the indices that a plate draws."""

    def __init__(self, plate: str, indices: Tensor) -> None:
        super().__init__()
        self.plate, self.indices = plate, indices

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] == self.plate and site_is_subsample(msg):
            msg["value"] = self.indices.to(msg["fn"].device)
