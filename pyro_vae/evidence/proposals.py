r"""Proposals for the latents of each data point: the guide, the prior, fitted Gaussians, and mixtures of these.

Draws from a mixture Σ_i a_i q_i are weighed against the whole mixture, w = p(x, u) / Σ_i a_i q_i(u), so that a
component that fits badly costs at most the share of the draws that it got. With fixed counts a_i K from each component
this is the deterministic mixture (Owen & Zhou 2000; Elvira et al. 2019, *Generalized Multiple Importance Sampling*):
E log 1/K Σ w ≤ log p(x), with no more variance than with random counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd, inf, log, pi

import torch
from torch import Tensor

from pyro_vae.evidence.density import LatentDensity

__all__ = [
    "Gaussians",
    "Proposal",
    "defined",
    "from_guide",
    "from_prior",
    "mixture_draws",
    "mixture_weights",
    "shares",
    "spread",
]


@dataclass(frozen=True)
class Proposal:
    """draw: K -> u, (K, N, D); log_prob: u and the terms of `LatentDensity` there -> (K, N)."""

    draw: Callable[[int], Tensor]
    log_prob: Callable[[Tensor, tuple[Tensor, ...]], Tensor]
    needs_guide: bool = False


def from_guide(density: LatentDensity) -> Proposal:
    """q(u|x)."""
    return Proposal(density.draw, lambda _, terms: terms[2], needs_guide=True)


def from_prior(density: LatentDensity) -> Proposal:
    """p(u)."""
    return Proposal(density.draw_prior, lambda _, terms: terms[0])


@dataclass(frozen=True)
class Gaussians:
    """N(loc, scale_tril scale_trilᵀ) for each data point: loc (N, D), scale_tril (N, D, D), any square root."""

    loc: Tensor
    scale_tril: Tensor

    @classmethod
    def around(cls, draws: Tensor) -> Gaussians:
        """With the moments of draws (K, N, D) that are defined; N(0, I) where fewer than two of them are."""
        known = draws.isfinite()
        count = known.sum(0)
        mean = draws.where(known, 0).sum(0) / count
        std = ((draws - mean).where(known, 0).square().sum(0) / (count - 1)).sqrt()
        mean, std = mean.where(count > 1, 0), std.where(count > 1, 1)
        return cls(mean, torch.diag_embed(std + torch.finfo(draws.dtype).tiny))

    def proposal(self) -> Proposal:
        inverse = torch.linalg.inv(self.scale_tril)
        log_det = torch.linalg.slogdet(self.scale_tril).logabsdet

        def log_prob(u: Tensor, _: tuple[Tensor, ...]) -> Tensor:
            noise = torch.einsum("nij,knj->kni", inverse, u - self.loc)
            return -0.5 * noise.square().sum(-1) - 0.5 * u.shape[-1] * log(2 * pi) - log_det

        return Proposal(lambda count: self(self.noise(count)), log_prob)

    def noise(self, num_particles: int) -> Tensor:
        """ε ~ N(0, I), (K, N, D)."""
        return torch.randn(num_particles, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)

    def __call__(self, noise: Tensor) -> Tensor:
        """loc + scale_tril ε for noise ε, (K, N, D)."""
        return self.loc + torch.einsum("nij,knj->kni", self.scale_tril, noise)


def shares(density: LatentDensity, proposals: Sequence[Proposal], *, num_draws: int, least: float) -> Tensor:
    """Shares a_i of a mixture for each data point, (len(proposals), N), that bring it nearest to the posterior.

    Maximises E_posterior log Σ_i a_i q_i by expectation maximisation over `num_draws` weighted draws from each (Cappé,
    Douc, Guillin, Marin & Robert 2008, *Adaptive importance sampling in general mixture classes*, section 3), and gives
    each at least the share `least`.
    """
    u = torch.cat([q.draw(num_draws) for q in proposals])
    u, outside = defined(u)
    terms = _evaluate(density, proposals, u)
    log_q = torch.stack([q.log_prob(u, terms) for q in proposals])  # (J, K, N)
    weight = (terms[0] + terms[1] - log_q.logsumexp(0)).masked_fill(outside, -inf).softmax(0)
    result = torch.full_like(log_q[:, 0], 1 / len(proposals))
    for _ in range(20):
        result = (weight * (log_q + result.log().unsqueeze(1)).softmax(0)).sum(1)
    result = torch.where(result.isfinite().all(0), result, 1 / len(proposals))
    return least + (1 - len(proposals) * least) * result


def mixture_weights(
    density: LatentDensity, proposals: Sequence[Proposal], counts: Tensor, exact: Tensor | None = None
) -> Callable[[int], Tensor]:
    """Log-weights of draws from a mixture, as `mixture_draws` without the draws."""
    draw = mixture_draws(density, proposals, counts, exact)
    return lambda count: draw(count)[0]


def mixture_draws(
    density: LatentDensity,
    proposals: Sequence[Proposal],
    counts: Tensor,
    exact: Tensor | None = None,
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Draws from a mixture, weighed against it.

    Args:
        density: of the latents.
        proposals: q_i.
        counts: how many of the K draws come from each q_i, (len(proposals), N), int64; a column sums to K.
        exact: u of an exact draw from the posterior, (1, N, D): it comes first, and the counts of the others are
            random, as the upper bound needs particles that are exchangeable.

    Returns:
        A function: count -> log-weights (count, N) and u (count, N, D) of as many draws, to be called until K are
        drawn.
    """
    used = [i for i, row in enumerate(counts.tolist()) if any(row)]
    proposals, counts = [proposals[i] for i in used], counts[used]
    total = int(counts[:, 0].sum())
    log_share, bounds = (counts / total).log(), counts.cumsum(0)
    drawn, given = 0, exact

    def draw(count: int) -> tuple[Tensor, Tensor]:
        nonlocal drawn, given
        if given is not None:
            u, given = given, None
        else:
            # the index of a draw, spread over all K so that each chunk gets its share of every component
            index = (torch.arange(drawn, drawn + count, device=counts.device) * spread(total) % total).unsqueeze(-1)
            drawn += count
            if exact is not None:  # each point by itself: a chance shared by all would not average out over them
                index = torch.randint(total, (count, counts.shape[1]), device=counts.device)
            label = (index.unsqueeze(-1) >= bounds.T).sum(-1)  # (count, N)
            u = proposals[0].draw(count)
            for i, q in enumerate(proposals[1:], 1):
                u = torch.where((label == i).unsqueeze(-1), q.draw(count), u)
        u, outside = defined(u)
        terms = _evaluate(density, proposals, u)
        log_q = torch.stack([q.log_prob(u, terms) for q in proposals])
        log_weight = terms[0] + terms[1] - (log_q + log_share.unsqueeze(1)).logsumexp(0)
        return log_weight.masked_fill(outside, -inf), u

    return draw


def defined(u: Tensor) -> tuple[Tensor, Tensor]:
    """Draws with zeros in place of those that are outside of the prior's support, and which these are, (K, N)."""
    outside = u.isnan().any(-1)
    return u.masked_fill(outside.unsqueeze(-1), 0.0), outside


def _evaluate(density: LatentDensity, proposals: Sequence[Proposal], u: Tensor) -> tuple[Tensor, ...]:
    return density.log_all(u) if any(q.needs_guide for q in proposals) else density.log_joint(u)


def spread(n: int) -> int:
    """A number near the golden section of n without a factor in common: its multiples mod n visit all of 0 … n − 1."""
    k = max(1, round(n * 0.618))
    while gcd(k, n) != 1:
        k += 1
    return k
