"""What a kernel of MCMC keeps besides draws, and draws of a kernel without a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vae.integrations.arviz_groups import Groups

__all__ = ["put_draws", "put_statistics"]


def put_statistics(groups: Groups, mcmc: Any, samples: dict[str, Tensor]) -> None:
    """Stores divergences and what `with_statistics` kept."""
    chains, draws = next(iter(samples.values())).shape[:2]
    kept: list[dict] = [diagnostics.get("statistics", {}) for diagnostics in mcmc._diagnostics]
    statistics = {name: torch.tensor([chain[name] for chain in kept]) for name in kept[0]}
    diverging = torch.zeros(chains, draws, dtype=torch.bool)
    for chain, diagnostics in enumerate(mcmc._diagnostics):
        diverging[chain, list(diagnostics.get("divergences", []))] = True
    if chains == 1 and "step_size" not in statistics and hasattr(mcmc.kernel, "step_size"):
        statistics["step_size"] = torch.full((1, draws), float(mcmc.kernel.step_size))  # which the warm-up has fixed
    for name, value in {"diverging": diverging, **statistics}.items():
        groups.put("sample_stats", name, value.flatten(0, 1), [], draws=True)
    rates = [diagnostics.get("acceptance rate") for diagnostics in mcmc._diagnostics]
    if all(rate is not None for rate in rates):
        groups.attributes["sample_stats"] = {"fraction_accepted": sum(map(float, rates)) / chains}


def put_draws(groups: Groups, mcmc: Any, samples: dict[str, Tensor]) -> None:
    """Stores the draws of a kernel without a model, and lp, minus its potential function."""
    flat = {name: value.flatten(0, 1) for name, value in samples.items()}
    for name, value in flat.items():
        groups.put("posterior", name, value, [], draws=True)
    unconstrained = {name: mcmc.transforms[name](v) if name in mcmc.transforms else v for name, v in flat.items()}
    count = len(next(iter(flat.values())))
    lp = [-mcmc.kernel.potential_fn({name: u[i] for name, u in unconstrained.items()}) for i in range(count)]
    groups.put("sample_stats", "lp", torch.stack(lp), [], draws=True)
