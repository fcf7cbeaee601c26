r"""Draws of globals θ and locals z together, with the weights that make them posterior draws and joint evidence.

Data points are independent given the globals, so that the joint evidence needs no weight of all latents at once, which
would have no chance in many dimensions. Each particle is a draw θ_k, weighed by an unbiased estimate of p(x|θ_k),

    W_k = p(θ_k) Π_n [1/L Σ_l p(x_n, z_nkl|θ_k) / q(z_nkl|θ_k)] / q(θ_k),     E W_k = p(x);

and with z_nk chosen among the z_nkl by their weights, (θ_k, z_k) with weight W_k is a draw from p(θ, z|x) as K grows,
whatever L is (Andrieu, Doucet & Holenstein 2010, *Particle Markov chain Monte Carlo methods*, section 4). L is the
number that keeps the variance of Σ_n at about `NOISE`.

The proposals are the marginal and conditional of a fitted Gaussian (`pyro_vae.evidence.arrow`), with a share of draws
from the prior.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil, inf

import torch
from torch import Tensor

from pyro_vae.evidence.arrow import fit_arrow, good_width
from pyro_vae.evidence.joint import JointDensity
from pyro_vae.evidence.local_weights import PRIOR_SHARE, ArrowWeights
from pyro_vae.evidence.proposals import spread
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.sites import is_inside, sample_sites
from pyro_vae.particles.sampler import ParticleSampler

__all__ = ["JointDraws", "data_plate"]

NOISE = 0.3  # variance of log p̂(x|θ) over the draws of locals
PILOT = 32  # draws of globals, and of locals for each, that its variance is estimated from
CHEAP = 256  # locals of all points of a particle
MOST_LOCALS = 64  # L, at most
FEW_LOCALS = 8  # with less of them, none comes from the prior


class JointDraws:
    """Weighed draws of the globals and locals of a pair.

    Args:
        density: of the pair.
        num_steps: of the fit.

    Attributes:
        num_locals: L.
    """

    def __init__(self, density: JointDensity, num_steps: int = 8) -> None:
        self.density = density
        arrow = fit_arrow(density, num_steps=num_steps)
        # a weight is made of all locals, with the noise of each divided by L
        width = good_width(max(density.dim, density.dim * density.num_points // 16))
        self.arrow = arrow.widened(good_width(density.global_dim), width)
        self.num_locals = self._enough_locals() if density.dim else 1

    @classmethod
    def of(cls, sampler: ParticleSampler, num_steps: int = 8) -> JointDraws | None:
        """Of a pair all of whose data are one point, if there is a plate that helps; None if there is none."""
        plate = data_plate(sampler.pair)
        if plate is None:
            return None
        pair, options = sampler.pair, {"parallel": not sampler.serial, "outside": True}
        try:
            inner = ParticleSampler(pair.model, pair.guide, pair.args, pair.kwargs, plate=plate, **options)
            density = JointDensity(inner)
        except ValueError:  # its rows are not independent, or one of its latents is masked
            return None
        return cls(density, num_steps)

    def _enough_locals(self) -> int:
        """L from the variance at most draws of the globals; where locals are few, more of them cost little."""
        points = self.density.num_points
        weights = ArrowWeights(self.density, self.arrow, self.arrow.draw_globals(PILOT), prior_share=0.0)
        count = max(2, min(PILOT, self.density.sampler.cells // points))
        at_once = max(1, self.density.sampler.cells // (points * count))
        parts = [slice(i, min(i + at_once, PILOT)) for i in range(0, PILOT, at_once)]
        variance = torch.cat([weights.draws(part, count)(count).log_weight.var(1).sum(1) for part in parts])
        enough = variance.nan_to_num(inf).quantile(0.9).item() / NOISE
        return max(min(MOST_LOCALS, CHEAP // points), ceil(min(enough, MOST_LOCALS)), 1)

    def log_weights(self, num_particles: int) -> Callable[[int], Tensor]:
        """A function: count -> log W of as many new particles, (count, 1), to be called until K are drawn."""
        draw = self.draws(num_particles)
        return lambda count: torch.cat([log_weight for log_weight, _, _ in draw(count)]).unsqueeze(1)

    def draws(self, num_particles: int) -> Callable[[int], Iterator[tuple[Tensor, Tensor, Tensor]]]:
        """A function: count -> parts of as many new particles: log W (k,), g (k, G), u (k, N, D)."""
        density, size = self.density, self.density.num_points * self.num_locals
        at_once = max(1, density.sampler.cells // size)
        num_prior = round(PRIOR_SHARE * num_particles) if density.global_dim else 0
        shares = torch.tensor([num_particles - num_prior, num_prior], dtype=torch.double, device=self.arrow.loc.device)
        log_shares, drawn = (shares / num_particles).log(), 0

        def draw(count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            nonlocal drawn
            for start in range(0, count, at_once):
                part = min(at_once, count - start)
                index = torch.arange(drawn, drawn + part, device=log_shares.device) * spread(num_particles)
                drawn += part
                g = self.arrow.draw_globals(part)
                from_prior = index % num_particles >= num_particles - num_prior
                if from_prior.any():
                    g = torch.where(from_prior.unsqueeze(1), density.draw_prior(part), g)
                share = PRIOR_SHARE if self.num_locals >= FEW_LOCALS else 0.0
                found = ArrowWeights(density, self.arrow, g, prior_share=share).draws(slice(0, part), self.num_locals)
                weighed = found(self.num_locals)
                log_q = torch.stack([self.arrow.log_prob_globals(g), weighed.log_prior]).double()
                log_q = (log_q + log_shares.unsqueeze(1)).logsumexp(0)
                log_local = weighed.log_weight.logsumexp(1) - torch.tensor(float(self.num_locals)).log()
                total = weighed.log_prior + weighed.log_outside + log_local.sum(1) - log_q
                yield total.nan_to_num(-inf, posinf=inf, neginf=-inf), g, _chosen(weighed.log_weight, weighed.u)

        return draw


def _chosen(log_weight: Tensor, u: Tensor) -> Tensor:
    """One of the L particles of each point, by weight: (k, N, D) of (k, L, N, D)."""
    noise = -torch.empty_like(log_weight).exponential_().log()  # Gumbel: its maximum is a draw
    best = (log_weight.nan_to_num(-inf) + noise).argmax(1, keepdim=True)
    return u.gather(1, best.unsqueeze(-1).expand(-1, -1, -1, u.shape[-1]))[:, 0]


def data_plate(pair: Pair) -> str | None:
    """The plate in which all observed sites are and that leaves the smallest blocks of latents; None: no plate helps.

    A block is what is outside of the plate, with what is inside at one data point.
    """
    look = pair.look
    sites = sample_sites(look.model)
    stacks = [{f.name for f in s["cond_indep_stack"] if f.dim is not None} for s in sites.values() if s["is_observed"]]
    latents = {n: s for n, s in sites.items() if not s["is_observed"] and n not in pair.summed | pair.enumerated}
    sizes = {None: sum(s["value"].numel() for s in latents.values())}
    for plate in set.intersection(*stacks) if stacks else set():
        frame = look.frame(plate)
        if frame.full_size != frame.size or any(
            not is_inside(sites[n], plate) for n in pair.summed | pair.enumerated if n in sites
        ):
            continue
        inside = sum(s["value"].numel() for s in latents.values() if is_inside(s, plate))
        sizes[plate] = sizes[None] - inside + inside // max(1, look.size(plate))
    return min(sizes, key=lambda plate: sizes[plate])
