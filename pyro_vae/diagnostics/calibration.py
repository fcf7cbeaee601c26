r"""Simulation-based calibration: whether a guide's posterior is right on average over data from the model.

If z* ~ p(z), x ~ p(x|z*) and z_1, …, z_L ~ p(z|x), then z* and the draws are exchangeable, and for any function f

    rank = Σ_l 1[f(z_l, x) < f(z*, x)]

is uniform on 0, 1, …, L. It is computed for each element of each latent, and for f = log p(x|z): the prior in the place
of the guide passes all ranks of latents, as they are exchangeable with z* without regard to x, and fails there.

Sources: Talts, Betancourt, Simpson, Vehtari & Gelman (2018), *Validating Bayesian inference algorithms with
simulation-based calibration*; Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman & Vehtari (2023),
*Simulation-based calibration checking for Bayesian computation: the choice of test quantities shapes sensitivity*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import check_choice, checked
from pyro_vae.diagnostics.calibration_result import LIKELIHOOD, Calibration
from pyro_vae.diagnostics.simulated_draws import guide_draws, log_likelihood, ranks_among, weighted_ranks
from pyro_vae.diagnostics.simulations import Batch, Draws, Simulator
from pyro_vae.evidence.finished import fingerprint
from pyro_vae.evidence.posterior import resampled
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.threads import one_thread
from pyro_vae.pairs.validity import check_density
from pyro_vae.particles.sampler import ParticleSampler
from pyro_vae.ranks import Ranks, ranks

__all__ = ["METHODS", "Tally", "simulation_based_calibration"]

METHODS = ("guide", "adaptive", "annealed", "importance")


@one_thread
@checked
@seeded
def simulation_based_calibration(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_simulations: int = 500,
    num_draws: int = 100,
    plate: str | None = "data",
    method: str = "guide",
    num_particles: int = 1000,
    parallel: bool | str = "auto",
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Calibration:
    """Ranks of draws from the model among draws of the guide given data that were simulated from them.

    With a plate, each of its rows is one simulation: simulated data take the place of the data, and other arguments
    (contexts, covariates) stay those of the row. Rows are taken in a random order, again and again. With `plate=None`
    one simulation is a whole data set, which takes a run of model and guide each; the guide must then be one that takes
    other data sets, as an amortized one does, and the parameters of an autoguide that was fitted to one do not.

    What is checked is the average over data from the model, which may be far from the data at hand; for these,
    `posterior_calibration`. A guide may be right on average and wrong at each point; more functions f find more.

    Args:
        model: a Pyro model, as in `simulate`.
        guide: its guide. It need not have a density: auxiliary variables are left out.
        *args: what both are called with.
        num_simulations: S.
        num_draws: L, draws for each simulation.
        plate: name of the plate of data points; None takes all data as one point.
        method: whose draws: "guide", or as `draw_posterior` has them: "adaptive", "annealed", "importance", which are
            particles resampled by their weights. Those are draws of the posterior, so that uniform ranks are to be
            expected, as num_particles grows only: with few effective particles draws repeat, and look too narrow.
        num_particles: K, of which L are resampled, for the methods that weigh.
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        progress: show a progress bar, if on a terminal.
        **kwargs: what both are called with.

    Returns:
        `Calibration`: ranks of all latents that the guide draws, and of log p(x|z); discrete latents that are left to
        enumeration are summed out of the latter. Without a seed or with another one, p-values are new draws.

    Raises:
        ValueError: as `simulate`; a latent outside of the plate, which takes plate=None; data points in a loop.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # its standard deviation is that of the prior
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> simulation_based_calibration(model, guide, torch.zeros(100), seed=0).p_value < 0.001
        True
    """
    check_choice("method", method, METHODS)
    sampler = ParticleSampler(model, guide, args, kwargs, plate=plate, parallel=parallel)
    if method != "guide":
        check_density(sampler.pair)

    def draws_of(batch: Batch) -> Draws:
        if method == "guide":
            return guide_draws(sampler, batch, num_draws)
        rows = slice(0, sampler.num_points) if batch.rows is None else batch.rows
        return resampled(sampler, rows, method, num_draws, num_particles)[0]

    tally, group = Tally(num_draws), ranks()
    group.agree("simulation_based_calibration", num_simulations=num_simulations, num_draws=num_draws)
    group.part_ways(all_generators=True)
    own = group.share(torch.arange(num_simulations)).numel()
    with torch.no_grad(), evaluation_mode(model, guide):
        if group.several:
            group.agree("simulation_based_calibration", **{"rows, model, guide or weights": fingerprint(sampler)})
        simulator = Simulator(sampler, "simulation_based_calibration")
        together = num_draws + 1 if method == "guide" else max(num_particles, num_draws + 1)
        for batch, count in simulator.batches(own, together, progress and group.is_first):
            draws = draws_of(batch)
            tally.add(batch, draws, log_likelihood(sampler, batch, draws), slice(count))
    tally.gather(group)
    return tally.result("prior_sbc")


class Tally:
    """Ranks and moments of batch after batch.

    Args:
        num_draws: L.
    """

    def __init__(self, num_draws: int) -> None:
        self.num_draws = num_draws
        self._parts: list[tuple[Draws, Draws, Draws, Draws]] = []

    def add(
        self, batch: Batch, draws: Draws, log_prob: Tensor, keep: slice | Tensor, weight: Tensor | None = None
    ) -> None:
        """Some simulations of a batch.

        Args:
            batch: of the simulations.
            draws: {site: (L, n, …)}.
            log_prob: log p(x|z) of z* and of the draws, (1 + L, n).
            keep: which of the n.
            weight: of z* and of the draws, if these are to be weighed, as `weighted_ranks` has them.
        """
        if LIKELIHOOD in draws:
            raise ValueError(f"site {LIKELIHOOD!r}: this name is that of the rank of log p(x|z). Try another name.")
        truths = {name: batch.latents[name].to(value.dtype).expand_as(value[:1])[0] for name, value in draws.items()}
        pairs = {
            **{name: (value, truths[name]) for name, value in draws.items()},
            LIKELIHOOD: (log_prob[1:], log_prob[0]),
        }
        if weight is None:
            ranks = {name: ranks_among(*pair) for name, pair in pairs.items()}
        else:
            ranks = {name: weighted_ranks(*pair, weight, self.num_draws) for name, pair in pairs.items()}
        moments = {name: _moments(value, weight) for name, value in draws.items()}
        means, sds = ({name: found[i] for name, found in moments.items()} for i in range(2))
        for name in draws.keys() & batch.masks.keys():
            missing = ~batch.masks[name][0]
            ranks[name] = ranks[name].masked_fill(missing, -1)
            means[name], sds[name] = (found.masked_fill(missing, torch.nan) for found in (means[name], sds[name]))
        parts = (ranks, truths, means, sds)
        self._parts.append(tuple({name: v[keep] for name, v in part.items()} for part in parts))  # type: ignore[arg-type]

    def gather(self, ranks: Ranks) -> None:
        """Takes those of all ranks, in their order."""
        self._parts = [part for parts in ranks.gather(self._parts) for part in parts]

    def result(self, group: str) -> Calibration:
        """All of them together."""
        columns = zip(*self._parts, strict=True)
        ranks, truths, means, sds = ({n: torch.cat([part[n] for part in c]) for n in c[0]} for c in columns)
        return Calibration(ranks, truths, means, sds, self.num_draws, group)


def _moments(draws: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of (L, n, …), each (n, …); the weight of z*, which comes first, is not theirs."""
    if weight is None:
        return draws.double().mean(0), draws.double().std(0, correction=int(len(draws) > 1))
    share = weight[1:] / weight[1:].sum(0)
    share = share.reshape(*share.shape, *(1,) * (draws.dim() - 2))
    mean = (share * draws).sum(0)
    return mean, (share * (draws - mean).square()).sum(0).sqrt()
