"""Batches of simulated data sets, each of whose rows is a draw of (z*, x) from the model.

One sampler serves all of them: the simulated arguments stand in for those that it was made with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.pairs.simulated import with_simulated
from pyro_vae.pairs.sites import sample_sites, site_mask
from pyro_vae.particles.sampler import ParticleSampler
from pyro_vae.particles.simulation import look_at_observed
from pyro_vae.progress import progress_bar

__all__ = ["Batch", "Draws", "Simulator"]

Arguments = tuple[tuple, dict[str, Any]]
Draws = dict[str, Tensor]  # {site: (L, n, *inner plates, *event)}


@dataclass(frozen=True)
class Batch:
    """n simulations.

    Attributes:
        index: rows of the arguments that their contexts are from, (n,); None where all rows pass together.
        rows: what `ParticleSampler` is to be asked for.
        arguments: simulated.
        latents: z*, {site: (1, n, *inner plates, *event)}.
        masks: where a latent exists, of the shape of its values; only of sites that are masked somewhere.
        sites: of the run of the model that they come from.
    """

    index: Tensor | None
    rows: slice | None
    arguments: Arguments
    latents: Draws
    masks: Draws
    sites: dict[str, dict]


class Simulator:
    """Simulates data sets of a pair.

    Args:
        sampler: of the pair.
        what: asks for it, for errors.

    Raises:
        ValueError: as `simulate`, by the first simulation; data points in a loop.
    """

    def __init__(self, sampler: ParticleSampler, what: str) -> None:
        self.sampler = sampler
        self._keys: dict[str, list[int | str]] | None = None
        sampler.layout.check_vectorized(what)
        _ = sampler.cells  # measured on the pair's own arguments, before others stand in

    def batches(self, num_simulations: int, together: int, progress: bool) -> Iterator[tuple[Batch, int]]:
        """Batches, and how many simulations of each to use, so that they sum to `num_simulations`.

        Inside, the sampler runs on the simulated arguments. Rows, with what else they have, are taken in a random
        order, again and again.

        Args:
            num_simulations: S.
            together: particles of each row that pass at once, for the sake of memory.
            progress: show a progress bar.
        """
        left, rows = num_simulations, self.sampler.rows
        chunk = self.sampler.chunks(together)[0][0]
        size = chunk.stop - chunk.start if rows.separable else rows.num_points
        with progress_bar(num_simulations, "simulations", progress) as bar:
            while left:
                order = torch.randperm(rows.num_points).split(size) if rows.separable else [None]
                for index in order:
                    batch = self.draw(None if index is None else index[:left])
                    count = min(left, size if index is None else len(index))
                    with rows.using(*batch.arguments):
                        yield batch, count
                    bar.update(count)
                    left -= count
                    if not left:
                        break

    def draw(self, index: Tensor | None, values: Mapping[str, Tensor] | None = None) -> Batch:
        """z* ~ p(z), or the given values of it as traces have them, and x ~ p(x|z*) in the place of the data."""
        sampler, (rows, arguments) = self.sampler, self.cut(index)
        if self._keys is None:
            with sampler.rows.using(*arguments):
                self._keys = look_at_observed(sampler, *arguments, rows)[0]
        with sampler.rows.using(*arguments):
            drawn = sample_sites(sampler.run(poutine.uncondition(sampler.model), 1, rows, values=values))
        new = with_simulated(*arguments, self._keys, drawn)
        sites = {name: drawn[name] for name in drawn if name in sampler.pair.latents}
        latents = {name: sampler.layout.align(site, rows) for name, site in sites.items()}
        masks = {name: _mask(sampler, site, rows) for name, site in sites.items()}
        return Batch(index, rows, new, latents, {n: m for n, m in masks.items() if m is not None}, drawn)

    def cut(self, index: Tensor | None) -> tuple[slice | None, Arguments]:
        """The arguments at some rows."""
        rows = self.sampler.rows
        if index is None:
            return None, (rows.args, rows.kwargs)
        args = tuple(a[index] if i in rows.cut_keys else a for i, a in enumerate(rows.args))
        return slice(0, len(index)), (args, {n: a[index] if n in rows.cut_keys else a for n, a in rows.kwargs.items()})


def _mask(sampler: ParticleSampler, site: dict, rows: slice | None) -> Tensor | None:
    mask = site_mask(site)
    if mask is None or mask.all():
        return None
    event = (1,) * len(site["fn"].event_shape)
    whole = mask.reshape(mask.shape + event).expand(site["value"].shape)
    return sampler.layout.align({**site, "value": whole}, rows)
