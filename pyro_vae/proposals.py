r"""Proposals for the latents of each data point: the guide, the prior, fitted Gaussians, and mixtures of these.

Draws from a mixture Σ_i a_i q_i are weighed against the whole mixture, w = p(x, u) / Σ_i a_i q_i(u), so that a
component that fits badly costs at most the share of the draws that it got. With fixed counts a_i K from each component
this is the deterministic mixture (Owen & Zhou 2000; Elvira et al. 2019, *Generalized Multiple Importance Sampling*):
E log 1/K Σ w ≤ log p(x), with no more variance than with random counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd, log, pi

import torch
from torch import Tensor

from pyro_vae.densities import LatentDensity

__all__ = ["Gaussians", "Proposal", "from_guide", "from_prior", "mixture_weights"]


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

    def proposal(self) -> Proposal:
        inverse = torch.linalg.inv(self.scale_tril)
        log_det = torch.linalg.slogdet(self.scale_tril).logabsdet

        def log_prob(u: Tensor, _: tuple[Tensor, ...]) -> Tensor:
            noise = torch.einsum("nij,knj->kni", inverse, u - self.loc)
            return -0.5 * noise.square().sum(-1) - 0.5 * u.shape[-1] * log(2 * pi) - log_det

        return Proposal(lambda count: self(torch.randn(count, *self.loc.shape).to(self.loc)), log_prob)

    def __call__(self, noise: Tensor) -> Tensor:
        """loc + scale_tril ε for noise ε, (K, N, D)."""
        return self.loc + torch.einsum("nij,knj->kni", self.scale_tril, noise)


def mixture_weights(
    density: LatentDensity,
    proposals: Sequence[tuple[int, Proposal]],
    exact: Tensor | None = None,
) -> Callable[[int], Tensor]:
    """Log-weights of draws from a mixture.

    Args:
        density: of the latents.
        proposals: (count, q_i): how many of the K draws come from q_i.
        exact: u of an exact draw from the posterior, (1, N, D): it comes first, and the counts of the others are
            random, as the upper bound needs particles that are exchangeable.

    Returns:
        A function: count -> log-weights of as many draws, (count, N), to be called until K are drawn.
    """
    proposals = [(count, q) for count, q in proposals if count]
    total = sum(count for count, _ in proposals)
    bounds = torch.tensor([count for count, _ in proposals]).cumsum(0)
    evaluate = density.log_all if any(q.needs_guide for _, q in proposals) else density.log_joint
    drawn = 0
    given = exact

    def weigh(count: int) -> Tensor:
        nonlocal drawn, given
        if given is not None:
            u, given = given, None
        else:
            # the index of a draw, spread over all K so that each chunk gets its share of every component
            index = torch.arange(drawn, drawn + count) * _coprime(total) % total
            drawn += count
            if exact is not None:
                index = torch.randint(total, (count,))
            counts = torch.bincount(torch.bucketize(index, bounds, right=True), minlength=len(proposals)).tolist()
            u = torch.cat([q.draw(c) for c, (_, q) in zip(counts, proposals, strict=True) if c])
        terms = evaluate(u)
        parts = [q.log_prob(u, terms) + log(c / total) for c, q in proposals]
        return terms[0] + terms[1] - torch.stack(parts).logsumexp(0)

    return weigh


def _coprime(n: int) -> int:
    """A number near the golden section of n without a factor in common: its multiples visit all of 0 … n − 1."""
    k = max(1, round(n * 0.618))
    while gcd(k, n) != 1:
        k += 1
    return k
