r"""Particles: K weighted draws for each of N data points, from any (model, guide) pair with a data plate.

For latents z_nk ~ q(z_n|x_n), independent given the parameters,

    log w_nk = log p(z_nk) + log p(x_n|z_nk) − log q(z_nk|x_n).

The ELBO is a mean of log-weights, the importance-weighted bound and the evidence their log-mean-exp, k-hat and the
effective sample size functions of them. This file draws them and knows traces and plates, nothing of VAEs:

- model and guide run once on two rows to learn their plates and sites; that run moves no random state;
- then both run under one outer plate of particles, the model replayed against the guide, for chunks of rows and of
  particles, so that memory is bounded whatever K and N are;
- log-probabilities carry the sites' masks but not their scales: subsampling and `poutine.scale` multiply an objective,
  they are no part of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.checks import check_rows, check_support

__all__ = ["ParticleSampler", "Particles", "draw_particles", "evaluation_mode", "sample_sites", "site_log_prob"]

CHUNK_BYTES = 24 * 2**20  # of tensors made per pass: what the caches of a CPU hold, more or less
PARTICLE_PLATE = "num_particles_vectorized"  # as Pyro's own vectorized ELBOs call it


@dataclass(frozen=True)
class Particles:
    """K weighted draws for each of N data points.

    Attributes:
        latents: {site: (K, N, *inner plates, *event)}.
        log_prior: log p(z), (K, N), nats.
        log_likelihood: log p(x|z), (K, N), nats.
        log_posterior: log q(z|x), (K, N), nats.
    """

    latents: dict[str, Tensor]
    log_prior: Tensor
    log_likelihood: Tensor
    log_posterior: Tensor

    @property
    def log_weight(self) -> Tensor:
        """log p(z) + log p(x|z) − log q(z|x), (K, N), nats; E exp(log_weight) = p(x)."""
        return self.log_prior + self.log_likelihood - self.log_posterior


def draw_particles(
    model: Callable, guide: Callable, *args: Any, num_particles: int, plate: str = "data", **kwargs: Any
) -> Particles:
    """Draws K weighted particles for each data point of a (model, guide) pair.

    Modules run in evaluation mode; gradients flow unless `torch.no_grad()` says otherwise. All K × N particles are
    held at once: for summaries of many, `importance_sampling` streams.

    Args:
        model: a Pyro model, with the data points in a plate called `plate`, at any depth.
        guide: its guide, with the same latent sites. Its observed sites are auxiliary and left out of q.
        *args: what both are called with.
        num_particles: K ≥ 1.
        plate: name of the plate of data points.
        **kwargs: what both are called with.

    Returns:
        `Particles` with log-probabilities of shape (K, N) in nats, unscaled.

    Raises:
        ValueError: no such plate, a site outside it, model and guide with different latents, num_particles < 1,
            rows that are not finite or outside the support of their likelihood.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the exact posterior: every weight is p(x)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> draw_particles(model, guide, torch.tensor([0.0, 2.0]), num_particles=3).log_weight[0]
        tensor([-1.2655, -2.2655])
    """
    sampler = ParticleSampler(model, guide, args, kwargs, plate=plate)
    with evaluation_mode():
        return sampler.draw(check_num_particles(num_particles))


@contextmanager
def evaluation_mode() -> Iterator[None]:
    """Runs every `nn.Module` called inside in evaluation mode (dropout off, batch norm frozen), and restores each.

    It needs no list of modules: it sees them as they are called, wherever a model or guide keeps them.
    """
    changed: list[nn.Module] = []

    def switch(module: nn.Module, _: Any) -> None:
        if module.training:
            module.training = False
            changed.append(module)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(switch)
    try:
        yield
    finally:
        handle.remove()
        for module in changed:
            module.training = True


class ParticleSampler:
    """A (model, guide) pair with its arguments, looked at once, to draw particles from again and again.

    Attributes:
        num_points: N, the size of the data plate (of the whole data set, if the plate subsamples it).
        guide_trace, model_trace: of the first look, on as few rows as possible.
    """

    def __init__(
        self, model: Callable, guide: Callable, args: tuple = (), kwargs: dict | None = None, *, plate: str = "data"
    ) -> None:
        self.model, self.guide, self.plate = model, guide, plate
        self.args, self.kwargs = args, kwargs or {}
        self._length: int | None = None  # leading size of the arguments that are cut into rows, if they can be
        self._fixed: int | None = None  # rows of every pass, where the plate subsamples data that it holds itself
        self._look()
        dims = [f.dim for f in _frames(self.guide_trace, self.model_trace) if f.dim is not None]
        self.max_plate_nesting = -min(dims, default=0)
        self._dim = self._data_dim()
        self._check_sites()

    # -- the first look ----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Finds the plate and how to run on some of the rows: by cutting arguments, or by choosing its subsample."""
        tensors = [a for a in (*self.args, *self.kwargs.values()) if isinstance(a, Tensor) and a.dim()]
        for self._length in dict.fromkeys(len(a) for a in tensors if len(a) > 3):
            try:
                frames = [self._probe(rows) for rows in (3, 2)]
            except Exception:  # not this argument; if the pair itself is at fault, the run on all rows says so
                continue
            if [f and f.size for f in frames] == [3, 2]:
                self.num_points = self._length
                return
        self._length = None
        frame = self._probe(None)
        if frame is None:
            plates = {f.name: f.size for f in _frames(self.guide_trace, self.model_trace)}
            found = ", ".join(f"{name!r} ({size})" for name, size in plates.items())
            raise ValueError(
                f"no plate {self.plate!r} in model and guide (their plates: {found or 'none'}); the evidence of each "
                "data point needs one around all that belongs to a point. "
                + (
                    "Try plate=… with one of these names."
                    if found
                    else f"Try: with pyro.plate({self.plate!r}, len(x)):"
                )
            )
        self.num_points = frame.size
        lengths = {len(a) for a in tensors}
        if frame.size < frame.full_size and not (frame.size in lengths and frame.full_size not in lengths):
            self._fixed, self.num_points = frame.size, frame.full_size

    def _probe(self, rows: int | None) -> Any:
        """Traces guide and model on the first `rows`; returns the frame of the data plate."""
        args, kwargs = self._cut(None if rows is None else slice(0, rows))
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
        return next((f for f in _frames(self.guide_trace, self.model_trace) if f.name == self.plate), None)

    def _data_dim(self) -> int:
        dims = [
            {f.dim for f in _frames(trace) if f.name == self.plate} for trace in (self.guide_trace, self.model_trace)
        ]
        if dims[0] != dims[1] or len(dims[0]) != 1 or None in dims[0]:
            guide, model = (", ".join(sorted(map(str, d))) or "none" for d in dims)
            raise ValueError(
                f"plate {self.plate!r}: expected it in model and guide, vectorized, at one dim; got dim {model} in the "
                f"model and {guide} in the guide. Try pyro.plate(…, dim=-1), the same everywhere."
            )
        return dims[0].pop()

    def _check_sites(self) -> None:
        latents = {}
        for where, trace in (("guide", self.guide_trace), ("model", self.model_trace)):
            latents[where] = {name for name, site in sample_sites(trace).items() if not site["is_observed"]}
            for name, site in sample_sites(trace).items():
                plates = [f.name for f in site["cond_indep_stack"]]
                if self.plate not in plates:
                    raise ValueError(
                        f"site {name!r} of the {where} is outside plate {self.plate!r} (its plates: "
                        f"{', '.join(map(repr, plates)) or 'none'}); the weight of a data point needs every site inside"
                        " it. Try to move the site in, to fix its value with poutine.condition, or a pyro.param for it."
                    )
        auxiliary = {n for n in latents["guide"] if self.guide_trace.nodes[n]["infer"].get("is_auxiliary")}
        missing, extra = latents["model"] - latents["guide"], latents["guide"] - latents["model"] - auxiliary
        if missing or extra:
            raise ValueError(
                f"model and guide have different latent sites: {sorted(missing) or 'none'} only in the model, "
                f"{sorted(extra) or 'none'} only in the guide. Expected each latent of the model in the guide, under "
                "the same name. Try pyro.render_model on both to see them."
            )

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _cut(self, rows: slice | None) -> tuple[tuple, dict]:
        if rows is None or self._length is None:
            return self.args, self.kwargs

        def cut(a: Any) -> Any:
            return a[rows] if isinstance(a, Tensor) and a.dim() and len(a) == self._length else a

        return tuple(map(cut, self.args)), {name: cut(a) for name, a in self.kwargs.items()}

    def chunks(self, num_particles: int, chunk_size: int | None = None) -> tuple[list[slice], list[int]]:
        """Slices of rows, and counts of particles that sum to `num_particles`, for passes in bounded memory.

        Args:
            num_particles: K.
            chunk_size: particles × rows of one pass, at most, where rows can be told apart at all; default: as many
                as make 24 MiB of tensors.
        """
        cells = max(1, self._cells() if chunk_size is None else chunk_size)
        rows = self._fixed or self.num_points
        if self._length is not None:
            rows = min(rows, max(1, cells // num_particles))
        at_once = max(1, min(num_particles, cells // rows))
        whole, rest = divmod(num_particles, at_once)
        slices = [slice(i, min(i + rows, self.num_points)) for i in range(0, self.num_points, rows)]
        return slices, [at_once] * whole + [rest] * (rest > 0)

    def _cells(self) -> int:
        num_particles, rows = (1, None) if self._length is None else (8, slice(0, 2))
        with torch.random.fork_rng(), torch.no_grad(), evaluation_mode(), _CountBytes() as counter:
            particles = self.draw(num_particles, rows, check=False)
        return CHUNK_BYTES * particles.log_prior.numel() // max(1, counter.total)

    # -- drawing ------------------------------------------------------------------------------------------------------

    def run(self, function: Callable, num_particles: int, rows: slice | None = None) -> poutine.Trace:
        """Traces `function` (the model, the guide or a handled version of them) under the particle plate."""
        args, kwargs = self._cut(rows)
        particles = pyro.plate(PARTICLE_PLATE, num_particles, dim=-1 - self.max_plate_nesting)
        subsample = nullcontext() if self._fixed is None else _Subsample(self.plate, self._indices(rows))
        with pyro.validation_enabled(False), poutine.block(hide_types=["sample"]), subsample:
            return poutine.trace(particles(function)).get_trace(*args, **kwargs)

    def _indices(self, rows: slice | None) -> Tensor:
        """A subsample of the fixed size that ends with `rows`, or starts the data."""
        stop = max(self._fixed, self.num_points if rows is None else rows.stop)
        return torch.arange(stop - self._fixed, stop)

    def draw(self, num_particles: int, rows: slice | None = None, *, check: bool = True) -> Particles:
        """K particles for each of `rows` (default: all). `check`: refuse data that are not finite or not in support."""
        if self._fixed and rows is None:
            return _concatenate([self.draw(num_particles, r, check=check) for r in self.chunks(num_particles, 1)[0]])
        return self.weigh(*self.traces(num_particles, rows, check=check), rows)

    def traces(
        self, num_particles: int, rows: slice | None = None, *, check: bool = True
    ) -> tuple[poutine.Trace, poutine.Trace]:
        """Traces of the guide, and of the model replayed against it; arguments as `draw`."""
        start = rows.start if rows else 0
        if check:
            check_rows(self._cut(rows), start=start)
        guide_trace = self.run(self.guide, num_particles, rows)
        model_trace = self.run(poutine.replay(self.model, guide_trace), num_particles, rows)
        if check:
            for name, site in sample_sites(model_trace).items():
                if site["is_observed"]:
                    check_support(name, site, start=start)
        return guide_trace, model_trace

    def weigh(self, guide_trace: poutine.Trace, model_trace: poutine.Trace, rows: slice | None = None) -> Particles:
        """The particles of two traces of `run`: log-probabilities with masks, without scales, summed to (K, N)."""
        guide, model = sample_sites(guide_trace).items(), sample_sites(model_trace).items()
        latents = {name: self.align(site, rows) for name, site in guide if not site["is_observed"]}
        posterior = [self._log_prob(name, site, rows) for name, site in guide if not site["is_observed"]]
        prior = [self._log_prob(name, site, rows) for name, site in model if not site["is_observed"]]
        likelihood = [self._log_prob(name, site, rows) for name, site in model if site["is_observed"]]
        terms = [*prior, *likelihood, *posterior]
        shape = torch.broadcast_shapes(*(t.shape for t in terms))
        zero = terms[0].new_zeros(())
        return Particles(latents, *(sum(t, zero).expand(shape) for t in (prior, likelihood, posterior)))

    def align(self, site: dict, rows: slice | None = None, *, value: Tensor | None = None) -> Tensor:
        """A site's value as (K, N, *inner plates, *event); with `value`, its log-probability without the event."""
        event_dim = len(site["fn"].event_shape) if value is None else 0
        value = site["value"] if value is None else value
        width = 1 + self.max_plate_nesting
        value = value.reshape((1,) * (width + event_dim - value.dim()) + value.shape)
        data, inside = width + self._dim, {width + f.dim for f in site["cond_indep_stack"]}
        inner = [a for a in range(1, width) if a in inside and a != data]
        unused = [a for a in range(1, width) if a not in inside]  # of size one
        value = value.permute(0, data, *inner, *range(width, value.dim()), *unused)
        return self._wanted(value.flatten(value.dim() - len(unused) - 1) if unused else value, rows)

    def plates(self, site: dict) -> list[str]:
        """Names of the dimensions of an aligned site, [data plate, *inner plates]."""
        names = {f.dim: f.name for f in site["cond_indep_stack"] if f.name not in (self.plate, PARTICLE_PLATE)}
        return [self.plate, *(names[dim] for dim in sorted(names))]

    def _log_prob(self, name: str, site: dict, rows: slice | None) -> Tensor:
        value = site_log_prob(site)
        width = 1 + self.max_plate_nesting
        if value.dim() > width:
            raise ValueError(
                f"site {name!r}: log-probability of shape {tuple(value.shape)}, expected at most {width} dimensions "
                "(particles and plates). Try .to_event(…) for the dimensions that belong to one value."
            )
        value = value.reshape((1,) * (width - value.dim()) + value.shape)
        others = [a for a in range(1, width) if a != width + self._dim]
        return self._wanted(value.sum(others) if others else value, rows)  # (K, N)

    def _wanted(self, value: Tensor, rows: slice | None) -> Tensor:
        return value if self._fixed is None or rows is None else value[:, -(rows.stop - rows.start) :]


def site_log_prob(site: dict) -> Tensor:
    """log p of a trace's site with its mask, without its scale, over batch dimensions."""
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(value, mask=site["mask"])


def sample_sites(trace: poutine.Trace) -> dict[str, dict]:
    """The sites that carry probability: not plates' subsamples, not `pyro.deterministic`."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not site["infer"].get("_deterministic")
    }


def check_num_particles(num_particles: int, name: str = "num_particles") -> int:
    if not num_particles >= 1:
        raise ValueError(f"{name}: expected at least 1, got {num_particles}.")
    return int(num_particles)


def _frames(*traces: poutine.Trace) -> list[Any]:
    return [f for trace in traces for _, site in sample_sites(trace).items() for f in site["cond_indep_stack"]]


def _concatenate(parts: list[Particles]) -> Particles:
    latents = {name: torch.cat([p.latents[name] for p in parts], 1) for name in parts[0].latents}
    rest = ("log_prior", "log_likelihood", "log_posterior")
    return Particles(latents, *(torch.cat([getattr(p, field) for p in parts], 1) for field in rest))


class _Subsample(Messenger):
    """Sets the indices that a plate draws."""

    def __init__(self, plate: str, indices: Tensor) -> None:
        super().__init__()
        self.plate, self.indices = plate, indices

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] == self.plate and site_is_subsample(msg):
            msg["value"] = self.indices.to(msg["fn"].device)


class _CountBytes(TorchDispatchMode):
    """Counts the bytes of new storage that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self._seen = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and not any(t is a or _same_storage(t, a) for a in args if isinstance(a, Tensor)):
                self.total += t.untyped_storage().nbytes()
        return out


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
