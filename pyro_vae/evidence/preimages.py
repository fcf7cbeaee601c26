r"""The density at a point of a guide over auxiliary variables v, of which its latents z = T(v) are images (Delta):

    log q(z|x) = log q(v|x) − log |dz/dv|   at v = T⁻¹(z).

The guide knows T and the log-determinant, which it gives as the log-density of the Delta, but not T⁻¹. Where the
coordinates of v are unconstrained coordinates of z, as Pyro's autoguides and most guides by hand have it, in any order
and in one site or many, T⁻¹ is that of the latents' supports. A few draws show whether it is so, and which is which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.pairs.handlers import StopAfter, unobserved
from pyro_vae.pairs.modes import fork_random_state
from pyro_vae.pairs.preimages import TOLERANCE, points_among
from pyro_vae.pairs.sites import is_inside, sample_sites
from pyro_vae.particles.latents import Coordinates
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["Preimages"]

COMPARED = 8, 4  # draws and rows that show which coordinate is which
BEYOND = ((1.0, 0.0), (-2.0, 0.5), (3.0, -1.0))  # factors and shifts of draws, at which T is compared too


class Preimages:
    """Where the auxiliary sites of a guide are, given its latents.

    Args:
        sampler: of the pair.
        rows: which data points; None for all.
        latents: the coordinates u of the model's latents.
        auxiliary: the coordinates v of the guide's auxiliary sites.
        index: which coordinates of u those of v are.
        points: names of the latents that are images.
    """

    def __init__(
        self,
        sampler: ParticleSampler,
        rows: slice | None,
        latents: Coordinates,
        auxiliary: Coordinates,
        index: Tensor,
        points: set[str],
    ) -> None:
        self.sampler, self.rows, self.latents, self.auxiliary = sampler, rows, latents, auxiliary
        self.index, self.points = index, points

    @classmethod
    def find(cls, sampler: ParticleSampler, rows: slice | None, latents: Coordinates) -> Preimages | None:
        """None where the auxiliary sites are something else than unconstrained coordinates of latents."""
        with fork_random_state(), torch.no_grad():
            guide_trace, model_trace = sampler.traces(COMPARED[0], rows, check=False)
            drawn = {n: s for n, s in sample_sites(guide_trace).items() if not s["is_observed"]}
            sites = {name: site for name, site in drawn.items() if name not in sampler.pair.latents}
            if not sites or not all(is_inside(site, sampler.layout.plate) for site in sites.values()):
                return None
            try:
                auxiliary = Coordinates(sites, sampler.layout, rows)
                v, u = auxiliary.join(guide_trace), latents.join(model_trace).nan_to_num()
            except ValueError:  # discrete, or on a sphere
                return None
            index = _matching(v, u)
            if index is None:
                return None
            points = points_among(drawn, sample_sites(model_trace))
            found = cls(sampler, rows, latents, auxiliary, index, points)
            return found if all(found._agree(a * u + b) for a, b in BEYOND) else None

    def run(self, latents: Mapping[str, Tensor], u: Tensor) -> Any:
        """A trace of the guide at latents u (K, N, D), which are `latents` as in traces of the model.

        Raises:
            ValueError: the guide has another point there.
        """
        trace = self._run(latents, u)
        name = self._other_point(trace, latents)
        if name is not None:
            raise ValueError(
                f"site {name!r} of the guide is a point (Delta) that is the image of its auxiliary sites under "
                "biject_to of its support at some values and not at others, so that its density at a point is not "
                "known. Try the same map for all values, or a guide that samples its latents."
            )
        return trace

    def _run(self, latents: Mapping[str, Tensor], u: Tensor) -> Any:
        return self.sampler.run(
            self.sampler.guide,
            len(u),
            self.rows,
            values={name: value for name, value in latents.items() if name not in self.points},
            unconstrained=self.auxiliary.split(u[..., self.index]),
            enumerate_sites=self.sampler.pair.enumerated,
        )

    def _other_point(self, guide_trace: Any, latents: Mapping[str, Tensor]) -> str | None:
        sites = sample_sites(guide_trace)
        for name in sorted(self.points):
            ours, theirs = torch.broadcast_tensors(sites[name]["value"], latents[name])
            if not torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
                return name
        return None

    def _agree(self, u: Tensor) -> bool:
        """Whether guide and model have the same latents at u."""
        names, sampler = self.latents.sites.keys(), self.sampler
        model = StopAfter(names)(unobserved(sampler.model))
        sites = sample_sites(sampler.run(model, len(u), self.rows, unconstrained=self.latents.split(u)))
        values = {name: sites[name]["value"] for name in names}
        return self.points <= values.keys() and self._other_point(self._run(values, u), values) is None


def _matching(v: Tensor, u: Tensor) -> Tensor | None:
    """For each coordinate of v (K, N, A) the one of u (K, N, D) with the same values, (A,); None where one has none.

    By the median difference: T⁻¹(T(v)) is far from v where T is flat, as in the tails of a sigmoid.
    """
    v, u = (t[:, : COMPARED[1]].flatten(0, 1).T.contiguous() for t in (v, u))
    found = []
    for values in v:
        distance = (u - values).abs().median(1).values
        closest = int(distance.argmin())
        if not distance[closest] <= TOLERANCE * (1 + values.abs().median()):
            return None
        found.append(closest)
    return torch.tensor(found, device=u.device) if len(set(found)) == len(found) else None
