r"""Which rows' posteriors to doubt: by the tails of their weights, and by how unlike data of the model they are.

The log-weights of a guide's draws, log w = log p(x, z) − log q(z|x), say two things of a row: k-hat and the effective
sample size, whether q covers its posterior; log p̂(x) and the variance of log w, whether x looks as data of the model
do, and whether q meets it as it meets these. Simulated data have x ~ p(x) by construction, so that ranks among theirs
are p-values,

    p = (1 + number of M simulated rows that are as extreme) / (M + 1),

uniform for a row from the model. Evidence counts as extreme at both ends: data outside of those trained on often have a
*higher* log p(x) (Nalisnick, Matsukawa, Teh, Gorur & Lakshminarayanan 2019, *Do Deep Generative Models Know What They
Don't Know?*). A large variance of log w is extreme.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import checked
from pyro_vae.diagnostics.doubt_table import DoubtfulRows
from pyro_vae.evidence.evidence import LOWER_BOUND, Evidence
from pyro_vae.evidence.local_fit import averaged
from pyro_vae.evidence.log_weights import LogWeightSummary
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.threads import one_thread
from pyro_vae.pairs.validity import check_density
from pyro_vae.particles.sampler import ParticleSampler
from pyro_vae.particles.simulation import simulate
from pyro_vae.progress import progress_bar

__all__ = ["doubtful_rows"]


@one_thread
@checked
@seeded
def doubtful_rows(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int = 500,
    num_simulated: int = 1000,
    level: float = 0.01,
    plate: str = "data",
    parallel: bool | str = "auto",
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> DoubtfulRows:
    """Finds rows whose posterior is doubtful: weights with heavy tails, or weights unlike those of simulated data.

    Simulated rows have the arguments that are not observed (covariates, masks) in the same proportions as the data, and
    pass through the guide as the data do. All p-values are of ranks in the pool of them.

    Args:
        model: a Pyro model with the data points in a plate, and no latents outside of it.
        guide: its guide.
        *args: what both are called with.
        num_particles: K, draws of each row.
        num_simulated: M, at least, simulated rows, a multiple of N: a p-value is at least 1/(M + 1). 0 leaves the
            p-values out, and needs no model that can be simulated.
        level: of the p-value, at which a row is called out of distribution.
        plate: name of the plate of data points.
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        progress: show a progress bar, if on a terminal.
        **kwargs: what both are called with.

    Returns:
        `DoubtfulRows`.

    Raises:
        ValueError: as `importance_sampling` and `simulate`; a level outside of (0, 1).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x.clamp(-3, 3) / 2, 0.8))
        >>> x = torch.cat([torch.linspace(-2.0, 2.0, 99), torch.tensor([12.0])])
        >>> found = doubtful_rows(model, guide, x, num_particles=100, seed=0, progress=False)
        >>> found.order[0].item(), found.out_of_distribution.sum().item()
        (99, 1)
    """
    sampler = ParticleSampler(model, guide, args, kwargs, plate=plate, parallel=parallel)
    check_density(sampler.pair)
    arguments, size = _repeated(sampler, num_simulated)
    rounds = ceil(num_simulated / size)
    with progress_bar(sampler.num_points + rounds * size, "doubtful rows", progress) as bar:
        value, error, ess, khat, num_zero, variance = _weigh(sampler, num_particles, bar)
        evidence = Evidence(value, error, ess, khat, num_particles, LOWER_BOUND, "doubtful_rows", num_zero)
        simulated = []
        for _ in range(rounds):
            found = simulate(model, guide, *arguments[0], plate=plate, parallel=parallel, **arguments[1])
            again = ParticleSampler(model, guide, found.args, found.kwargs, plate=plate, parallel=parallel)
            simulated.append(_weigh(again, num_particles, bar))
    if not simulated:
        unknown = torch.full_like(value, torch.nan)
        return DoubtfulRows(evidence, variance, unknown, unknown, unknown, level, 0)
    values, variances = (torch.cat([columns[i] for columns in simulated]) for i in (0, 5))
    p_evidence, own_evidence = (_two_sided(v, values) for v in (value, values))
    p_variance, own_variance = (_rank(-v, -variances) for v in (variance, variances))
    p_value = _rank(torch.minimum(p_evidence, p_variance), torch.minimum(own_evidence, own_variance))
    return DoubtfulRows(evidence, variance, p_evidence, p_variance, p_value, level, len(values))


def _repeated(sampler: ParticleSampler, num_rows: int) -> tuple[tuple[tuple, dict], int]:
    """The arguments, and how many rows they have: at least `num_rows`, each as often as any other, if rows can be told
    apart."""
    rows, times = sampler.rows, ceil(max(num_rows, 1) / sampler.num_points)
    if not rows.separable or times == 1:
        return (rows.args, rows.kwargs), sampler.num_points
    index = torch.arange(times * sampler.num_points) % sampler.num_points
    args = tuple(a[index.to(a.device)] if i in rows.cut_keys else a for i, a in enumerate(rows.args))
    kwargs = {n: a[index.to(a.device)] if n in rows.cut_keys else a for n, a in rows.kwargs.items()}
    return (args, kwargs), len(index)


def _weigh(sampler: ParticleSampler, num_particles: int, bar: Any) -> tuple[Tensor, ...]:
    """log p̂(x), its error, ESS, k-hat, the number of zero weights and the variance of log-weights, each (N,)."""
    parts = []
    with torch.no_grad(), evaluation_mode(sampler.model, sampler.guide):
        sampler.check()
        rows, counts = sampler.chunks(num_particles)
        for r in rows:
            summary = LogWeightSummary(num_particles)

            def draw(count: int, r: slice = r, summary: LogWeightSummary = summary) -> Tensor:
                log_weight = sampler.log_weight(count, r, check=False)
                summary.update(log_weight)
                return log_weight

            error = averaged(draw, counts)[1]
            variance = (error.square() * num_particles).nan_to_num(torch.inf, posinf=torch.inf)
            parts.append((*summary.result(), summary.num_zero, variance))
            bar.update(len(variance))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _rank(value: Tensor, among: Tensor) -> Tensor:
    """(1 + number of simulated values that are at most as large) / (M + 1), (N,)."""
    among = among.nan_to_num(-torch.inf).sort().values
    count = torch.searchsorted(among, value.nan_to_num(-torch.inf, torch.inf, -torch.inf), right=True)
    return (1 + count.double()) / (len(among) + 1)


def _two_sided(value: Tensor, among: Tensor) -> Tensor:
    return (2 * torch.minimum(_rank(value, among), _rank(-value, -among))).clamp(max=1.0)
