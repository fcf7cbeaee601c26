"""Draws of a guide and what comes of them, in groups of `from_pyro_svi`."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.evidence.log_weights import LogWeightSummary
from pyro_vae.evidence.moments import CELLS, IntegratedLikelihood, locals_of
from pyro_vae.integrations.arviz_arguments import named_tensors, observed_arguments, put_constants
from pyro_vae.integrations.arviz_chunks import Chunk
from pyro_vae.integrations.arviz_discrete import draw_summed
from pyro_vae.integrations.arviz_groups import Groups
from pyro_vae.integrations.arviz_sites import ModelSites, Release, plate_sizes
from pyro_vae.integrations.arviz_theta import Theta
from pyro_vae.integrations.arviz_weights import from_the_others, resampled
from pyro_vae.pairs.rows import WINDOW
from pyro_vae.pairs.sites import is_inside
from pyro_vae.pairs.vectorized import PARTICLE_PLATE
from pyro_vae.particles.particles import Particles
from pyro_vae.particles.sampler import ParticleSampler
from pyro_vae.particles.serial import parts_of
from pyro_vae.progress import progress_bar

__all__ = ["Sampled"]


class Sampled:
    """Draws of a guide, and what comes of them.

    Args:
        groups: where to.
        sampler: of the pair, with `outside=True` where there are latents outside of the plate (globals θ).
        num_samples: S.
        num_particles: draws of the latents of a point in each integral over them.
    """

    def __init__(self, groups: Groups, sampler: ParticleSampler, num_samples: int, num_particles: int) -> None:
        self.groups, self.sampler, self.num_samples, self.num_particles = groups, sampler, num_samples, num_particles
        self.model, self.plate, self.look = sampler.model, sampler.layout.plate, sampler.pair.look.model
        self.sites = ModelSites(self.look)
        self.generative = Release(self.sites.observed)(self.model)
        self.drawn = sampler.pair.latents - sampler.pair.summed
        self.all_rows, self.counts = sampler.chunks(num_samples)
        computed = [self.look.nodes[n] for n, v in self.sites.variables.items() if v.role == "computed"]
        if not all(is_inside(site, self.plate) for site in computed):
            self.all_rows = [slice(0, sampler.num_points)]  # it may hold all rows
        outside = [name for name in self.sites.latents if not is_inside(self.look.nodes[name], self.plate)]
        if outside:
            sampler.layout.check_vectorized("from_pyro_svi, with latents outside of the plate")
        self.theta = Theta(sampler, num_samples) if outside else None

    def put(self, progress: bool, resample: bool) -> None:
        """Stores all groups but the arguments and predictions."""
        evidence: list[tuple[Tensor, ...]] = []
        with progress_bar(len(self.all_rows) * len(self.counts), "draws for ArviZ", progress) as bar:
            for rows in self.all_rows:
                summary, stop = LogWeightSummary(self.num_samples), 0
                for count in self.counts:
                    draws, stop = slice(stop, stop + count), stop + count
                    particles = self._put_chunk(draws, rows)
                    if self.theta is None:
                        summary.update(particles.log_weight)
                    bar.update()
                if self.theta is None:
                    evidence.append(summary.result())
                else:
                    self._put_integrated(rows)
        if self.theta is None:
            self._put_evidence([torch.cat(parts) for parts in zip(*evidence, strict=True)])
        else:
            self.theta.put(self.groups, joint=resample)
        if resample:
            self._resample()

    def _resample(self) -> None:
        """Draws what follows from the latents anew, by the weights of the draws."""
        self.sampler.layout.check_vectorized("from_pyro_svi(resample=True)")
        log_weights = torch.from_numpy(self.groups.get("sample_stats", "log_weights"))
        index = resampled(log_weights)
        plate = None if self.theta is not None else self.plate
        self.groups.take(index.numpy(), plate)
        if self.theta is not None:
            self.theta.take(index)

    def _put_chunk(self, draws: slice, rows: slice) -> Particles:
        sampler, count = self.sampler, draws.stop - draws.start
        size = (self.num_samples, sampler.num_points)
        put = Chunk(self.groups, sampler, self.sites.variables, size, (draws, rows))
        theta = {} if self.theta is None else self.theta.at(draws)
        with sampler.given(theta):
            guide_trace, model_trace = sampler.traces(count, rows, check=draws.start == 0)
            values = {name: guide_trace.nodes[name]["value"] for name in self.drawn}
            trace = model_trace
            if sampler.pair.summed:
                values |= draw_summed(sampler, values, self.sites.variables, count, rows)
                trace = sampler.run(self.model, count, rows, values=values)
            put.sites(trace, {"latent": "posterior", "computed": "posterior"})
            put.log_probs(trace)
            put.data(trace)
            put.sites(sampler.run(self.generative, count, rows, values=values), {"observed": "posterior_predictive"})
            particles = sampler.weigh(guide_trace, model_trace, count, rows)
            if self.theta is None:
                put.stats(particles)
            else:
                self.theta.add(draws, particles)
        with sampler.given({} if self.theta is None else self.theta.prior(draws)):
            prior = {"latent": "prior", "computed": "prior", "observed": "prior_predictive"}
            put.sites(sampler.run(self.generative, count, rows), prior)
        return particles

    def _put_evidence(self, evidence: list[Tensor]) -> None:
        """Stores the evidence of each data point, and log p(x_n) in log_likelihood."""
        groups, plate = self.groups, self.plate
        for name, value in zip(("log_evidence", "log_evidence_error", "ess", "pareto_khat"), evidence, strict=True):
            groups.put("sample_stats", name, value if plate else value[0], [plate] if plate else [])
        if plate is not None and self.sites.observed:
            integrated = from_the_others(groups.get("sample_stats", "log_weights"))
            groups.put("log_likelihood", self.sites.together, integrated, [plate], draws=True)

    def _put_integrated(self, rows: slice) -> None:
        """Stores log p(x_n|θ) at each draw of θ."""
        arrays = {name: self.groups.get("posterior", name)[:, rows] for name in locals_of(self.sampler)}
        draws = {name: torch.from_numpy(array).to(self.sampler.layout.device) for name, array in arrays.items()}
        likelihood = IntegratedLikelihood(self.sampler, rows, self.num_particles, self.theta.values, draws)
        together = max(1, CELLS // ((rows.stop - rows.start) * (1 if likelihood.exact else self.num_particles)))
        size = (self.num_samples, self.sampler.num_points)
        variances = []
        for start in range(0, self.num_samples, together):
            at = slice(start, min(start + together, self.num_samples))
            value, variance = likelihood(self.theta.at(at), at.stop - at.start)
            self.groups.put(
                "log_likelihood", self.sites.together, value, [self.plate], draws=True, at=(at, rows), size=size
            )
            self.theta.log_likelihood[at] += value.sum(1).cpu()
            variances.append(variance)
        if not likelihood.exact:
            error = torch.cat(variances).mean(0).sqrt()
            self.groups.put("sample_stats", "log_likelihood_error", error, [self.plate], at=(rows,), size=size[1:])

    def put_arguments(self) -> set[str]:
        """Stores the arguments that are not observed, and returns the names of the others."""
        look, rows = self.sampler.pair.look, self.sampler.rows
        arguments = named_tensors(self.model, rows.args, rows.kwargs)
        probe = named_tensors(self.model, *rows.cut(slice(0, WINDOW)))  # what the look was at
        if rows.fixed is not None:
            index = look.subsamples()[self.plate]
            probe |= {name: a[index] for name, a in arguments.items() if a.dim() and len(a) == rows.num_points}
        skip = observed_arguments(probe, [self.look.nodes[name]["value"] for name in self.sites.observed])
        sizes = plate_sizes(self.look, self.sites.variables)
        sizes |= {} if self.plate is None else {self.plate: rows.num_points}
        put_constants(self.groups, "constant_data", self.model, (rows.args, rows.kwargs), sizes, skip)
        return skip

    def put_predictions(self, arguments: tuple[tuple, dict], skip: set[str]) -> None:
        """Stores new data, drawn from the model at the draws of θ, and what it was called with for them."""
        variables = {name: self.sites.variables[name] for name in self.sites.observed}
        with self.sampler.rows.using(*arguments):
            with self.sampler.given({} if self.theta is None else self.theta.at(slice(0, 1))):
                first = parts_of(self.sampler.run(self.generative, 1))[0]
            sizes = plate_sizes(first, self.sites.observed)
            sizes.pop(PARTICLE_PLATE, None)
            size = sizes.get(self.plate, 1)
            at_once = max(1, CELLS // size)
            for start in range(0, self.num_samples, at_once):
                at = slice(start, min(start + at_once, self.num_samples))
                with self.sampler.given({} if self.theta is None else self.theta.at(at)):
                    trace = self.sampler.run(self.generative, at.stop - at.start)
                put = Chunk(self.groups, self.sampler, variables, (self.num_samples, size), (at, slice(0, size)))
                put.sites(trace, {"observed": "predictions"})
        put_constants(self.groups, "predictions_constant_data", self.model, arguments, sizes, skip)
