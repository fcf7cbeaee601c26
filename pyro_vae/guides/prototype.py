"""`find_latents`: a model's latents, found by running it a few times and changing nothing.

Draws of the prior say where each coordinate lies and how wide it is; a guide measures u in these units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from math import ceil
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.guides.latents import Latent, Latents, coordinates_outside
from pyro_vae.pairs.checks import check_plate
from pyro_vae.pairs.handlers import StopAfter
from pyro_vae.pairs.look import Look, look
from pyro_vae.pairs.modes import fork_random_state
from pyro_vae.pairs.sites import base_distribution, enumerates, is_inside, plate_frames, sample_sites
from pyro_vae.pairs.supports import bijection, support_of

__all__ = ["find_latents"]

DRAWS = 100  # of each coordinate under the prior, to find its centre and spread
MOST_RUNS = 20  # of the model for that
LOOKS = 6  # at all of the model, of which one may take another branch
MOST_DRAWS = 10_000
MOST_VALUES = 4  # of discrete latents at which supports are compared
SPREADS = 1e-4, 1e4


def nothing(*args: Any, **kwargs: Any) -> None:
    """A guide without sites."""


def find_latents(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    plate: str,
    guide: str,
    *,
    outside: bool,
    given: tuple[str, ...] = (),
) -> Latents:
    """Runs the model and describes its latents; changes nothing.

    Args:
        model: a Pyro model.
        args: what it is called with.
        kwargs: what it is called with.
        plate: name of the plate of data points.
        guide: name of the guide, for messages.
        outside: whether the guide draws the latents outside of the plate.
        given: names of those of them that q is conditioned on.

    Raises:
        ValueError: no such plate, or a Python loop; no latent in it; a discrete latent that is not marked for
            enumeration; a support without a bijection, or that depends on a latent which the guide does not draw;
            latents that come and go; a mask under reinterpreted dimensions.
    """
    with fork_random_state():
        run = _Run(model, args, kwargs, guide)
        first, *others = looks = [run() for _ in range(LOOKS)]
        check_plate(first, plate)
        sites = _latent_sites(first)
        _check_same(sites, [_latent_sites(other) for other in others], guide)
        _check_indices(looks, plate, guide)
        left_out = tuple(name for name, site in sites.items() if enumerates(site))
        continuous = {name: site for name, site in sites.items() if name not in left_out}
        _check_continuous(continuous, guide)
        inside = _inside(continuous, first, plate, guide)
        own = [latent.name for latent in inside]
        around = tuple(name for name, site in continuous.items() if not is_inside(site, plate))
        _check_supports(run, sites, own, [*own, *around] if outside else own, guide)
        _check_given(given, around, plate, guide)
        draws = [_latent_sites(found) for found in looks]
        rows = inside[0].to_rows(_unconstrained(inside[0], draws[0])).shape[0]
        more = MOST_RUNS if given else min(MOST_RUNS, ceil(DRAWS / max(1, rows)))
        draws += [_latent_sites(run(stop=[*own, *around])) for _ in range(more - len(draws))]
    return Latents(
        tuple(inside),
        around,
        left_out,
        *_units([torch.cat([z.to_rows(_unconstrained(z, d)) for z in inside], -1) for d in draws]),
        *_units([_of_given(given, d, inside[0].nesting) for d in draws]),
    )


class _Run:
    """Runs of the model, each with draws of its own."""

    def __init__(self, model: Callable, args: tuple, kwargs: Mapping[str, Any], guide: str) -> None:
        self.model, self.args, self.kwargs, self.guide = model, args, kwargs, guide

    def __call__(self, *, stop: list[str] | None = None, values: Mapping[str, Tensor] | None = None) -> Look:
        model = self.model if stop is None else _stopped(self.model, stop)
        torch.manual_seed(int(torch.randint(2**31, ())))  # a look puts the states of generators back
        try:
            return look(model, nothing, self.args, self.kwargs, values=values)
        except NotImplementedError as error:  # such as an ImproperUniform
            reason = str(error).split("\n")[0].strip(" .") or "one of its distributions has no sampler"
            raise ValueError(
                f"{self.guide}: the model cannot be drawn from: {reason}. Expected priors with draws, which say where "
                "latents lie. Try proper priors, or one of Pyro's autoguides."
            ) from error


def _latent_sites(found: Look) -> dict[str, dict]:
    return {name: site for name, site in sample_sites(found.model).items() if not site["is_observed"]}


def _check_same(sites: Mapping[str, dict], others: list[dict[str, dict]], guide: str) -> None:
    names = sorted({name for other in others for name in sites.keys() ^ other.keys()})
    if names:
        raise ValueError(
            f"{guide}: latent sites {names} appear in some runs of the model only; expected the same latents each "
            "time. Try poutine.mask in place of the branch, or a guide of your own for them."
        )


def _check_indices(looks: list[Look], plate: str, guide: str) -> None:
    """Raises ValueError for a model that gives its plate other indices in each run: the guide's run has others too."""
    fn = looks[0].model.nodes[plate]["fn"] if plate in looks[0].model.nodes else None
    drawn = [found.subsamples()[plate] for found in looks if plate in found.subsamples()]
    if fn is None or fn.subsample_size not in (None, fn.size) or all(torch.equal(drawn[0], d) for d in drawn[1:]):
        return
    raise ValueError(
        f"{guide}: the model gives plate {plate!r} indices that it draws itself; expected the plate to draw them, so "
        "that model and guide have the same. Try pyro.plate(…, subsample_size=…), or indices as an argument."
    )


def _check_continuous(sites: Mapping[str, dict], guide: str) -> None:
    for name, site in sites.items():
        if isinstance(base_distribution(site["fn"]), dist.Delta):
            raise ValueError(
                f"{guide}: site {name!r} is a point (Delta), which has no density; expected continuous latents. Try "
                f"pyro.deterministic({name!r}, …) in the model."
            )
        base = site["fn"].base_dist if isinstance(site["fn"], dist.MaskedDistribution) else site["fn"]
        while hasattr(base, "base_dist"):
            base = base.base_dist
            if isinstance(base, dist.MaskedDistribution):
                raise ValueError(
                    f"{guide}: site {name!r} has a mask under its reinterpreted dimensions; expected one of "
                    "whole values. Try .to_event(…).mask(…) in this order, or a plate for the elements that are masked."
                )
        if getattr(support_of(site["fn"]), "is_discrete", False):
            raise ValueError(
                f"{guide}: site {name!r} is discrete ({type(site['fn']).__name__}); expected continuous latents, "
                "and discrete ones marked to be summed out. Try pyro.infer.config_enumerate(model) for model and "
                "guide, with TraceEnum_ELBO."
            )


def _inside(sites: Mapping[str, dict], found: Look, plate: str, guide: str) -> list[Latent]:
    frames = [frame for frame in plate_frames(found.model) if frame.name == plate]
    dims = {frame.dim for frame in frames}
    if len(dims) != 1 or None in dims:
        raise ValueError(
            f"{guide}: plate {plate!r} is a Python loop, or at several dims ({sorted(map(str, dims))}); expected its "
            "data points in one dimension. Try pyro.plate(…, dim=-1) in place of the loop."
        )
    dim = dims.pop()
    own = {name: site for name, site in sites.items() if is_inside(site, plate)}
    if not own:
        raise ValueError(
            f"{guide}: the model has no continuous latent inside of plate {plate!r} (latents: "
            f"{sorted(sites) or 'none'}). Try one of Pyro's autoguides, or plate=… with the name of the "
            "plate that the latents are in."
        )
    all_frames = [frame.dim for frame in plate_frames(found.model) if frame.dim is not None]
    nesting = max(-min(all_frames), *(len(site["fn"].batch_shape) for site in own.values()))
    latents, start = [], 0
    for name, site in own.items():
        fn = site["fn"]
        batch = (1,) * (nesting - len(fn.batch_shape)) + tuple(fn.batch_shape)
        declared = {frame.dim for frame in site["cond_indep_stack"]}
        inner = tuple(d for d in range(-nesting, 0) if d != dim and (d in declared or batch[d] > 1))
        try:
            u = bijection(name, fn).inv(site["value"])
        except ValueError as error:
            raise ValueError(f"{guide}: {error}") from error
        shape = tuple(u.shape[site["value"].dim() - len(fn.event_shape) :])
        latents.append(Latent(name, start, shape, dim, inner, tuple(batch[d] for d in inner), nesting))
        start = latents[-1].stop
    return latents


def _check_given(given: tuple[str, ...], outside: tuple[str, ...], plate: str, guide: str) -> None:
    unknown = [name for name in given if name not in outside]
    if unknown:
        raise ValueError(
            f"{guide}: given={unknown} are no continuous latents outside of plate {plate!r}; expected some of "
            f"{list(outside)}."
        )


def _check_supports(run: _Run, sites: Mapping[str, dict], inside: list[str], drawn: list[str], guide: str) -> None:
    """Raises ValueError if a support depends on a latent that the guide does not draw."""
    others = sites.keys() - set(drawn)
    if not others:
        return
    values = {name: sites[name]["value"] for name in drawn}
    for i in range(MOST_VALUES):
        again = _latent_sites(run(values=values | _ith_values(sites, others, i)))
        for name in inside:
            u = bijection(name, sites[name]["fn"]).inv(values[name])
            if not torch.allclose(bijection(name, again[name]["fn"])(u), values[name], rtol=1e-3, equal_nan=True):
                raise ValueError(
                    f"{guide}: the support of site {name!r} depends on {sorted(others)}, which this guide does not "
                    "draw. Expected supports that depend on its own latents only. Try outside=AutoNormal for latents "
                    "outside of the plate, or a latent with a fixed support of which this one is a function."
                )


def _ith_values(sites: Mapping[str, dict], names: Iterable[str], i: int) -> dict[str, Tensor]:
    """Of sites that are enumerated, each one's i-th value in all rows; others are drawn."""
    found = {}
    for name in names:
        fn = sites[name]["fn"]
        if enumerates(sites[name]):
            values = fn.enumerate_support(expand=False)
            found[name] = values[i % len(values)].expand(fn.batch_shape + fn.event_shape)
    return found


def _stopped(model: Callable, names: list[str]) -> Callable:
    """The model up to its last latent: no decoder runs."""

    def run(*args: Any, **kwargs: Any) -> None:
        with suppress(StopAfter.Done):
            StopAfter(names)(model)(*args, **kwargs)

    return run


def _unconstrained(latent: Latent, sites: Mapping[str, dict]) -> Tensor:
    site = sites[latent.name]
    return bijection(latent.name, site["fn"]).inv(site["value"])


def _of_given(given: tuple[str, ...], sites: Mapping[str, dict], nesting: int) -> Tensor:
    """Coordinates of latents outside of the plate, (1, G)."""
    parts = [coordinates_outside(name, sites[name]["fn"], sites[name]["value"], nesting) for name in given]
    return torch.cat(parts, -1) if parts else torch.zeros(1, 0)


def _units(draws: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Median and interquartile range, in standard deviations of a Normal, of draws (S, D) that may not be finite."""
    u = torch.cat(draws)[:MOST_DRAWS].detach()
    if not u.shape[1]:
        return u[0], u[0]
    level = torch.tensor([0.25, 0.5, 0.75], dtype=u.dtype, device=u.device)
    low, centre, high = torch.where(u.isfinite(), u, torch.nan).nanquantile(level, 0)
    spread = ((high - low) / 1.349).nan_to_num(1.0)
    return centre.nan_to_num(0.0), torch.where(spread > 0, spread.clamp(*SPREADS), 1.0)
