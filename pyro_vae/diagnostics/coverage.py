r"""Expected coverage: whether credible regions of a guide hold z* as often as they say, over data from the model.

For z* ~ p(z), x ~ p(x|z*) and L draws z_l ~ q(z|x), of all latents of a data point together:

- the region of highest density of the nominal level α holds z* where fewer than a share α of the draws have a higher
  density than z*. The rank is Σ_l 1[log q(z_l|x) > log q(z*|x)] (Deistler, Goncalves & Macke 2022, *Truncated
  proposals for scalable and hassle-free simulation-based inference*; Hermans et al. 2022);
- TARP takes the ball around a random point r whose share of draws is α. The rank is Σ_l 1[d(z_l, r) < d(z*, r)]
  (Lemos, Coogan, Hezaveh & Perreault-Levasseur 2023, *Sampling-based accuracy testing of posterior estimators for
  general inference*). It needs no density.

If q is the posterior, both ranks are uniform on 0..L, and the empirical coverage is the nominal one. Neither is
sufficient: the prior in the place of the guide passes both, as r does not depend on x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae.arguments import checked
from pyro_vae.diagnostics.calibration_plots import plot_coverage
from pyro_vae.diagnostics.coverage_ranks import HighestDensity, Tarp
from pyro_vae.diagnostics.ecdf_bands import ecdf_bands, uniform_p_values
from pyro_vae.diagnostics.simulated_draws import guide_draws
from pyro_vae.diagnostics.simulations import Simulator
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.threads import one_thread
from pyro_vae.particles.sampler import ParticleSampler

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Coverage", "expected_coverage"]

KINDS = ("highest_density", "tarp")


@dataclass(frozen=True, repr=False)
class Coverage:
    """How often credible regions hold z*.

    Attributes:
        ranks: {"highest_density", "tarp": (S,)}, whole numbers from 0 to L.
        num_draws: L.
    """

    ranks: dict[str, Tensor]
    num_draws: int

    @property
    def levels(self) -> Tensor:
        """Nominal levels i/(L + 1), i = 1..L, (L,)."""
        return torch.arange(1, self.num_draws + 1, dtype=torch.double) / (self.num_draws + 1)

    @property
    def coverage(self) -> dict[str, Tensor]:
        """Shares of z* inside of the regions of these levels, {kind: (L,)}."""
        below = torch.arange(1, self.num_draws + 1).unsqueeze(1)
        return {kind: (ranks.cpu() < below).double().mean(1) for kind, ranks in self.ranks.items()}

    @cached_property
    def p_values(self) -> dict[str, float]:
        """Of coverages that are the nominal ones, at all levels at once (`ecdf_bands`)."""
        return {kind: uniform_p_values(ranks, self.num_draws).item() for kind, ranks in self.ranks.items()}

    def bands(self, probability: float = 0.95) -> tuple[Tensor, Tensor]:
        """The lowest and the highest coverage inside of simultaneous bands, each (L,)."""
        return ecdf_bands(len(next(iter(self.ranks.values()))), self.num_draws, probability)

    def plot(self, ax: Axes | None = None, *, probability: float = 0.95) -> Axes:
        """Draws the empirical coverage over the nominal one, and the band of this probability; returns the axes."""
        return plot_coverage(self.coverage, self.bands(probability), ax)

    def __repr__(self) -> str:
        at = [round(level * (self.num_draws + 1)) for level in (0.5, 0.9) if self.num_draws >= 19]
        lines = [f"Coverage over {len(next(iter(self.ranks.values())))} simulations"]
        for kind, value in self.coverage.items():
            shares = ", ".join(f"{value[i - 1]:.1%} in {self.levels[i - 1]:.1%}" for i in at)
            lines.append(f"  {kind:16} p-value {self.p_values[kind]:.2g}{shares and '; ' + shares}")
        return "\n".join(lines)


@one_thread
@checked
@seeded
def expected_coverage(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_simulations: int = 500,
    num_draws: int = 100,
    plate: str | None = "data",
    kinds: tuple[str, ...] = KINDS,
    parallel: bool | str = "auto",
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Coverage:
    """Coverage of z* ~ p(z) by credible regions of q(z|x), x ~ p(x|z*), as `simulation_based_calibration` has them.

    Densities are those of the sites' own values, and regions are of these; with a guide over auxiliary variables, they
    are those of unconstrained coordinates. Distances of TARP are Euclidean, of all
    elements of all latents, each divided by its standard deviation over draws of the prior; reference points are draws
    of the prior at the same row.

    Args:
        model: a Pyro model, as in `simulate`.
        guide: its guide.
        *args: what both are called with.
        num_simulations: S.
        num_draws: L, draws for each simulation.
        plate: name of the plate of data points; None takes all data as one point.
        kinds: "highest_density", "tarp", or both.
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        progress: show a progress bar, if on a terminal.
        **kwargs: what both are called with.

    Returns:
        `Coverage`.

    Raises:
        ValueError: as `simulation_based_calibration`; "highest_density" with a guide whose density at a point is not
            known, as it has auxiliary variables that do not follow from the latents, points or a flow without an
            inverse.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # half as wide as the posterior
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5 / 2))
        >>> found = expected_coverage(model, guide, torch.zeros(100), num_draws=99, seed=0)
        >>> round(found.coverage["highest_density"][89].item(), 1)  # by regions of 90 %
        0.6
    """
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds: expected some of {KINDS}, got {kinds!r}. Try kinds=('tarp',).")
    sampler = ParticleSampler(model, guide, args, kwargs, plate=plate, parallel=parallel)
    makers: dict[str, Callable[[ParticleSampler], Callable]] = {"highest_density": HighestDensity, "tarp": Tarp}
    ranks_of = {kind: makers[kind](sampler) for kind in kinds}
    parts: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    with torch.no_grad(), evaluation_mode(model, guide):
        simulator = Simulator(sampler, "expected_coverage")
        for batch, count in simulator.batches(num_simulations, num_draws + 1, progress):
            draws = guide_draws(sampler, batch, num_draws)
            for kind, ranks in ranks_of.items():
                parts[kind].append(ranks(batch, draws)[:count])
    return Coverage({kind: torch.cat(column) for kind, column in parts.items()}, num_draws)
