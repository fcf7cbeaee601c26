"""Traces of some particles × rows, under the plate of particles, as parts of the arrays of `from_pyro_svi`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Size, Tensor

from pyro_vae.integrations.arviz_groups import CONDITIONAL, Groups
from pyro_vae.integrations.arviz_sites import Variable
from pyro_vae.pairs.sites import is_inside, site_log_prob
from pyro_vae.pairs.vectorized import PARTICLE_PLATE
from pyro_vae.particles.particles import Particles
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["Chunk"]


class Chunk:
    """Aligns the sites of traces of the model, and stores them at their draws and rows.

    Args:
        groups: where to.
        sampler: which made the traces.
        variables: the model's sites.
        size: draws × rows in all.
        at: the draws and rows of these traces.
    """

    def __init__(
        self,
        groups: Groups,
        sampler: ParticleSampler,
        variables: dict[str, Variable],
        size: tuple[int, int],
        at: tuple[slice, slice],
    ) -> None:
        self.groups, self.sampler, self.variables, self.size, self.at = groups, sampler, variables, size, at

    def sites(self, trace: Any, groups: dict[str, str]) -> None:
        """Stores the values of all sites whose role has a group: {role: group}."""
        for name, variable in self.variables.items():
            if variable.role in groups:
                self._put(groups[variable.role], name, self._site(trace, name))

    def log_probs(self, trace: Any) -> None:
        """Stores log p(x|z) of each observed site and log p(z) of each latent."""
        for name, variable in self.variables.items():
            if variable.role in ("observed", "latent"):
                site = self._site(trace, name)
                group = CONDITIONAL if variable.role == "observed" else "log_prior"
                self._put(group, name, site, site_log_prob(site))

    def data(self, trace: Any) -> None:
        """Stores the data of each observed site."""
        for name, variable in self.variables.items():
            if variable.role == "observed":
                self._put("observed_data", name, self._site(trace, name), draws=False)

    def stats(self, particles: Particles) -> None:
        """Stores log p(x, z), log q(z|x) and the log-weight of each draw."""
        values = {
            "log_p": particles.log_prior + particles.log_likelihood,
            "log_q": particles.log_posterior,
            "log_weights": particles.log_weight,
        }
        for name, value in values.items():
            self.points("sample_stats", name, value)

    def points(self, group: str, name: str, value: Tensor) -> None:
        """Stores what each draw has for each data point, (K, N)."""
        plate = self.sampler.layout.plate
        if plate is None:
            self.groups.put(group, name, value[:, 0], [], draws=True, at=self.at[:1], size=self.size[:1])
        else:
            self.groups.put(group, name, value, [plate], draws=True, at=self.at, size=self.size)

    def _site(self, trace: Any, name: str) -> dict:
        if name not in trace.nodes:
            raise ValueError(
                f"from_pyro_svi: site {name!r} is not in every run of the model, so that it has no array of draws. Try "
                "to sample it in each run, and to mask it where it does not count."
            )
        return trace.nodes[name]

    def _put(self, group: str, name: str, site: dict, log_prob: Tensor | None = None, *, draws: bool = True) -> None:
        layout, variable = self.sampler.layout, self.variables[name]
        frames = {f.dim: f.name for f in site["cond_indep_stack"] if f.dim is not None and f.name != PARTICLE_PLATE}
        if log_prob is None:
            fn = SimpleNamespace(event_shape=Size([0] * variable.event_dim))
            site = {**site, "fn": fn, "value": self._spread(site["value"], variable)}
        if variable.role == "computed":
            stack = tuple(f for f in site["cond_indep_stack"] if f.dim in variable.plates)
            frames, site = variable.plates, {**site, "cond_indep_stack": stack}
        value = layout.align(site, self.at[1], value=log_prob)
        batch: list[str | None] = [frames[dim] for dim in sorted(frames) if frames[dim] != layout.plate]
        at: tuple[slice, ...] = self.at
        size: tuple[int, ...] = self.size
        if layout.dim is None or not is_inside(site, layout.plate):
            value, at, size = value[:, 0], at[:1], size[:1]
        else:
            batch.insert(0, layout.plate)
        if not draws:
            value, at, size = value[0], at[1:], size[1:]
        self.groups.put(group, name, value, batch, draws=draws, at=at, size=size)

    def _spread(self, value: Tensor, variable: Variable) -> Tensor:
        """A value with all dimensions, (K or 1, *plates, *event), also where it was made outside of plates."""
        left = value.dim() - variable.dims
        value = value.flatten(0, left - 1) if left > 1 else value if left == 1 else value[None]
        plates = variable.dims - variable.event_dim
        missing = self.sampler.layout.width - 1 - plates
        return value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])
