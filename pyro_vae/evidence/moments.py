r"""log p(x_n|θ) at draws of what is outside the plate of data points, with the latents of each point integrated out.

With K draws u_k of a point's latents from a proposal q_n,

    log p(x_n|θ) ≈ log 1/K Σ_k p(x_n, u_k|θ) / q_n(u_k).

The proposal is half the prior p(z_n|θ), half a Gaussian with the moments of the draws of z_n: the prior is near to the
posterior given θ where it is narrow, and these moments are where the data say more. A guide's own q(z_n|x_n, θ), which
is often too narrow for an integral, is used in many dimensions alone, where nothing else finds the posterior.

Sources: Vehtari, Mononen, Tolvanen, Sivula & Winther (2016), JMLR 17(103), section 3.6.1; Merkle, Furr & Rabe-Hesketh
(2019), Psychometrika 84(3), on what leave-one-out means with and without these integrals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import log

import torch
from torch import Tensor

from pyro_vae.evidence.density import LatentDensity
from pyro_vae.evidence.local_weights import Chunk
from pyro_vae.evidence.proposals import Gaussians, defined
from pyro_vae.pairs.sites import is_inside
from pyro_vae.pairs.validity import is_factored
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["CELLS", "IntegratedLikelihood", "MomentWeights", "integrated_at", "locals_of"]

CELLS = 2**16  # draws × rows in one pass

MOST_FITTED = 200  # draws whose moments a proposal gets
MOST_DIMENSIONS = 8  # of a point's latents, for this proposal where there is a guide with a density
WIDEN = 1.2  # factor of their standard deviations: tails that are too light cost more than heavy ones


class IntegratedLikelihood:
    """log p(x_n|θ) of some rows.

    Args:
        sampler: of the pair, with `outside=True`.
        rows: which data points.
        num_particles: K of each.
        theta: draws of the sites outside of the plate, {site: (S, …) as in traces}.
        draws: of the latents inside, at these, {site: (S, N, *inner plates, *event)}.

    Attributes:
        exact: whether no integral has to be estimated: there are no latents inside, or discrete ones, which are summed.
        from_prior: whether draws of the prior are among those that an integral is estimated from.
    """

    def __init__(
        self,
        sampler: ParticleSampler,
        rows: slice,
        num_particles: int,
        theta: Mapping[str, Tensor],
        draws: Mapping[str, Tensor],
    ) -> None:
        self.sampler, self.rows, self.num_particles = sampler, rows, 2 * -(-num_particles // 2)
        self.exact = not locals_of(sampler)
        self._density: LatentDensity | None = None
        if self.exact:
            return
        some_theta = {name: value[:1] for name, value in theta.items()}
        with sampler.given(some_theta):
            density = LatentDensity(sampler, rows)
        if density.dim > MOST_DIMENSIONS and is_factored(sampler.pair):
            return
        count = len(next(iter(draws.values())))
        some = torch.linspace(0, count - 1, min(count, MOST_FITTED)).round().long()
        with sampler.given({name: value[some] for name, value in theta.items()}):
            around = Gaussians.around(density.unconstrain({name: value[some] for name, value in draws.items()}))
        self._density, self._fitted = density, Gaussians(around.loc, WIDEN * around.scale_tril)

    @property
    def from_prior(self) -> bool:
        return self._density is not None

    def __call__(self, theta: Mapping[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
        """log p(x_n|θ) and its variance, each (G, N), at G = `count` draws of θ."""
        sampler = self.sampler
        with sampler.given(theta):
            if self.exact:
                trace = sampler.run(sampler.model, count, self.rows, enumerate_sites=sampler.pair.summed)
                prior, likelihood = sampler.log_prior_likelihood(trace, count, self.rows, summed=sampler.pair.summed)
                value = prior + likelihood
                return value, torch.zeros_like(value)
        weight = self.weights(theta, count, self.num_particles)
        total = weight.logsumexp(1)
        ess = (2 * total - (2 * weight).logsumexp(1)).exp()
        return total - log(self.num_particles), (1 / ess - 1 / self.num_particles).clamp(min=0)

    def weights(self, theta: Mapping[str, Tensor], count: int, num_particles: int) -> Tensor:
        """log-weights of as many new particles for each of `count` draws of θ, (G, K, N)."""
        with self.sampler.given(theta):
            if self._density is None:
                weight = self.sampler.log_weight(count * num_particles, self.rows, check=False)
            else:
                weight = self._mixture_weight(count * num_particles, even=num_particles % 2 == 0)
        return weight.double().reshape(count, num_particles, -1)

    def _mixture_weight(self, num_particles: int, *, even: bool) -> Tensor:
        u = self._density.draw_prior(num_particles)
        if self._density.masked:  # what is masked has no density to weigh
            return self._density.log_joint(u)[1]
        fitted = self._fitted.proposal()
        half = torch.arange(num_particles, device=u.device) if even else torch.randint(2, (num_particles,)).to(u.device)
        u, outside = defined(torch.where((half % 2 == 0)[:, None, None], u, fitted.draw(num_particles)))
        prior, likelihood = self._density.log_joint(u)
        log_q = torch.logaddexp(prior, fitted.log_prob(u, ())) - log(2)
        return (prior + likelihood - log_q).masked_fill(outside, -torch.inf)


class MomentWeights:
    """Weights of latents inside of the plate, given draws of those outside, by half the prior and half a Gaussian with
    the moments of the guide's draws; by the guide itself in many dimensions.

    Args:
        sampler: of the pair, made with `outside=True`.
        theta: of the sites outside, as `ParticleSampler.given` takes them.
    """

    all_rows = False

    def __init__(self, sampler: ParticleSampler, theta: Mapping[str, Tensor]) -> None:
        self.sampler, self.theta = sampler, dict(theta)
        self._by_rows: dict[int, IntegratedLikelihood] = {}

    @property
    def bounded(self) -> bool:
        """Whether half of the draws come from the prior, at all rows so far."""
        return all(likelihood.from_prior for likelihood in self._by_rows.values())

    def prepare(self, chunk: Chunk, num_particles: int) -> Callable[[int], Tensor]:
        """A function: count -> log-weights of as many new particles, (draws, count, rows)."""
        if chunk.rows.start not in self._by_rows:
            self._by_rows[chunk.rows.start] = self._fit(chunk.rows, num_particles)
        likelihood, size = self._by_rows[chunk.rows.start], chunk.draws.stop - chunk.draws.start
        theta = {name: value[chunk.draws] for name, value in self.theta.items()}
        return lambda count: likelihood.weights(theta, size, count)

    def _fit(self, rows: slice, num_particles: int) -> IntegratedLikelihood:
        theta = {name: value[:MOST_FITTED] for name, value in self.theta.items()}
        count = min((len(value) for value in theta.values()), default=MOST_FITTED)
        with self.sampler.given(theta):
            trace = self.sampler.run(self.sampler.guide, count, rows)
        draws = {name: self.sampler.layout.align(trace.nodes[name], rows) for name in locals_of(self.sampler)}
        return IntegratedLikelihood(self.sampler, rows, num_particles, theta, draws)


def integrated_at(
    model: Callable,
    guide: Callable,
    arguments: tuple[tuple, Mapping],
    plate: str,
    values: Mapping[str, Tensor],
    num_particles: int,
) -> tuple[Tensor, Tensor]:
    """log p(x_n|θ), (S, N), and the root of its mean variance, (N,), at draws of all latents by another sampler.

    Args:
        model: the model.
        guide: the model's prior, in the role of a guide.
        arguments: (args, kwargs) of both.
        plate: of the data points.
        values: draws of all latents, {site: (S, *plates, *event)} as in a run of the model alone.
        num_particles: of the latents of each point, for each draw.
    """
    sampler = ParticleSampler(model, guide, arguments[0], dict(arguments[1]), plate=plate, outside=True)
    nodes, width, rows = sampler.pair.look.model.nodes, sampler.layout.width, slice(0, sampler.num_points)

    def padded(name: str, value: Tensor) -> Tensor:
        missing = width + len(nodes[name]["fn"].event_shape) - value.dim()
        return value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])

    spread = {name: padded(name, value) for name, value in values.items()}
    inside = locals_of(sampler)
    theta = {name: value for name, value in spread.items() if name not in inside}
    draws = {name: sampler.layout.align({**nodes[name], "value": spread[name]}) for name in inside}
    likelihood = IntegratedLikelihood(sampler, rows, num_particles, theta, draws)
    count = len(next(iter(values.values())))
    together = max(1, CELLS // (sampler.num_points * likelihood.num_particles))
    found = []
    for start in range(0, count, together):
        some = slice(start, min(start + together, count))
        found.append(likelihood({name: value[some] for name, value in theta.items()}, some.stop - some.start))
    value, variance = (torch.cat(parts) for parts in zip(*found, strict=True))
    return value, variance.mean(0).sqrt()


def locals_of(sampler: ParticleSampler) -> set[str]:
    """The latents inside the plate of data points that are not summed out."""
    nodes = sampler.pair.look.model.nodes
    names = sampler.pair.latents - sampler.pair.summed
    return {name for name in names if is_inside(nodes[name], sampler.layout.plate)}
