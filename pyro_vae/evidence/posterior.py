r"""Draws from the posterior: weighed particles of an estimator, resampled.

From K particles z_k with weights w_k, S are taken with replacement, with probabilities ∝ w_k (sampling-importance-
resampling, Rubin 1987; Smith & Gelfand 1992, *Bayesian statistics without tears*), for each data point by itself. They
are draws from p(z|x) as K → ∞, with a bias of order 1/K, whatever the guide is; k-hat and the effective sample size say
how far from that.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import check_choice, checked
from pyro_vae.evidence.adaptive import adapted_draws
from pyro_vae.evidence.annealed import annealed_draws
from pyro_vae.evidence.density import LatentDensity
from pyro_vae.evidence.evidence import is_trusted, khat_threshold
from pyro_vae.evidence.joint import JointDensity
from pyro_vae.evidence.joint_draws import JointDraws
from pyro_vae.evidence.log_weights import LogWeightSummary
from pyro_vae.pairs.handlers import unobserved
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.threads import one_thread
from pyro_vae.pairs.validity import check_density
from pyro_vae.particles.particles import chosen
from pyro_vae.particles.sampler import ParticleSampler
from pyro_vae.progress import progress_bar

__all__ = ["PosteriorDraws", "draw_posterior", "resampled"]

METHODS = ("adaptive", "annealed", "importance", "prior")
Draw = Callable[[int], tuple[Tensor, dict[str, Tensor]]]


class PosteriorDraws(dict[str, Tensor]):
    """Draws from the posterior, {site: (S, N, *inner plates, *event)}; without N for latents outside of the plate.

    Attributes:
        log_evidence: log p(x) by the same particles, (N,), nats; (1,) where latents are outside of the plate, whose
            draws are weighed together with those inside.
        effective_sample_size: of the K particles, of the same shape.
        pareto_khat: of their weights, of the same shape: above `threshold`, do not trust the draws.
        num_particles: K.
        bounded: whether a share of the particles comes from the prior, so that weights are bounded.
    """

    def __init__(
        self, draws: dict[str, Tensor], summary: tuple[Tensor, ...], num_particles: int, *, bounded: bool
    ) -> None:
        super().__init__(draws)
        self.log_evidence, _, self.effective_sample_size, self.pareto_khat = summary
        self.num_particles, self.bounded = num_particles, bounded

    @property
    def threshold(self) -> float:
        """The largest k-hat to trust, as in `Evidence`."""
        return khat_threshold(self.num_particles)

    @property
    def doubtful(self) -> Tensor:
        """Which points' draws not to trust, bool."""
        return ~is_trusted(self.pareto_khat, self.effective_sample_size, self.num_particles, bounded=self.bounded)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.items())
        ess, khat = self.effective_sample_size, self.pareto_khat
        doubtful, largest = self.doubtful, khat.nan_to_num(0, neginf=-inf).max()
        return "\n".join(
            [
                f"Posterior draws of {shapes}, resampled from {self.num_particles} particles",
                f"  effective sample size  median {ess.nanmedian():.1f}, smallest {ess.nan_to_num(0).min():.1f}",
                f"  Pareto k-hat           median {khat.nanmedian():.2f}, largest {largest:.2f}; "
                f"{int(doubtful.sum())} of {len(khat)} points not to trust (above {self.threshold:.2f})",
            ]
        )


@one_thread
@checked
@seeded
def draw_posterior(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_samples: int = 1000,
    num_particles: int = 3000,
    plate: str | None = "data",
    method: str = "adaptive",
    parallel: bool | str = "auto",
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> PosteriorDraws:
    """Draws from the posterior p(z|x) of each data point, and of latents outside of the plate, by resampling.

    Args:
        model: a Pyro model, as in `importance_sampling`; latents may be outside of the plate too.
        guide: its guide.
        *args: what both are called with.
        num_samples: S ≥ 1 draws.
        num_particles: K, weighed particles of each point, of which S are taken with replacement. With latents outside
            of the plate, K draws of these, each with enough particles for each point (`pyro_vae.evidence.joint_draws`).
        plate: name of the plate of data points; None takes all data as one point.
        method: whose particles: "adaptive", "annealed" (K chains), "importance" (the guide's) or "prior", each as the
            estimator of this name has them.
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        progress: show a progress bar, if on a terminal.
        **kwargs: what both are called with.

    Returns:
        `PosteriorDraws`: {site: (S, N, *inner plates, *event)}, without discrete sites that are summed out.

    Raises:
        ValueError: as the estimators; a method other than "adaptive" with latents outside of the plate.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # too wide
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x, 2.0))
        >>> draws = draw_posterior(model, guide, torch.tensor([0.0, 2.0]), num_samples=2000, seed=0)
        >>> draws["z"].shape, draws["z"].std(0).round(decimals=1)
        (torch.Size([2000, 2]), tensor([0.7000, 0.7000]))
    """
    check_choice("method", method, METHODS)
    sampler = ParticleSampler(
        *(model, unobserved(model) if method == "prior" else guide, args, kwargs),
        plate=plate,
        parallel=parallel,
        outside=method == "adaptive" and plate is not None,
    )
    sampler.layout.check_vectorized("draw_posterior")
    check_density(sampler.pair)
    with torch.no_grad(), evaluation_mode(model, guide):
        sampler.check()
        joint = _joint(sampler) if method == "adaptive" else None
        if joint is not None:
            return _resample_jointly(joint, num_samples, num_particles, progress)
        return _resample(sampler, method, num_samples, num_particles, progress)


def _joint(sampler: ParticleSampler) -> JointDraws | None:
    """Draws of globals and locals together, where there are globals."""
    if sampler.layout.plate is None:
        return JointDraws.of(sampler)
    outside = sampler.pair.outside(sampler.pair.look.model).values()
    return JointDraws(JointDensity(sampler)) if any(not site["is_observed"] for site in outside) else None


def _resample(
    sampler: ParticleSampler, method: str, num_samples: int, num_particles: int, progress: bool
) -> PosteriorDraws:
    pieces, summaries = [], []
    with progress_bar(sampler.num_points, "posterior draws", progress) as bar:
        for rows in sampler.chunks(num_particles, together=num_particles)[0]:
            latents, summary = resampled(sampler, rows, method, num_samples, num_particles)
            pieces.append(latents)
            summaries.append(summary)
            bar.update(len(summary[0]))
    latents = {name: torch.cat([piece[name] for piece in pieces], 1) for name in pieces[0]}
    if sampler.layout.plate is None:
        latents = {name: z[:, 0] for name, z in latents.items()}
    result = tuple(torch.cat(c) for c in zip(*summaries, strict=True))
    return PosteriorDraws(latents, result, num_particles, bounded=method == "adaptive")


def resampled(
    sampler: ParticleSampler, rows: slice, method: str, num_samples: int, num_particles: int
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """S of K weighed particles of some rows, {site: (S, n, *inner plates, *event)}, and the summary of the weights."""
    draw, summary, parts = _draws(sampler, rows, method, num_particles), LogWeightSummary(num_particles), []
    for count in sampler.chunks(num_particles, together=num_particles)[1]:
        log_weight, latents = draw(count)
        summary.update(log_weight)
        parts.append((log_weight.double(), latents))
    index = _chosen(torch.cat([w for w, _ in parts]), num_samples)  # (S, n)
    particles = {name: torch.cat([z[name] for _, z in parts]) for name in parts[0][1]}
    return {name: chosen(z, index) for name, z in particles.items()}, summary.result()


def _draws(sampler: ParticleSampler, rows: slice, method: str, num_particles: int) -> Draw:
    """A function: count -> log-weights (count, n) and latents {site: (count, n, …)} of new particles."""
    if method in ("importance", "prior"):

        def from_guide(count: int) -> tuple[Tensor, dict[str, Tensor]]:
            particles = sampler.draw(count, rows, check=False)
            return particles.log_weight, particles.latents

        return from_guide
    density = LatentDensity(sampler, rows)
    draw = adapted_draws(density, num_particles) if method == "adaptive" else annealed_draws(density, num_particles)

    def from_density(count: int) -> tuple[Tensor, dict[str, Tensor]]:
        log_weight, u = draw(count)
        return log_weight, density.latents(u)

    return from_density


def _resample_jointly(joint: JointDraws, num_samples: int, num_particles: int, progress: bool) -> PosteriorDraws:
    summary, parts = LogWeightSummary(num_particles), []
    with progress_bar(num_particles, "posterior draws", progress) as bar:
        for log_weight, g, u in joint.draws(num_particles)(num_particles):
            summary.update(log_weight.unsqueeze(1))
            parts.append((log_weight, g, u))
            bar.update(len(g))
    log_weight, g, u = (torch.cat(column) for column in zip(*parts, strict=True))
    index = _chosen(log_weight.unsqueeze(1), num_samples)[:, 0]
    return PosteriorDraws(joint.density.latents(g[index], u[index]), summary.result(), num_particles, bounded=True)


def _chosen(log_weight: Tensor, num_samples: int) -> Tensor:
    """Indices of S of the K particles of each point, with replacement, (S, N)."""
    impossible = ~(log_weight.max(0).values > -inf)
    if impossible.any():
        raise ValueError(
            f"{int(impossible.sum())} of {len(impossible)} data points have no particle of a weight above zero: x is "
            "impossible given each of them. Try more particles, another method, or to look at the data there."
        )
    weight = log_weight.nan_to_num(-inf).softmax(0)
    return torch.multinomial(weight.T, num_samples, replacement=True).T
