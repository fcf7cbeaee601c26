"""Where a (model, guide) pair keeps its data points: plates, dimensions, rows of its arguments, found by one look.

The pair runs once, on as few rows as possible; that run moves no random state and no module's. What it learns says how
to run on some of the rows, and how a site's tensors become (K particles, N data points, *inner plates, *event).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.sites import plate_frames, sample_sites
from pyro_vae.pairs.vectorized import PARTICLE_PLATE

__all__ = ["Layout"]


class Layout:
    """The plates and sites of a (model, guide) pair; `plate=None` takes all its data as one point, N = 1.

    Attributes:
        num_points: N, the size of the data plate (of the whole data set, if the plate subsamples it).
        length: leading size of the arguments that are cut into rows; None where rows cannot be told apart.
        fixed: rows of every pass, where the plate subsamples data that it holds itself.
        max_plate_nesting: dimensions that the pair's own plates take.
        guide_trace, model_trace: of the look.
        latents: latent sites of the model.
        summed: latent sites of the model alone, marked for enumeration: they are summed out.
        enumerated: latent sites of the guide that are marked for enumeration.
    """

    def __init__(self, model: Callable, guide: Callable, args: tuple, kwargs: dict, plate: str | None) -> None:
        for role, function in (("model", model), ("guide", guide)):
            if not callable(function) or isinstance(function, Tensor):
                raise TypeError(
                    f"{role}: expected a function, got {type(function).__name__}. Try tool(model, guide, x), with "
                    "vae.model and vae.guide of a VAE."
                )
        self.model, self.guide, self.args, self.kwargs, self.plate = model, guide, args, kwargs, plate
        self.length: int | None = None
        self.fixed: int | None = None
        self.num_points = 1
        self._standing_in: tuple[tuple, dict] | None = None
        if plate is None:
            self._look(None)
        else:
            self._find_rows()
        frames = plate_frames(self.guide_trace, self.model_trace)
        self.max_plate_nesting = -min((f.dim for f in frames if f.dim is not None), default=0)
        self.dim = None if plate is None else self._data_dim()
        self._check_sites(frames)

    # -- the look -----------------------------------------------------------------------------------------------------

    def _find_rows(self) -> None:
        """Finds the plate and how to run on some of the rows: by cutting arguments, or by choosing its subsample."""
        if getattr(self.guide, "prototype_trace", self) is None:  # an autoguide, which sets its sizes at its first run
            self._look(None)
        tensors = [a for a in (*self.args, *self.kwargs.values()) if isinstance(a, Tensor) and a.dim()]
        for self.length in dict.fromkeys(len(a) for a in tensors if len(a) > 3):
            try:
                sizes = [self._size(self._look(rows)) for rows in (3, 2)]
            except Exception:  # not this argument; if the pair itself is at fault, the run on all rows says so
                continue
            if sizes == [3, 2]:
                self.num_points = self.length
                return
        self.length = None
        frame = self._look(None)
        if frame is None:
            plates = {f.name: f.size for f in plate_frames(self.guide_trace, self.model_trace)}
            found = ", ".join(f"{name!r} ({size})" for name, size in plates.items())
            advice = "plate=… with one of these names" if found else f"with pyro.plate({self.plate!r}, len(x))"
            raise ValueError(
                f"no plate {self.plate!r} in model and guide (their plates: {found or 'none'}); the evidence of each "
                f"data point needs one around all that belongs to a point. Try {advice}, or plate=None for the joint "
                "evidence of all data."
            )
        self.num_points = self._size(frame)
        lengths = {len(a) for a in tensors}
        if frame.size < frame.full_size and not (frame.size in lengths and frame.full_size not in lengths):
            self.fixed, self.num_points = frame.size, frame.full_size

    def _look(self, rows: int | None) -> Any:
        """Traces guide and model on the first `rows`; returns the frame of the data plate."""
        args, kwargs = self.cut(None if rows is None else slice(0, rows))
        devices = {a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_cuda}
        with (
            torch.random.fork_rng(devices=list(devices)),
            torch.no_grad(),
            evaluation_mode(),
            poutine.block(),
            pyro.validation_enabled(False),
        ):
            self.guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
            self.model_trace = poutine.trace(poutine.replay(self.model, self.guide_trace)).get_trace(*args, **kwargs)
        return next((f for f in plate_frames(self.guide_trace, self.model_trace) if f.name == self.plate), None)

    def _size(self, frame: Any) -> int | None:
        """Size of a plate; one that was declared without a size has that of its sites."""
        if frame is None or frame.size > 0:
            return frame and frame.size
        sites = [site for t in (self.guide_trace, self.model_trace) for site in sample_sites(t).values()]
        shapes = [site["fn"].batch_shape for site in sites if frame in site["cond_indep_stack"]]
        return max((shape[frame.dim] for shape in shapes if len(shape) >= -frame.dim), default=1)

    def _data_dim(self) -> int:
        dims = [
            {f.dim for f in plate_frames(trace) if f.name == self.plate}
            for trace in (self.guide_trace, self.model_trace)
        ]
        if not sample_sites(self.guide_trace):
            dims[0] = dims[1]  # all latents are summed out, and nothing is left for a guide
        if dims[0] != dims[1] or len(dims[0]) != 1 or None in dims[0]:
            guide, model = (", ".join(sorted(map(str, d))) or "none" for d in dims)
            raise ValueError(
                f"plate {self.plate!r}: expected it in model and guide, vectorized, at one dim; got dim {model} in the "
                f"model and {guide} in the guide. Try pyro.plate(…, dim=-1), the same everywhere, or plate=None for "
                "the joint evidence where the latents are outside of it."
            )
        return dims[0].pop()

    def check_density(self) -> None:
        """Raises ValueError where a draw of the guide has no density: weights would be meaningless, and look fine."""
        sites = {n: s for n, s in sample_sites(self.guide_trace).items() if not s["is_observed"]}
        if sites.keys() - self.latents:
            return  # drawn through auxiliary sites, whose density stands in
        for name, site in sites.items():
            base = site["fn"]
            while hasattr(base, "base_dist"):
                base = base.base_dist
            if isinstance(base, dist.Delta) and not base.log_density.any():
                raise ValueError(
                    f"site {name!r} of the guide is a point (Delta), which has no density to weigh its draws by. Try a "
                    "guide that is a distribution, such as pyro.infer.autoguide.AutoNormal."
                )

    def _check_sites(self, frames: list[Any]) -> None:
        latents = {}
        for where, trace in (("guide", self.guide_trace), ("model", self.model_trace)):
            latents[where] = {name for name, site in sample_sites(trace).items() if not site["is_observed"]}
            for name, site in sample_sites(trace).items():
                plates = [f.name for f in site["cond_indep_stack"]]
                if self.plate is not None and self.plate not in plates:
                    raise ValueError(
                        f"site {name!r} of the {where} is outside plate {self.plate!r} (its plates: "
                        f"{', '.join(map(repr, plates)) or 'none'}); the weight of a data point needs every site inside"
                        " it. Try to move the site in, to fix its value with poutine.condition, or plate=None for the "
                        "joint evidence of all data."
                    )
        if self.plate is None:
            for f in frames:
                if f.full_size is not None and f.size < f.full_size:
                    raise ValueError(
                        f"plate {f.name!r} has {f.size} of {f.full_size} data points; the joint evidence (plate=None) "
                        "needs all of them. Try to call model and guide on all data, without subsample_size."
                    )
        model, guide = (
            {name for name in latents[where] if enumerates(trace.nodes[name])}
            for where, trace in (("model", self.model_trace), ("guide", self.guide_trace))
        )
        self.latents = latents["model"]
        self.summed, self.enumerated = model - latents["guide"], guide & latents["model"]
        auxiliary = {n for n in latents["guide"] if self.guide_trace.nodes[n]["infer"].get("is_auxiliary")}
        missing = latents["model"] - latents["guide"] - self.summed
        extra = latents["guide"] - latents["model"] - auxiliary
        if missing or extra:
            raise ValueError(
                f"model and guide have different latent sites: {sorted(missing) or 'none'} only in the model, "
                f"{sorted(extra) or 'none'} only in the guide. Expected each latent of the model in the guide, under "
                "the same name, or marked by pyro.infer.config_enumerate(model) to be summed out. Try "
                "pyro.render_model on both to see them."
            )

    # -- rows ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, args: tuple, kwargs: dict) -> Iterator[None]:
        """Stands these in for the arguments, cut to whatever rows."""
        self._standing_in = args, kwargs
        try:
            yield
        finally:
            self._standing_in = None

    def cut(self, rows: slice | None) -> tuple[tuple, dict]:
        """The arguments for some rows (None: all)."""
        if self._standing_in is not None:
            return self._standing_in
        if rows is None or self.length is None:
            return self.args, self.kwargs

        def cut(a: Any) -> Any:
            return a[rows] if isinstance(a, Tensor) and a.dim() and len(a) == self.length else a

        return tuple(map(cut, self.args)), {name: cut(a) for name, a in self.kwargs.items()}

    def subsample(self, rows: slice | None) -> Tensor:
        """Indices for the plate, of the fixed size, that end with `rows` or start the data."""
        stop = max(self.fixed, self.num_points if rows is None else rows.stop)
        return torch.arange(stop - self.fixed, stop)

    def select(self, value: Tensor, rows: slice | None) -> Tensor:
        """Of (K, N', …) what belongs to `rows`: a plate of fixed size gives more than was asked for."""
        return value if self.fixed is None or rows is None else value[:, -(rows.stop - rows.start) :]

    # -- tensors ------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Of the model's values."""
        return next((site["value"].device for site in sample_sites(self.model_trace).values()), torch.device("cpu"))

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
        point = [] if self.dim is None else [self.width + self.dim]
        value = value.permute(0, *point, *inner, *range(self.width, value.dim()), *unused)  # `unused` have size one
        value = value.flatten(value.dim() - len(unused) - 1) if unused else value
        return self.select(value if point else value.unsqueeze(1), rows)

    def place(self, site: dict, value: Tensor) -> Tensor:
        """The inverse of `align`: (K, N, *inner plates, *event) as the value of a site under the particle plate."""
        inner, unused = self._axes(site)
        if self.dim is None:
            value = value.squeeze(1)
        axes = [0, *([] if self.dim is None else [self.width + self.dim]), *inner]
        value = value[(slice(None),) * len(axes) + (None,) * len(unused)]
        order = {axis: i for i, axis in enumerate([*axes, *unused])}
        return value.permute(*(order[a] for a in range(self.width)), *range(self.width, value.dim()))

    def plates(self, site: dict) -> list[str]:
        """Names of the dimensions of an aligned site, [data plate, *inner plates]."""
        names = {f.dim: f.name for f in site["cond_indep_stack"] if f.name not in (self.plate, PARTICLE_PLATE)}
        return [self.plate, *(names[dim] for dim in sorted(names))]

    def sum_to_points(self, name: str, value: Tensor, rows: slice | None) -> Tensor:
        """A site's log-probability, summed over all plates but the particles' and the data points', (K, N)."""
        if value.dim() > self.width:
            raise ValueError(
                f"site {name!r}: log-probability of shape {tuple(value.shape)}, expected at most {self.width} "
                "dimensions (particles and plates). Try .to_event(…) for the dimensions that belong to one value."
            )
        value = value.reshape((1,) * (self.width - value.dim()) + value.shape)
        others = [a for a in range(1, self.width) if self.dim is None or a != self.width + self.dim]
        value = value.sum(others) if others else value
        return self.select(value if self.dim is not None else value.unsqueeze(1), rows)

    def _axes(self, site: dict) -> tuple[list[int], list[int]]:
        """Dimensions of a site's value: those of inner plates, and those of no plate of its."""
        inside = {self.width + f.dim for f in site["cond_indep_stack"] if f.dim is not None}
        axes = [a for a in range(1, self.width) if self.dim is None or a != self.width + self.dim]
        return [a for a in axes if a in inside], [a for a in axes if a not in inside]


def enumerates(site: dict) -> bool:
    """Whether a latent site is discrete and marked for enumeration, as by `pyro.infer.config_enumerate`."""
    return bool(site["infer"].get("enumerate")) and getattr(site["fn"], "has_enumerate_support", False)
