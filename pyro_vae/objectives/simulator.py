"""`Simulator`: log q(z|x) of a guide, at latents and data that its model draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.pairs.checks import check_plate
from pyro_vae.pairs.handlers import ExactDraws, SetSubsample, SetValues, StopAfter
from pyro_vae.pairs.modes import evaluation_mode, fork_random_state
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.preimages import TOLERANCE, find_preimages, points_among
from pyro_vae.pairs.simulated import check_generates, observed_arguments, with_simulated
from pyro_vae.pairs.sites import is_inside, sample_sites
from pyro_vae.pairs.supports import bijection
from pyro_vae.pairs.untouched import Untouched
from pyro_vae.pairs.validity import check_density, check_masks

__all__ = ["Simulator"]

Values = dict[str, Tensor]


class Simulator:
    """Simulates from a model, and scores the latents by its guide.

    Args:
        model: the model.
        guide: its guide.
        args: what both are called with.
        kwargs: what both are called with.
        plate: name of the plate of data points; None takes all data as one point.

    Raises:
        ValueError: as in `ForwardKL`.
    """

    def __init__(self, model: Callable, guide: Callable, args: tuple, kwargs: dict, plate: str | None) -> None:
        self.model, self.guide = model, guide
        pair = Pair(model, guide, args, kwargs, plate=plate, cut=False)
        check_plate(pair.look, plate)
        check_masks(pair.look.guide, pair.look.model)
        own = {n: s for n, s in sample_sites(pair.look.guide).items() if not s["is_observed"]}
        self._outside = {name for name, site in own.items() if not is_inside(site, plate)}
        self._scored = own.keys() - self._outside
        self._latents = pair.latents & self._scored
        if not self._latents:
            raise ValueError(
                f"ForwardKL: expected latents of the guide inside of plate {plate!r}, got {sorted(own) or 'none'}, all "
                "outside. Try plate=None for a guide that is a function of the whole data set."
            )
        inside = {name: own[name] for name in own if name in self._scored}
        self._preimages = find_preimages(inside, sample_sites(pair.look.model))
        if self._preimages is None:
            others = sorted((self._scored - self._latents) | points_among(inside, sample_sites(pair.look.model)))
            raise ValueError(
                f"ForwardKL: expected a guide whose density at a given point is known, got one that draws {others}, "
                "which are points (Delta), or no latents of the model. Try a guide that samples its latents, or an "
                "auxiliary site for each point that has its unconstrained values."
            )
        if self._preimages:
            check_density(Pair(model, guide, args, kwargs, plate=plate))  # of few rows, whose Jacobian is compared
        with fork_random_state(), torch.no_grad(), poutine.block(), Untouched(model, guide):
            outside, drawn = self._draw(args, kwargs)
            observed = {n: s for n, s in sample_sites(pair.look.model).items() if s["is_observed"]}
            self._keys = observed_arguments(observed, sample_sites(drawn), args, kwargs)
            self._check(args, kwargs, outside, drawn)

    def log_prob(self, args: tuple, kwargs: dict) -> Tensor:
        """log q(z*|x*) of new draws, summed over the data, with masks and scales, 0-dim, nats."""
        outside, drawn = self._draw(args, kwargs)
        with torch.no_grad():
            new = with_simulated(args, kwargs, self._keys, sample_sites(drawn))
            values = outside | self._values(drawn)
        return self._score(*new, values, drawn)

    def _draw(self, args: tuple, kwargs: dict) -> tuple[Values, poutine.Trace]:
        """Values of the guide's sites outside of the plate, and a trace of the model in which all else is drawn."""
        outside: Values = {}
        with (
            torch.no_grad(),
            evaluation_mode(self.model, self.guide),
            poutine.block(hide_types=["sample"]),
            ExactDraws(),
        ):
            if self._outside:
                tracer = poutine.trace(StopAfter(self._outside)(self.guide))
                with suppress(StopAfter.Done):
                    tracer(*args, **kwargs)
                outside = {name: tracer.trace.nodes[name]["value"] for name in self._outside}
            model = SetValues(outside)(poutine.uncondition(self.model))
            return outside, poutine.trace(model).get_trace(*args, **kwargs)

    def _values(self, drawn: poutine.Trace) -> Values:
        """The guide's sites inside of the plate at the latents of a simulation; points follow from auxiliary sites."""
        sites = sample_sites(drawn)
        points = set(self._preimages.values())
        values = {name: sites[name]["value"] for name in self._latents - points if name in sites}
        for name, point in self._preimages.items():
            values[name] = bijection(point, sites[point]["fn"]).inv(sites[point]["value"])
        return values

    def _run(self, function: Callable, args: tuple, kwargs: Mapping, values: Values, drawn: poutine.Trace) -> Any:
        """A trace at these values, with the subsamples of a simulation."""
        nodes = drawn.nodes.values()
        indices = {n["name"]: n["value"] for n in nodes if n["type"] == "sample" and site_is_subsample(n)}
        return poutine.trace(SetSubsample(indices)(SetValues(values)(function))).get_trace(*args, **kwargs)

    def _score(self, args: tuple, kwargs: Mapping, values: Values, drawn: poutine.Trace) -> Tensor:
        trace = self._run(self.guide, args, kwargs, values, drawn)
        trace.compute_log_prob(lambda name, _: name in self._scored)
        terms = [trace.nodes[name]["log_prob_sum"] for name in trace.nodes if name in self._scored]
        return sum(terms[1:], terms[0])

    def _check(self, args: tuple, kwargs: dict, outside: Values, drawn: poutine.Trace) -> None:
        """Raises ValueError where simulated arguments make another model, or the same guide."""
        sites = sample_sites(drawn)
        new = with_simulated(args, kwargs, self._keys, sites)
        latents = {name: site["value"] for name, site in sites.items() if not site["infer"].get("was_observed")}
        values = outside | self._values(drawn)
        with evaluation_mode(self.model, self.guide):
            check_generates(sites, sample_sites(self._run(self.model, *new, latents, drawn)))
            trace = self._run(self.guide, *new, values, drawn)
            for name in self._preimages.values():
                image, point = trace.nodes[name]["value"], sites[name]["value"]
                if not torch.allclose(image, point, rtol=TOLERANCE, atol=TOLERANCE):
                    raise ValueError(
                        f"ForwardKL: site {name!r} of the guide is a point (Delta) that is not the image of its "
                        "auxiliary site everywhere, so that its density at a given point is not known. Try "
                        "biject_to(support), the same as in the model, for all values."
                    )
            if not self._reads(args, kwargs, new, values, drawn):
                raise ValueError(
                    f"ForwardKL: expected a guide that is a function of what is observed, {sorted(self._keys)}; "
                    "got one whose latents do not depend on it: it would be fitted to the prior. Try a network of the "
                    "data in the guide, or Trace_ELBO for a guide with parameters of its own."
                )

    def _reads(self, args: tuple, kwargs: dict, new: tuple[tuple, dict], values: Values, drawn: poutine.Trace) -> bool:
        """Whether log q depends on what the model observes, be it by a factor that is still zero."""
        before, after = (self._score(*arguments, values, drawn) for arguments in ((args, kwargs), new))
        if not torch.equal(before, after):
            return True
        keys = {key for keys in self._keys.values() for key in keys}
        with torch.enable_grad():
            leaves = {
                key: a.detach().clone().requires_grad_()
                for key, a in [*enumerate(new[0]), *new[1].items()]
                if key in keys and a.is_floating_point()
            }
            moved = [leaves.get(i, a) for i, a in enumerate(new[0])], {n: leaves.get(n, a) for n, a in new[1].items()}
            score = self._score(tuple(moved[0]), moved[1], values, drawn)
            if not leaves or not score.requires_grad:
                return False
            found = torch.autograd.grad(score, list(leaves.values()), allow_unused=True)
        return any(gradient is not None for gradient in found)
