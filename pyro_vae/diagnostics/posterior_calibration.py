r"""Calibration near the data at hand: posterior simulation-based calibration for a guide of single data points.

Data from the model (`simulation_based_calibration`) may be far from the data at hand. Here they are replications of it.
For each data point x with z* ~ p(z|x) and y ~ p(y|z*), z* is a draw from the posterior given both,

    p(z|x, y) ∝ p(z|y) p(x|z),

as x and y are independent given z. So draws z_k ~ q(z|y) have weights w(z) = p(x|z) for it, if q(z|y) = p(z|y). Of
the points z*, z_1, …, z_K any may be the one from p(z|x, y), with probabilities in proportion to their weights: the
share of the weight of those below z*, with that of z* itself split at random,

    [Σ_k w(z_k) 1[z_k < z*] + u w(z*)] / [Σ_k w(z_k) + w(z*)],    u ~ U(0, 1),

is uniform, for each K, and so it is with log p(y|z) in the place of z. Few effective draws lower the power and raise no
false alarm. The guide is asked at y, which is like x; z* must be a draw from the posterior at x, for which the guide is
a starting point only.

Source: Säilynoja, Schmitt, Bürkner & Vehtari (2025), *Posterior SBC: simulation-based calibration checking conditional
on data*. There the posterior given both is that of the same inference; here the guide knows a single data point, so
that the factor p(x|z), which is known, is put in by weights.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import checked
from pyro_vae.diagnostics.calibration import Tally
from pyro_vae.diagnostics.calibration_result import Calibration
from pyro_vae.diagnostics.simulated_draws import guide_draws, log_likelihood
from pyro_vae.diagnostics.simulations import Simulator
from pyro_vae.evidence.posterior import draw_posterior
from pyro_vae.pairs.libraries import warn
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.threads import one_thread
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["posterior_calibration"]


@one_thread
@checked
@seeded
def posterior_calibration(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_simulations: int = 500,
    num_draws: int = 100,
    num_particles: int = 2000,
    plate: str | None = "data",
    method: str = "adaptive",
    parallel: bool | str = "auto",
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Calibration:
    """Ranks of draws from the posterior of the data at hand among draws of the guide given replications of these data.

    It says whether q(z|y) is the posterior for y like the data at hand. That of the data themselves is not compared
    with anything: k-hat and effective sample sizes of `importance_sampling` speak of it. Discrete latents that are
    marked for enumeration are summed out, in x and in y each by themselves.

    Args:
        model: a Pyro model, as in `simulate`.
        guide: its guide, whose density is needed for z* ~ p(z|x) only.
        *args: what both are called with, with the data at hand.
        num_simulations: S, as many for each row, or one for each of S rows at random where there are more; rows whose
            draws z* are not to be trusted (`draw_posterior`) are left out, with a warning, and S is less then.
        num_draws: L: shares are given as ranks from 0 to L.
        num_particles: K draws of the guide given y, and as many particles for z* ~ p(z|x).
        plate: name of the plate of data points; None takes all data as one point, for guides that take other data sets.
        method: of `draw_posterior`, for z*: "adaptive", "annealed" or "importance".
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        progress: show a progress bar, if on a terminal.
        **kwargs: what both are called with.

    Returns:
        `Calibration`, of the group "posterior_sbc", with moments of p(z|x, y). Ranks of the exact posterior are uniform
        if z* are draws from it.

    Raises:
        ValueError: as `simulation_based_calibration` and `draw_posterior`; there are no rows to trust.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # wrong for large x, which the model seldom draws
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x.clamp(max=2.0) / 2, 0.5**0.5))
        >>> far = torch.full((100,), 4.0)
        >>> posterior_calibration(model, guide, far, seed=0).p_value < 0.001
        True
    """
    sampler = ParticleSampler(model, guide, args, kwargs, plate=plate, parallel=parallel)
    simulator = Simulator(sampler, "posterior_calibration")
    if sampler.rows.separable and num_simulations < sampler.num_points:  # z* is drawn for no more rows than simulated
        args, kwargs = simulator.cut(torch.randperm(sampler.num_points)[:num_simulations])[1]
        sampler = ParticleSampler(model, guide, args, kwargs, plate=plate, parallel=parallel)
        simulator = Simulator(sampler, "posterior_calibration")
    repeats = -(-num_simulations // sampler.num_points)
    options: dict[str, Any] = {"plate": plate, "method": method, "parallel": not sampler.serial, "progress": progress}
    found = draw_posterior(model, guide, *args, num_samples=repeats, num_particles=num_particles, **options, **kwargs)
    truths = {n: z.unsqueeze(1) if plate is None else z for n, z in found.items()}
    good = _trusted(found.doubtful)
    size, tally, left = _rows_at_once(sampler, num_particles), Tally(num_draws), num_simulations
    with torch.no_grad(), evaluation_mode(model, guide):
        for r in range(repeats):
            for index in good.nonzero()[:, 0].split(size) if sampler.rows.separable else [None]:
                here = torch.arange(sampler.num_points) if index is None else index
                nodes = sampler.pair.look.model.nodes
                star = {n: sampler.layout.place(nodes[n], z[r : r + 1, here]) for n, z in truths.items()}
                batch = simulator.draw(index, star)
                with sampler.rows.using(*batch.arguments):
                    draws = {n: z for n, z in guide_draws(sampler, batch, num_particles).items() if n in truths}
                    log_prob = log_likelihood(sampler, batch, draws)
                with sampler.rows.using(*simulator.cut(index)[1]):
                    weight = log_likelihood(sampler, batch, draws).double().nan_to_num(-inf).softmax(0)
                keep = good[here].nonzero()[:left, 0]
                tally.add(batch, draws, log_prob, keep, weight)
                left -= len(keep)
    return tally.result("posterior_sbc")


def _rows_at_once(sampler: ParticleSampler, num_particles: int) -> int:
    chunk = sampler.chunks(num_particles + 1)[0][0]
    return chunk.stop - chunk.start


def _trusted(doubtful: Tensor) -> Tensor:
    """Which data points have draws of the posterior to start from, (N,)."""
    if doubtful.all():
        raise ValueError(
            "draws from the posterior of the data at hand are not to be trusted at any data point, so that there is "
            "nothing to start from. Try more num_particles, or method='annealed'."
        )
    if doubtful.any():
        warn(
            f"posterior_calibration: leaves out {int(doubtful.sum())} of {len(doubtful)} data points, whose draws "
            "from the posterior are not to be trusted."
        )
    return ~doubtful
