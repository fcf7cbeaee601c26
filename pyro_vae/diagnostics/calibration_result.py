"""`Calibration`: ranks of z* among draws, and what they say of these draws."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae.diagnostics.calibration_plots import plot_ranks
from pyro_vae.diagnostics.ecdf_bands import ecdf_bands, uniform_p_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LIKELIHOOD", "Calibration"]

LIKELIHOOD = "log_likelihood"
LEVEL = 0.05  # of the doubts that a table points at
MOST_ROWS = 12  # of a table


@dataclass(frozen=True, repr=False)
class Calibration:
    """Ranks of S draws z* from the model, each among L draws of a posterior given data that were simulated from z*.

    Attributes:
        ranks: {site: (S, *inner plates, *event)}, whole numbers from 0 to L, and "log_likelihood": (S,), the ranks of
            log p(x|z*); −1 where a latent is masked. A whole data set (plate=None) has all plates among the inner ones.
        truths: z*, {site: (S, *inner plates, *event)}.
        means: of the draws, of the same shape; NaN where a latent is masked.
        sds: their standard deviations, of the same shape.
        num_draws: L.
        group: what they are called in ArviZ: "prior_sbc", or "posterior_sbc".
    """

    ranks: dict[str, Tensor]
    truths: dict[str, Tensor]
    means: dict[str, Tensor]
    sds: dict[str, Tensor]
    num_draws: int
    group: str = "prior_sbc"

    @property
    def num_simulations(self) -> int:
        """S."""
        return len(self.ranks[LIKELIHOOD])

    # -- uniform ranks ------------------------------------------------------------------------------------------------

    @cached_property
    def p_values(self) -> dict[str, Tensor]:
        """Of uniform ranks, {site: (*inner plates, *event)}, by their distribution function (`ecdf_bands`)."""
        return {name: uniform_p_values(ranks, self.num_draws) for name, ranks in self.ranks.items()}

    @property
    def p_value(self) -> float:
        """Of all of them together, by Bonferroni's inequality: the smallest, times how many there are, at most 1.

        It holds whatever the dependence between quantities, and below 0.05 says that at least one is not calibrated.
        """
        p = torch.cat([p.flatten() for p in self.p_values.values()])
        p = p[~p.isnan()]
        return min(1.0, len(p) * p.min().item())

    def ecdf_bands(self, probability: float = 0.95) -> tuple[Tensor, Tensor]:
        """The lowest and the highest share of ranks below 1..L inside of simultaneous bands, each (L,)."""
        return ecdf_bands(self.num_simulations, self.num_draws, probability)

    @property
    def ecdf(self) -> dict[str, Tensor]:
        """Shares of the ranks below i = 1..L, {site: (L, *inner plates, *event)}; i/(L + 1) if calibrated."""
        return {name: _shares(ranks, self.num_draws) for name, ranks in self.ranks.items()}

    @property
    def pit(self) -> dict[str, Tensor]:
        """Ranks as numbers in (0, 1), (rank + u)/(L + 1) with u from U(0, 1), the same at each call; NaN if masked."""
        generator = torch.Generator().manual_seed(0)
        pit = {}
        for name, ranks in self.ranks.items():
            noise = torch.rand(ranks.shape, generator=generator, dtype=torch.double)
            pit[name] = ((ranks.cpu() + noise) / (self.num_draws + 1)).where(ranks.cpu() >= 0, torch.nan)
        return pit

    # -- moments ------------------------------------------------------------------------------------------------------

    @property
    def z_scores(self) -> dict[str, Tensor]:
        """(E_q z − z*) / sd_q, {site: (S, *inner plates, *event)}: of mean 0, and for Gaussian posteriors of sd 1.

        Source: Schad, Betancourt & Vasishth (2021), *Toward a principled Bayesian workflow in cognitive science*.
        """
        return {name: (mean - self.truths[name]) / self.sds[name] for name, mean in self.means.items()}

    @property
    def contraction(self) -> dict[str, Tensor]:
        """1 − Var_q/Var_p, {site: (S, *inner plates, *event)}: 0 where data say nothing, towards 1 if they say all.

        Var_p is the variance of z* over all simulations, whatever other arguments and latents the prior depends on.
        Source: as of `z_scores`.
        """
        found = {}
        for name, sd in self.sds.items():
            truth = self.truths[name].double().where(~sd.isnan(), torch.nan)
            found[name] = 1 - sd.square() / (truth - truth.nanmean(0)).square().nanmean(0)
        return found

    # -- to look at ---------------------------------------------------------------------------------------------------

    def plot(self, ax: Axes | None = None, *, probability: float = 0.95, names: list[str] | None = None) -> Axes:
        """Draws the difference of each distribution function of ranks from the uniform one, and the band.

        Args:
            ax: where to draw; default: a new figure.
            probability: of the band.
            names: of the sites; default: all.

        Returns:
            The axes.
        """
        return plot_ranks({n: self.ecdf[n] for n in names or self.ranks}, self.ecdf_bands(probability), ax)

    def to_arviz(self) -> Any:
        """`pit` as the group `group`, of one chain: for `az.plot_ecdf_pit(tree, group="prior_sbc")` of ArviZ 1.x.

        Returns:
            `xarray.DataTree` on ArviZ 1.x, `arviz.InferenceData` on 0.2x.
        """
        import arviz
        import xarray as xr

        variables = {}
        for name, value in self.pit.items():
            dims = [f"{name}_dim_{i}" for i in range(value.dim() - 1)]
            variables[name] = (["chain", "draw", *dims], value.numpy()[None])
        coords = {"chain": [0], "draw": range(self.num_simulations)}
        dataset = xr.Dataset(variables, coords, {"sample_dims": ["chain", "draw"]})
        if arviz.__version__.startswith("0."):
            return arviz.InferenceData(**{self.group: dataset})
        return xr.DataTree.from_dict({self.group: dataset})

    def __repr__(self) -> str:
        rows = sorted(_rows(self), key=lambda row: row[1])
        threshold = LEVEL / max(1, len(rows))
        doubtful = sum(p < threshold for _, p, _ in rows)
        width = max(len("quantity"), *(len(name) for name, *_ in rows[:MOST_ROWS]))
        lines = [
            f"Calibration over {self.num_simulations} simulations with {self.num_draws} draws each: "
            f"{doubtful} of {len(rows)} quantities in doubt (p < {threshold:.2g}, which is {LEVEL} for all together)",
            f"  {'quantity':{width}}  p-value  what the draws are",
        ]
        lines += [
            f"  {n:{width}}  {p:7.2g}  {what if p < threshold else ''}".rstrip() for n, p, what in rows[:MOST_ROWS]
        ]
        return "\n".join([*lines, *["  …"] * (len(rows) > MOST_ROWS)])


def _rows(calibration: Calibration) -> list[tuple[str, float, str]]:
    """Name, p-value and direction of each quantity."""
    rows = []
    for name, p in calibration.p_values.items():
        ranks = calibration.ranks[name].reshape(calibration.num_simulations, -1).T.cpu()
        for i, (value, column) in enumerate(zip(p.flatten().tolist(), ranks, strict=True)):
            if (column >= 0).any():
                index = [int(j) for j in torch.unravel_index(torch.tensor(i), p.shape)] if p.dim() else []
                title = name + (str(index) if index else "")
                rows.append((title, value, _direction(name, column[column >= 0].double(), calibration.num_draws)))
    return rows


def _direction(name: str, ranks: Tensor, num_draws: int) -> str:
    """What is most remarkable of ranks, in standard errors under uniformity: their mean, or their spread."""
    size, bins = len(ranks), num_draws + 1
    expected = torch.arange(bins, dtype=torch.double) - num_draws / 2
    square = expected.square()
    off = ranks - num_draws / 2
    shift = off.mean() / (square.mean() / size).sqrt()
    spread = (off.square().mean() - square.mean()) / (square.var(correction=0) / size).sqrt().clamp(min=1e-9)
    if max(abs(shift), abs(spread)) < 2:
        return "of another shape"
    if abs(spread) > abs(shift):
        return f"too {'narrow' if spread > 0 else 'wide'} ({abs(spread):.1f} standard errors)"
    low, high = ("worse", "better") if name == LIKELIHOOD else ("too low", "too high")
    what = "explain x {} than z*" if name == LIKELIHOOD else "{}"
    return f"{what.format(low if shift > 0 else high)} ({abs(shift):.1f} standard errors)"


def _shares(ranks: Tensor, num_draws: int) -> Tensor:
    known = (ranks >= 0).sum(0).clamp(min=1)
    return torch.stack([((ranks < i) & (ranks >= 0)).sum(0) / known for i in range(1, num_draws + 1)])
