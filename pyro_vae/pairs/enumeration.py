"""Sums over discrete latents that are marked for enumeration."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from math import inf

from pyro import poutine
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from torch import Tensor

from pyro_vae.pairs.sites import outside_support, sample_sites, site_log_prob

__all__ = ["sum_product"]


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
                if factor > 0 and not enumerated and not site["is_observed"]:
                    outside = outside_support(site)
                    log_prob = log_prob if outside is None else log_prob.masked_fill(outside, -inf)
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
