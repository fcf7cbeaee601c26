r"""log p(x_n|θ): evidence of each data point given draws θ of the latents outside of the data plate (globals).

In a hierarchical model, data points are independent given the globals,

    p(x, z, θ) = p(θ) Π_n p(z_n|θ) p(x_n|z_n, θ),     p(x_n|θ) = ∫ p(x_n|z, θ) p(z|θ) dz.

For each draw θ_s ~ q(θ) the latents of the points (locals) are integrated out by importance sampling with K particles,

    log p̂(x_n|θ_s) = log 1/K Σ_k p(x_n, z_k|θ_s) / q(z_k|θ_s, x).

These are the terms that cross-validation of a hierarchical model needs: with the conditional terms p(x_n|z_n, θ) the
posterior of z_n without x_n is so far from that with it that importance sampling between them fails, or means another
question (Merkle, Furr & Rabe-Hesketh 2019, *Bayesian comparison of latent variable models: conditional versus marginal
likelihoods*; Vehtari, Mononen, Tolvanen, Sivula & Winther 2016, section 3.6.1).

The product of the estimates is unbiased for p(x|θ_s), so that weights of the draws,

    log W_s = log p(θ_s) + Σ_n log p̂(x_n|θ_s) − log q(θ_s),

estimate the joint evidence, and correct for q(θ) being no exact posterior.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, nan
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import checked
from pyro_vae.evidence.arrow import fit_arrow, good_width
from pyro_vae.evidence.evidence import is_trusted, khat_threshold
from pyro_vae.evidence.joint import JointDensity
from pyro_vae.evidence.local_weights import ArrowWeights, GuideWeights, chunks
from pyro_vae.evidence.log_weights import LogWeightSummary
from pyro_vae.evidence.moments import MomentWeights
from pyro_vae.pairs.handlers import unobserved
from pyro_vae.pairs.modes import evaluation_mode
from pyro_vae.pairs.seeds import seeded
from pyro_vae.pairs.threads import one_thread
from pyro_vae.pairs.validity import check_density, is_factored
from pyro_vae.particles.outside import Outside, draw_outside, given_outside
from pyro_vae.particles.sampler import ParticleSampler
from pyro_vae.progress import progress_bar

__all__ = ["LogLikelihood", "integrated_log_likelihood"]

Weights = GuideWeights | MomentWeights | ArrowWeights


class LogLikelihood(Tensor):
    """log p(x_n|θ_s) for S draws of the globals and N data points: a tensor (S, N), nats, that knows its errors.

    Operations on it give plain tensors; `print` gives a summary.

    Attributes:
        standard_error: of each number, by the delta method, (S, N); zero where no latents had to be integrated out, and
            on the safe side for mixtures (`adaptive`), whose components have fixed counts of draws.
        effective_sample_size: of the K particles, (S, N).
        pareto_khat: tail shape of the weights, (S, N); −inf where nothing had to be integrated out.
        num_particles: K.
        bounded: whether a share of the particles comes from the prior, so that weights are bounded.
        globals: the draws θ_s, {site: (S, *plates, *event)}.
        log_weight: log p(θ_s) + Σ_n log p(x_n|θ_s) − log q(θ_s), (S,), nats; None where q(θ) is not known.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    standard_error: Tensor
    effective_sample_size: Tensor
    pareto_khat: Tensor
    num_particles: int
    bounded: bool
    globals: dict[str, Tensor]
    log_weight: Tensor | None

    @property
    def threshold(self) -> float:
        """The largest k-hat to trust, as in `Evidence`."""
        return khat_threshold(self.num_particles)

    @property
    def doubtful(self) -> Tensor:
        """Which numbers not to trust, (S, N), bool: k-hat is too large or unknown, or the estimate is not finite."""
        trusted = is_trusted(self.pareto_khat, self.effective_sample_size, self.num_particles, bounded=self.bounded)
        return ~trusted | ~torch.isfinite(self.as_subclass(Tensor))

    def __repr__(self) -> str:
        value, khat = self.as_subclass(Tensor), self.pareto_khat
        points, largest = self.doubtful.double().mean(0), khat.nan_to_num(0, neginf=-inf).max()
        lines = [
            f"log p(x_n|θ_s) of {value.shape[1]} data points at {value.shape[0]} draws of "
            f"{', '.join(map(repr, self.globals)) or 'no globals'}, {self.num_particles} particles each (nats)",
            f"  mean over points and draws  {value.mean():.3f}; sd over draws, at a point: median "
            f"{value.std(0).median() if len(value) > 1 else nan:.3f}",
            f"  standard error              median {self.standard_error.nanmedian():.3f}, "
            f"largest {self.standard_error.nan_to_num(0).max():.3f}",
            f"  Pareto k-hat                median {khat.nanmedian():.2f}, largest {largest:.2f}; "
            f"{int((points > 0.05).sum())} of {value.shape[1]} points not to trust at more than 5 % of the draws",
        ]
        return "\n".join(lines)


@one_thread
@checked
@seeded
def integrated_log_likelihood(
    model: Callable,
    guide: Callable | None,
    *args: Any,
    num_samples: int = 100,
    num_particles: int = 100,
    plate: str = "data",
    adaptive: bool | str = "auto",
    draws: Mapping[str, Tensor] | None = None,
    parallel: bool | str = "auto",
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> LogLikelihood:
    """Estimates log p(x_n|θ_s) of each data point at draws θ_s of the globals, with its other latents integrated out.

    Each number is a log-mean-exp over K particles, a lower bound in expectation, with its standard error and k-hat.
    `pyro_vae.diagnostics.leave_one_out` makes leave-one-out cross-validation of them, `log_predictive` the predictive
    density of held-out data: call this with the new data, and `draws` those of the data that the guide was fitted to.

    References:
        Vehtari, Mononen, Tolvanen, Sivula & Winther (2016), Bayesian leave-one-out cross-validation approximations for
        Gaussian latent variable models, JMLR 17(103), section 3.6.1.
        Merkle, Furr & Rabe-Hesketh (2019), Psychometrika 84.

    Args:
        model: a Pyro model with the data points in a plate, and any latents outside of it.
        guide: its guide; None, with `draws`, proposes latents inside of the plate from the prior and a fitted Gaussian.
        *args: what both are called with.
        num_samples: S ≥ 1, draws of the globals.
        num_particles: K ≥ 1, for each draw and each point; 1 where no continuous latents are inside of the plate.
        plate: name of the plate of data points.
        adaptive: how the latents inside are proposed. False: by the guide, given the globals. True: by a Gaussian that
            is fitted to the posterior of globals and locals (`pyro_vae.evidence.arrow`), given the globals, with a
            share of draws from the prior: the most precise, after a fit on all rows at once. "auto": half by the prior,
            half by a Gaussian with the moments of the guide's draws, and for more than eight latents of a point by the
            guide; as True for a guide with one joint density of both, such as `AutoMultivariateNormal`.
        draws: {site: (S, *plates, *event)} draws of all globals, such as those of MCMC; default: from the guide.
        parallel: whether many particles run at once: True; False, one at a time; or "auto", at once where the pair
            allows it, and otherwise one at a time with a warning.
        seed: of the draws; None draws on from torch's generator.
        progress: show a progress bar, if on a terminal.
        **kwargs: what both are called with.

    Returns:
        `LogLikelihood`, a tensor (S, N), nats.

    Raises:
        ValueError: as `importance_sampling`; a guide that has no locals given the globals, with `adaptive=False`.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     m = pyro.sample("m", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(m, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     m = pyro.sample("m", dist.Normal(x.mean(), 0.5))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal((m + x) / 2, 0.5**0.5))  # exact given m
        >>> x = torch.tensor([0.0, 1.0])
        >>> log_p = integrated_log_likelihood(model, guide, x, num_samples=3, adaptive=False, seed=0)
        >>> exact = dist.Normal(log_p.globals["m"][:, None], 2**0.5).log_prob(x)
        >>> log_p.shape, bool((log_p - exact).abs().max() < 1e-5)
        (torch.Size([3, 2]), True)
    """
    if guide is None:
        if draws is None:
            raise ValueError("guide: expected one that draws the globals, got None. Try draws={site: …}, as of MCMC.")
        guide, adaptive = unobserved(model), True
    sampler = ParticleSampler(model, guide, args, kwargs, plate=plate, parallel=parallel, outside=True)
    check_density(sampler.pair)
    factored = is_factored(sampler.pair)
    if adaptive is False and not factored:
        raise ValueError(
            "adaptive=False: the guide draws globals and the latents of the data points together, and has no density "
            "of the latter given the former. Try adaptive=True, or a guide with separate sites, such as AutoNormal."
        )
    with torch.no_grad(), evaluation_mode(model, guide):
        sampler.check()
        draw = draw_outside(sampler, num_samples) if draws is None else given_outside(sampler, draws)
        if not sampler.pair.has_locals:
            num_particles = 1
        weights: Weights = GuideWeights(sampler, draw.values)
        if sampler.pair.has_locals and (adaptive is True or not factored):
            density = JointDensity(sampler)
            arrow = fit_arrow(density).widened(1.0, good_width(density.dim))
            weights = ArrowWeights(density, arrow, density.globals_of(draw.values, len(draw.log_p)))
        elif sampler.pair.has_locals and adaptive == "auto" and not sampler.layout.sequential:
            weights = MomentWeights(sampler, draw.values)
        found = summarize(weights, sampler, len(draw.log_p), num_particles, progress=progress)
    return _result(sampler, draw, found, num_particles, factored and draws is None, weights.bounded)


def summarize(
    weights: Weights,
    sampler: ParticleSampler,
    num_samples: int,
    num_particles: int,
    *,
    progress: bool,
) -> list[Tensor]:
    """log p̂(x_n|θ_s), its standard error, effective sample size and k-hat, each (S, N), float64."""
    rows = []
    parts = chunks(sampler, num_samples, num_particles, all_rows=weights.all_rows)
    with progress_bar(num_samples * sampler.num_points, "log p(x|θ)", progress) as bar:
        for row in parts:
            columns = []
            for chunk in row:
                weigh, summary = weights.prepare(chunk, num_particles), LogWeightSummary(num_particles)
                for count in chunk.counts:
                    log_weight = weigh(count)  # (draws, count, rows)
                    summary.update(log_weight.transpose(0, 1).flatten(1))
                columns.append([v.reshape(len(log_weight), -1) for v in summary.result()])
                bar.update(columns[-1][0].numel())
            rows.append([torch.cat(column, 1) for column in zip(*columns, strict=True)])
    return [torch.cat(column) for column in zip(*rows, strict=True)]


def _result(
    sampler: ParticleSampler, draw: Outside, found: list[Tensor], num_particles: int, weighed: bool, bounded: bool
) -> LogLikelihood:
    value, error, ess, khat = found
    if not sampler.pair.has_locals:
        error, khat = torch.zeros_like(error), torch.full_like(khat, -inf)
    result = value.as_subclass(LogLikelihood)
    result.standard_error, result.effective_sample_size, result.pareto_khat = error, ess, khat
    result.num_particles, result.bounded, result.globals = num_particles, bounded, draw.latents
    result.log_weight = draw.log_p + value.sum(1) - draw.log_q if weighed else None
    return result
