"""Runs of a model for the draws of MCMC, one after the other, exactly as MCMC ran it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.infer import config_enumerate, infer_discrete
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from pyro_vae.evidence.moments import integrated_at
from pyro_vae.integrations.arviz_arguments import named_tensors, observed_arguments, put_constants
from pyro_vae.integrations.arviz_groups import CONDITIONAL, Groups
from pyro_vae.integrations.arviz_sites import ModelSites, Release, plate_sizes
from pyro_vae.pairs.enumeration import sum_product
from pyro_vae.pairs.handlers import SetValues
from pyro_vae.pairs.libraries import warn
from pyro_vae.pairs.sites import site_log_prob

__all__ = ["MCMCRuns"]


class MCMCRuns:
    """The model of an MCMC run at each of its draws.

    Args:
        mcmc: after `run`.
        samples: its draws, {site: (chain, draw, …)}.

    Raises:
        ValueError: MCMC has no draws of a latent site, and it cannot be enumerated.
    """

    def __init__(self, mcmc: Any, samples: dict[str, Tensor]) -> None:
        self.mcmc = mcmc
        self.model, self.args, self.kwargs = mcmc.kernel.model, mcmc._args, mcmc._kwargs
        self.chains, self.draws = next(iter(samples.values())).shape[:2]
        self.samples = {name: value.flatten(0, 1) for name, value in samples.items()}
        self._values: dict[tuple[str, str], list[Tensor]] = {}
        self.first = self._trace(SetValues(self._draw(0))(self.model))
        self.sites = ModelSites(self.first)
        self.summed = self.sites.latents - self.samples.keys()
        functions = {name: self.first.nodes[name]["fn"] for name in sorted(self.summed)}
        unseen = [name for name, fn in functions.items() if not getattr(fn, "has_enumerate_support", False)]
        if unseen:
            raise ValueError(
                f"from_pyro: MCMC has no draws of the latent sites {unseen}, which cannot be enumerated either."
            )

    def __len__(self) -> int:
        return self.chains * self.draws

    # -- runs ---------------------------------------------------------------------------------------------------------

    def _draw(self, i: int) -> dict[str, Tensor]:
        return {name: value[i] for name, value in self.samples.items()}

    def _trace(self, function: Callable, args: Any = None, kwargs: Any = None) -> poutine.Trace:
        args, kwargs = (self.args, self.kwargs) if args is None else (args, kwargs)
        return poutine.trace(function).get_trace(*args, **kwargs)

    def draw(self, i: int, predictions: tuple[tuple, dict] | None) -> None:
        """Runs the model with the latents of draw i, and under its prior for as many draws as one chain has."""
        drawn = self._draw(i)
        values = drawn | self._discrete(drawn)
        trace = self._trace(SetValues(values)(self.model))
        for name, variable in self.sites.variables.items():
            site = self._site(trace, name)
            if variable.role == "observed":
                self._keep(CONDITIONAL, name, site_log_prob(site))
            else:
                self._keep("posterior", name, values.get(name, site["value"]))
            if variable.role == "latent":
                self._keep("log_prior", name, site_log_prob(site))
        self._keep("sample_stats", "lp", self._lp(drawn, trace))
        if self.sites.inside(self.summed):
            self._keep("log_likelihood", self.sites.together, self._sum_out(values))
        replicated = self._trace(Release(self.sites.observed)(SetValues(values)(self.model)))
        for name in self.sites.observed:
            self._keep("posterior_predictive", name, self._site(replicated, name)["value"])
        if i < self.draws:
            generated = self._trace(Release(self.sites.observed)(self.model))
            for name, variable in self.sites.variables.items():
                group = "prior_predictive" if variable.role == "observed" else "prior"
                self._keep(group, name, self._site(generated, name)["value"])
        if predictions is not None:
            self._predict(values, predictions)

    def _predict(self, values: dict[str, Tensor], predictions: tuple[tuple, dict]) -> None:
        """Runs the model on new data, with the latents of a draw that are no data point's own."""
        given = {name: value for name, value in values.items() if name not in self.sites.inside(self.sites.latents)}
        self.predicted = self._trace(Release(self.sites.observed)(SetValues(given)(self.model)), *predictions)
        for name in self.sites.observed:
            self._keep("predictions", name, self._site(self.predicted, name)["value"])

    def _site(self, trace: poutine.Trace, name: str) -> dict:
        if name not in trace.nodes:
            raise ValueError(
                f"from_pyro: site {name!r} is not in every run of the model, so that it has no array of draws. Try to "
                "sample it in each run, and to mask it where it does not count."
            )
        return trace.nodes[name]

    def _keep(self, group: str, name: str, value: Tensor) -> None:
        self._values.setdefault((group, name), []).append(value)

    # -- latents that MCMC sums out -----------------------------------------------------------------------------------

    def _discrete(self, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        """Draws of the latents that MCMC summed out, exact given the others."""
        if not self.summed:
            return {}
        model = poutine.condition(config_enumerate(self.model), drawn)
        trace = self._trace(infer_discrete(model, first_available_dim=-1 - self.sites.nesting))
        values = {name: self._site(trace, name)["value"] for name in self.summed}
        return {name: value.reshape(self.first.nodes[name]["value"].shape) for name, value in values.items()}

    def _sum_out(self, values: dict[str, Tensor]) -> Tensor:
        """log p(x_n|θ), with the discrete latents inside the plate summed out."""
        summed = self.sites.inside(self.summed)
        given = SetValues({name: value for name, value in values.items() if name not in summed})
        model = poutine.enum(config_enumerate(given(self.model)), first_available_dim=-1 - self.sites.nesting)
        counted = summed | self.sites.observed
        keep = {self.sites.plate: self.sites.sizes[self.sites.plate]}
        return sum_product((self._trace(model),), lambda _, site: site["name"] in counted, keep)

    def integrate(self, num_particles: int) -> tuple[Tensor, Tensor] | None:
        """log p(x_n|θ), (S, N), and the mean of its error, (N,), where data points have continuous latents."""
        drawn = self.sites.inside(self.sites.latents - self.summed)
        if not drawn or not num_particles:
            return None
        summed = self.sites.inside(self.summed)
        hidden = summed | self.sites.observed
        model = poutine.infer_config(
            self.model, lambda site: {"enumerate": "parallel" if site["name"] in summed else None}
        )
        guide = poutine.block(model, hide_fn=lambda site: site["type"] == "sample" and site["name"] in hidden)
        values = {}
        for name in self.sites.latents - summed:
            shape = self.first.nodes[name]["value"].shape
            values[name] = torch.stack([value.reshape(shape) for value in self._values["posterior", name]])
        try:
            return integrated_at(model, guide, (self.args, self.kwargs), self.sites.plate, values, num_particles)
        except ValueError as error:
            warn(
                f"log_likelihood is that given the latents {sorted(drawn)} of each data point, which cannot be "
                f"integrated out: {error}"
            )
            return None

    # -- the log-joint ------------------------------------------------------------------------------------------------

    def _lp(self, drawn: dict[str, Tensor], trace: poutine.Trace) -> Tensor:
        """The log-joint in unconstrained coordinates, with the discrete latents summed out: what MCMC follows."""
        transforms = self.mcmc.transforms
        unconstrained = {name: transforms[name](value) for name, value in drawn.items() if name in transforms}
        if self.summed:
            return -self._potential(drawn | unconstrained)
        log_dets = [transforms[name].log_abs_det_jacobian(drawn[name], u).sum() for name, u in unconstrained.items()]
        return trace.log_prob_sum() - sum(log_dets)

    @cached_property
    def _potential(self) -> Callable:
        transforms = {name: self.mcmc.transforms[name] for name in self.samples}
        options = {"transforms": transforms, "max_plate_nesting": self.sites.nesting, "initial_params": {}}
        return initialize_model(self.model, self.args, self.kwargs, **options)[1]

    # -- what comes of it ---------------------------------------------------------------------------------------------

    def put(
        self,
        groups: Groups,
        integrated: tuple[Tensor, Tensor] | None,
        predictions: tuple[tuple, dict] | None,
    ) -> None:
        """Stores the values of all runs, log p(x_n|θ) with its error where latents were integrated out, and what the
        model was called with."""
        groups.rows = self.sites.plate
        if integrated is not None:
            self._values = {key: value for key, value in self._values.items() if key[0] != "log_likelihood"}
            groups.put("log_likelihood", self.sites.together, integrated[0], [self.sites.plate], draws=True)
            groups.put("sample_stats", "log_likelihood_error", integrated[1], [self.sites.plate])
        for (group, name), values in self._values.items():
            variable = self.sites.variables.get(name)
            if group == "sample_stats" or variable is None:
                batch = [self.sites.plate] if group == "log_likelihood" else []
                groups.put(group, name, torch.stack(values), batch, draws=True)
                continue
            log_prob = group in (CONDITIONAL, "log_likelihood", "log_prior")
            aligned = [variable.aligned(value, log_prob=log_prob) for value in values]
            stacked = torch.stack([value for value, _ in aligned])
            groups.put(group, name, stacked, aligned[0][1], draws=True)
            if group == CONDITIONAL and integrated is None and not self.sites.inside(self.summed):
                groups.put("log_likelihood", name, stacked, aligned[0][1], draws=True)
        for name in self.sites.observed:
            groups.put("observed_data", name, *self.sites.variables[name].aligned(self.first.nodes[name]["value"]))
        self._put_arguments(groups, "constant_data", (self.args, self.kwargs), self.first)
        if predictions is not None:
            self._put_arguments(groups, "predictions_constant_data", predictions, self.predicted)

    def _put_arguments(self, groups: Groups, group: str, arguments: tuple[tuple, dict], trace: poutine.Trace) -> None:
        named = named_tensors(self.model, self.args, self.kwargs)
        skip = observed_arguments(named, [self.first.nodes[name]["value"] for name in self.sites.observed])
        put_constants(groups, group, self.model, arguments, plate_sizes(trace, self.sites.observed), skip)
