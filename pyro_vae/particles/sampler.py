r"""Particles: K weighted draws for each of N data points, from any (model, guide) pair with a data plate.

For latents z_nk ~ q(z_n|x_n), independent given the parameters,

    log w_nk = log p(z_nk) + log p(x_n|z_nk) − log q(z_nk|x_n).

The ELBO is a mean of log-weights, the importance-weighted bound and the evidence their log-mean-exp, k-hat and the
effective sample size functions of them. This file draws them and knows traces and plates, nothing of VAEs:

- the pair's layout (`pyro_vae.pairs.layout`) says where its data points are;
- model and guide run under one outer plate of particles, the model replayed against the guide, for chunks of rows and
  of particles, so that memory is bounded whatever K and N are;
- log-probabilities carry the sites' masks but not their scales: subsampling and `poutine.scale` multiply an objective,
  they are no part of a weight;
- discrete latents y that are marked for enumeration are summed out: those of the model alone always, those of the
  guide in `ParticleSampler.log_weight`, where w = Σ_y p(x, y, z_y) / q(z_y|x, y), z_y ~ q(z|x, y), has less variance
  than with y ~ q(y|x), and the same expectation p(x).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, reduce
from math import inf
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.pairs.enumeration import sum_product
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.sites import is_inside, outside_support, sample_sites, site_log_prob
from pyro_vae.pairs.vectorized import PARTICLE_PLATE
from pyro_vae.particles.checks import check_draws, check_same_latents
from pyro_vae.particles.chunks import cells_within_budget
from pyro_vae.particles.independence import check_rows_apart
from pyro_vae.particles.outside import check_constants
from pyro_vae.particles.particles import Particles, concatenate
from pyro_vae.particles.runs import Runs
from pyro_vae.particles.serial import parts_of

__all__ = ["ParticleSampler"]


class ParticleSampler:
    """A (model, guide) pair with its arguments, looked at once, to draw particles from again and again.

    Args:
        model: the model.
        guide: its guide.
        args: what both are called with.
        kwargs: what both are called with.
        plate: name of the plate of data points; None takes all data as one point.
        parallel: True: many particles run at once; False: one at a time; "auto": at once where the pair allows it.
        outside: whether latents may be outside of the plate (globals θ): then weights are those of the latents inside,
            p(x_n, z_n|θ) / q(z_n|θ), at the values of θ that `given` sets.
        computed: whether values of `pyro.deterministic` sites are wanted too.

    Attributes:
        pair: what is known of it.
        layout: of the pair.
        rows: of the pair.
        num_points: N, the size of the data plate (of the whole data set, if the plate subsamples it).
        serial: whether particles run one at a time.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        args: tuple = (),
        kwargs: dict | None = None,
        *,
        plate: str | None = "data",
        parallel: bool | str = "auto",
        outside: bool = False,
        computed: bool = False,
    ) -> None:
        self.model, self.guide = model, guide
        self.pair = Pair(model, guide, args, kwargs, plate=plate)
        self.layout, self.rows = self.pair.find_layout("any" if outside else "observed"), self.pair.rows
        self._given: dict[str, Tensor] = {}
        self._runs = Runs(self.pair, self.layout, parallel, computed=computed)
        self.serial = self._runs.serial
        check_constants(self)
        check_rows_apart(self)

    @property
    def num_points(self) -> int:  # with a DataLoader, of the batch at hand
        return self.rows.num_points

    # -- chunks -------------------------------------------------------------------------------------------------------

    @cached_property
    def cells(self) -> int:
        """Particles × rows of a pass within the budget of memory."""
        few = (8, slice(0, 2)) if self.rows.separable else (1, None)
        with evaluation_mode(self.model, self.guide):
            return cells_within_budget(lambda: self.log_weight(*few, check=False))

    def chunks(
        self,
        num_particles: int,
        chunk_size: int | None = None,
        *,
        tensors: float = 1.0,
        together: int | None = None,
    ) -> tuple[list[slice], list[int]]:
        """Slices of rows, and counts of particles that sum to `num_particles`, for passes in bounded memory.

        Args:
            num_particles: K.
            chunk_size: particles × rows of one pass, at most, where rows can be told apart at all; default: as many
                as make 24 MiB of tensors.
            tensors: how many times the tensors of one weight a pass makes.
            together: how many particles of a row should pass at once; default: all K, so that rows come one after the
                other where K is large. Work that is done once for each row is done faster for many.
        """
        together = max(1, num_particles if together is None else min(together, num_particles))
        cells = max(1, int(self.cells / tensors) if chunk_size is None else chunk_size)
        rows = self.rows.fixed or self.num_points
        if self.rows.separable:
            rows = min(rows, max(1, cells // (1 if self.serial else together)))  # a run costs the same for any rows
            rows = -(-self.num_points // -(-self.num_points // rows))  # passes of about the same size
        at_once = max(1, min(num_particles, cells // rows))
        at_once = -(-num_particles // -(-num_particles // at_once))
        whole, rest = divmod(num_particles, at_once)
        slices = [slice(i, min(i + rows, self.num_points)) for i in range(0, self.num_points, rows)]
        return slices, [at_once] * whole + [rest] * (rest > 0)

    def check(self) -> None:
        """Raises ValueError for data that are not finite or outside the support of their likelihood."""
        with torch.random.fork_rng(), torch.no_grad(), evaluation_mode(self.model, self.guide):
            for rows in self.chunks(1)[0]:
                self.log_weight(1, rows, check=True)

    # -- drawing ------------------------------------------------------------------------------------------------------

    def draw(self, num_particles: int, rows: slice | None = None, *, check: bool = True) -> Particles:
        """K particles for each of `rows` (default: all). `check`: refuse data that are not finite or not in support.

        Discrete latents of the guide are drawn, also where they are marked for enumeration.
        """
        if self.rows.fixed and rows is None:
            return concatenate([self.draw(num_particles, r, check=check) for r in self.chunks(num_particles, 1)[0]])
        return self.weigh(*self.traces(num_particles, rows, check=check), num_particles, rows)

    def log_weight(self, num_particles: int, rows: slice | None = None, *, check: bool = True) -> Tensor:
        """log w of new particles, (K, N), nats, with all discrete latents summed out that are marked for it."""
        if not self.pair.enumerated:
            return self.draw(num_particles, rows, check=check).log_weight
        guide_trace = self.run(self.guide, num_particles, rows, enumerate_sites=self.pair.enumerated)
        model_trace = self._replay(guide_trace, num_particles, rows, check)

        def sign(trace: poutine.Trace, site: dict) -> int:
            if trace is model_trace:
                return 1
            return 0 if site["is_observed"] or site["name"] in self.pair.enumerated else -1

        value = _sum_product(self, (guide_trace, model_trace), sign, num_particles, rows)
        outside = self.outside(model_trace, rows)
        return value if outside is None else value.masked_fill(outside, -inf)

    def traces(
        self, num_particles: int, rows: slice | None = None, *, check: bool = True
    ) -> tuple[poutine.Trace, poutine.Trace]:
        """Traces of the guide, and of the model replayed against it; arguments as `draw`."""
        guide_trace = self.run(self.guide, num_particles, rows)
        return guide_trace, self._replay(guide_trace, num_particles, rows, check)

    def run(
        self,
        function: Callable,
        num_particles: int,
        rows: slice | None = None,
        *,
        values: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """A trace of `function` (the model, the guide or a handled version of them) for K particles, as `Runs` has it,
        at the given values of latents outside of the plate."""
        given = {name: _expanded(value, num_particles) for name, value in self._given.items()}
        return self._runs(function, num_particles, rows, values={**given, **(values or {})}, **options)

    @contextmanager
    def given(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Sets sites outside of the plate to G draws, {site: (G, …) as in traces}; of K particles each gets K/G."""
        before, self._given = self._given, dict(values)
        try:
            yield
        finally:
            self._given = before

    def _replay(self, guide_trace: poutine.Trace, num_particles: int, rows: slice | None, check: bool) -> poutine.Trace:
        options = {"enumerate_sites": self.pair.summed, "replay": guide_trace}
        model_trace = self.run(self.model, num_particles, rows, **options)
        if self.serial:  # sites may come and go
            check_same_latents(self, guide_trace, model_trace)
        if check:
            check_draws(self, guide_trace, model_trace, num_particles, rows)
        return model_trace

    # -- weighing -----------------------------------------------------------------------------------------------------

    def weigh(
        self, guide_trace: poutine.Trace, model_trace: poutine.Trace, num_particles: int, rows: slice | None = None
    ) -> Particles:
        """The particles of two traces of `run`: log-probabilities with masks, without scales, summed to (K, N)."""
        own = sample_sites(model_trace)  # not the guide's auxiliary sites
        sites = {n: s for n, s in sample_sites(guide_trace).items() if n in own and not own[n]["is_observed"]}
        sites = {name: site for name, site in sites.items() if is_inside(site, self.layout.plate)}
        latents = {name: self.layout.align(site, rows) for name, site in sites.items()}
        prior, likelihood = self.log_prior_likelihood(model_trace, num_particles, rows, summed=self.pair.summed)
        posterior = self.log_posterior(guide_trace, num_particles, rows)
        shape = torch.broadcast_shapes(prior.shape, likelihood.shape, posterior.shape)
        return Particles(latents, *(t.expand(shape) for t in (prior, likelihood, posterior)))

    def log_prior_likelihood(
        self, trace: poutine.Trace, num_particles: int, rows: slice | None, *, summed: set[str]
    ) -> tuple[Tensor, Tensor]:
        """log p(z) and log p(x|z) of a trace of the model in which the sites `summed` are enumerated, each (K, N)."""
        if summed:
            prior = _sum_product(self, (trace,), lambda _, site: 0 if site["is_observed"] else 1, num_particles, rows)
            likelihood = _sum_product(self, (trace,), lambda *_: 1, num_particles, rows) - prior
        else:
            prior, likelihood = (_sum(self, trace, rows, observed=observed) for observed in (False, True))
        outside = self.outside(trace, rows)
        if outside is None:
            return prior, likelihood
        impossible = outside & ~torch.isfinite(likelihood)
        return prior.masked_fill(outside, -inf), torch.where(impossible, -inf, likelihood)

    def outside(self, trace: poutine.Trace, rows: slice | None) -> Tensor | None:
        """Which particles have a latent outside of its distribution's support in a trace, (K, N); None: none can be."""
        found = []
        for name, site in sample_sites(trace).items():
            drawn = not site["is_observed"] and name not in self.pair.summed | self.pair.enumerated
            drawn = drawn and is_inside(site, self.layout.plate)
            outside = outside_support(site) if drawn else None
            # what depends on the values of enumerated sites is counted in their sum
            if outside is not None and outside.dim() <= self.layout.width:
                found.append(self.layout.sum_to_points(name, outside.to(torch.int), rows) > 0)
        return reduce(torch.logical_or, found) if found else None

    def log_posterior(
        self, trace: poutine.Trace, num_particles: int, rows: slice | None, *, summed: Collection[str] = ()
    ) -> Tensor:
        """log q(z|x) of a trace of the guide in which the sites `summed` are enumerated, (K, N)."""
        if not summed:
            return _sum(self, trace, rows, observed=False)
        return _sum_product(self, (trace,), lambda _, site: 0 if site["is_observed"] else 1, num_particles, rows)


def _sum(sampler: ParticleSampler, trace: poutine.Trace, rows: slice | None, *, observed: bool) -> Tensor:
    """Log-probability of the sites that are (not) observed, (K, N)."""
    sites, layout = sample_sites(trace).items(), sampler.layout
    terms = [
        layout.sum_to_points(name, site_log_prob(site), rows)
        for name, site in sites
        if site["is_observed"] == observed and is_inside(site, layout.plate)
    ]
    return sum(terms[1:], terms[0]) if terms else torch.zeros(1, 1, device=layout.device)


def _sum_product(
    sampler: ParticleSampler, traces: Any, sign: Callable, num_particles: int, rows: slice | None
) -> Tensor:
    """log Σ Π p^sign over the enumerated sites inside of the plate, (K, N)."""
    layout, all_rows = sampler.layout, sampler.rows
    if layout.sequential:
        raise ValueError(
            f"plate {layout.plate!r} is a loop, whose discrete latents are summed out all together. Try plate=None for "
            "the joint evidence of all data, or a plate with dim=-1 in place of the loop."
        )
    keep = {} if sampler.serial else {PARTICLE_PLATE: num_particles}
    if layout.plate is not None:
        size = rows.stop - rows.start if rows is not None and all_rows.separable else sampler.num_points
        keep[layout.plate] = all_rows.fixed or size
    if sampler.serial:
        whose = {id(part): trace for trace in traces for part in parts_of(trace)}
        runs = zip(*map(parts_of, traces), strict=True)
        inside = _inside(lambda part, site: sign(whose[id(part)], site), layout.plate)
        value = torch.stack([sum_product(parts, inside, keep) for parts in runs])
    else:
        value = sum_product(traces, _inside(sign, layout.plate), keep)
    return all_rows.select(value if layout.plate is not None else value.unsqueeze(1), rows)


def _inside(sign: Callable, plate: str | None) -> Callable:
    return lambda trace, site: sign(trace, site) if is_inside(site, plate) else 0


def _expanded(value: Tensor, num_particles: int) -> Tensor:
    """Values of G draws (G, …) for K particles, of which K/G belong to each draw, one draw after the other."""
    return value if len(value) == num_particles else value.repeat_interleave(num_particles // len(value), 0)
