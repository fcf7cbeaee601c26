"""Layout: where the data points of a pair are among the dimensions of its tensors.

A site's tensors become (K particles, N data points, *inner plates, *event), whatever the dims of its plates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.pairs.look import Look
from pyro_vae.pairs.rows import Rows
from pyro_vae.pairs.sites import is_inside, plate_frames, sample_sites
from pyro_vae.pairs.vectorized import PARTICLE_PLATE

__all__ = ["Layout"]


class Layout:
    """The axes of a pair under the plate of particles.

    Args:
        look: at the pair.
        plate: name of the plate of data points; None takes all data as one point, N = 1.
        rows: of the pair.

    Attributes:
        max_plate_nesting: dimensions that the pair's own plates take.
        dim: of the data plate, negative; None where all data are one point, or the plate is sequential.
        sequential: whether the data plate is a Python loop, in which each site belongs to one data point.
        device: of the model's values.

    Raises:
        ValueError: the plate is missing from the model or the guide, not vectorized, or at different dims.
    """

    def __init__(self, look: Look, plate: str | None, rows: Rows) -> None:
        self.plate, self.rows = plate, rows
        dims = [frame.dim for frame in plate_frames(look.guide, look.model) if frame.dim is not None]
        if plate is None:  # dimensions that no plate has declared count as well: all is one point
            traces = look[:2]
            dims += [-len(s["fn"].batch_shape) for trace in traces for s in sample_sites(trace).values()]
        self.max_plate_nesting = -min(dims, default=0)
        self.dim = None if plate is None else _data_dim(look, plate)
        self.sequential = plate is not None and self.dim is None
        self._point = {  # of a sequential plate: the data point that a site belongs to
            name: frame.counter - 1
            for trace in look[:2]
            for name, site in sample_sites(trace).items()
            for frame in site["cond_indep_stack"]
            if frame.name == plate
        }
        values = (site["value"] for site in sample_sites(look.model).values())
        self.device = next((value.device for value in values), torch.device("cpu"))

    @property
    def width(self) -> int:
        """Batch dimensions under the particle plate."""
        return 1 + self.max_plate_nesting

    def align(self, site: dict, rows: slice | None = None, *, value: Tensor | None = None) -> Tensor:
        """A site's value as (K, N, *inner plates, *event); with `value`, its log-probability without the event."""
        event_dim = len(site["fn"].event_shape) if value is None else 0
        value = site["value"] if value is None else value
        value = value.reshape((1,) * (self.width + event_dim - value.dim()) + value.shape)
        inner, unused = self._axes(site)
        point = self._points(site)
        value = value.permute(0, *point, *inner, *range(self.width, value.dim()), *unused)  # `unused` have size one
        value = value.flatten(value.dim() - len(unused) - 1) if unused else value
        return self.rows.select(value if point else value.unsqueeze(1), rows)

    def place(self, site: dict, value: Tensor) -> Tensor:
        """The inverse of `align`: (K, N, *inner plates, *event) as the value of a site under the particle plate."""
        inner, unused = self._axes(site)
        point = self._points(site)
        if not point:
            value = value.squeeze(1)
        axes = [0, *point, *inner]
        value = value[(slice(None),) * len(axes) + (None,) * len(unused)]
        order = {axis: i for i, axis in enumerate([*axes, *unused])}
        return value.permute(*(order[a] for a in range(self.width)), *range(self.width, value.dim()))

    def plates(self, site: dict) -> list[str]:
        """Names of the dimensions of an aligned site, [data plate, *inner plates]."""
        names = {f.dim: f.name for f in site["cond_indep_stack"] if f.name not in (self.plate, PARTICLE_PLATE)}
        return [self.plate, *(names.get(axis - self.width) for axis in self._axes(site)[0])]

    def sum_to_points(self, name: str, value: Tensor, rows: slice | None) -> Tensor:
        """A site's log-probability, summed over all plates but the particles' and the data points', (K, N)."""
        if value.dim() > self.width:
            raise ValueError(
                f"site {name!r}: log-probability of shape {tuple(value.shape)}, expected at most {self.width} "
                "dimensions (particles and plates). Try .to_event(…) for the dimensions that belong to one value."
            )
        value = value.reshape((1,) * (self.width - value.dim()) + value.shape)
        if self.sequential:
            column = torch.arange(self.rows.num_points, device=value.device) == self._point[name]
            return torch.where(column, value.reshape(len(value), -1).sum(1, keepdim=True), 0)
        others = [a for a in range(1, self.width) if self.dim is None or a != self.width + self.dim]
        value = value.sum(others) if others else value
        return self.rows.select(value if self.dim is not None else value.unsqueeze(1), rows)

    def check_vectorized(self, what: str) -> None:
        """Raises ValueError where data points are no dimension of the sites' values, as `what` needs them to be."""
        if self.sequential:
            raise ValueError(
                f"{what}: plate {self.plate!r} is a Python loop, each of whose sites belongs to one data point; "
                "expected data points in a dimension. Try pyro.plate(…, dim=-1) in place of the loop, or "
                "draw_particles, importance_sampling and prior_sampling, which take loops."
            )

    def _points(self, site: dict) -> list[int]:
        """The dimension of data points of a site's value; [] outside of their plate, where another may have its dim."""
        return [self.width + self.dim] if self.dim is not None and is_inside(site, self.plate) else []

    def _axes(self, site: dict) -> tuple[list[int], list[int]]:
        """Dimensions of a site's value: those of inner plates, or that no plate has declared, and those of size one."""
        inside = {self.width + f.dim for f in site["cond_indep_stack"] if f.dim is not None}
        batch = site["value"].shape[: site["value"].dim() - len(site["fn"].event_shape)]
        inside |= {self.width - i for i, size in enumerate(reversed(batch), 1) if size > 1}
        axes = [a for a in range(1, self.width) if a not in self._points(site)]
        return [a for a in axes if a in inside], [a for a in axes if a not in inside]


def _data_dim(look: Look, plate: str) -> int | None:
    dims = [{f.dim for f in plate_frames(trace) if f.name == plate} for trace in (look.guide, look.model)]
    guide, model = (sample_sites(trace) for trace in look[:2])
    if not any(is_inside(site, plate) for name, site in guide.items() if name in model):
        dims[0] = dims[1]  # latents inside of the plate are summed out, or there are none
    if dims[0] != dims[1] or len(dims[0]) != 1:
        names = [", ".join(sorted(map(str, d))) or "none" for d in dims]
        raise ValueError(
            f"plate {plate!r}: expected it in model and guide, at one dim; got dim {names[1]} in the model and "
            f"{names[0]} in the guide. Try pyro.plate(…, dim=-1), the same everywhere, or plate=None for the joint "
            "evidence where the latents are outside of it."
        )
    return dims[0].pop()
