r"""Simultaneous bands for the empirical distribution of ranks, and the p-value that belongs to them, both exact.

Of S ranks that are uniform on 0..L, the number R_i that are below i is binomial with S trials and probability
i/(L + 1), for each i = 1..L. Where it lies in the tails says

    γ_i = 2 min{P(R ≤ R_i), P(R ≥ R_i)},        γ = min_i γ_i,

and bands of the level γ' are, for each i, the counts with γ_i > γ'. They hold all R_i at once with a probability that
follows from a recursion over i: R_1, …, R_L are the sums of a multinomial, whose bins are independent Poisson numbers
given that they sum to S. So nothing is simulated: the p-value is P(γ ≤ the observed γ) for uniform ranks, and is at
most 5 % exactly where the ranks leave the bands of 95 %. As ranks are whole numbers, it is at most α with a probability
of at most α.

Source: Säilynoja, Bürkner & Vehtari (2022), *Graphical test for discrete uniformity and its applications in
goodness-of-fit evaluation and multiple sample comparison*, Statistics and Computing 32:32, section 2.
"""

from __future__ import annotations

from functools import cache, lru_cache
from math import inf, log

import torch
from torch import Tensor

__all__ = ["ecdf_bands", "uniform_p_values"]

NEGLIGIBLE = 1e-14  # level of bands beyond which the recursion does not look
MOST_LEVELS = 400  # of which p-values are computed; others get that of the next larger level, which is larger
AT_ONCE = 200


def ecdf_bands(num_simulations: int, num_draws: int, probability: float = 0.95) -> tuple[Tensor, Tensor]:
    """The band that holds the empirical distribution of uniform ranks everywhere at once.

    Args:
        num_simulations: S ranks.
        num_draws: L, the largest rank.
        probability: with which the whole of it is inside, at least.

    Returns:
        Lowest and highest share of ranks below i = 1..L inside of the band, each (L,); i/(L + 1) is expected.

    Raises:
        ValueError: a probability outside of (0, 1).

    Example:
        >>> lower, upper = ecdf_bands(500, 99)
        >>> [round(x[49].item(), 2) for x in (lower, upper)]  # 0.5 ± 0.044 at this point alone
        [0.43, 0.57]
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability: expected a number between 0 and 1, got {probability}. Try 0.95.")
    tails = _tails(num_simulations, num_draws)
    levels = tails[tails <= 2 * (1 - probability)].unique()  # p is at least γ/2
    low, high = -1, len(levels) - 1  # the largest level whose p-value is at most 1 − probability
    while low < high:
        between = torch.linspace(low + 1, high, min(high - low, 12)).round().long().unique()
        small = int((_exit_probability(tails, levels[between]) <= 1 - probability).sum())
        low, high = (
            between[small - 1].item() if small else low,
            between[small].item() - 1 if small < len(between) else high,
        )
    inside = tails > (levels[low].item() * (1 + 1e-9) if low >= 0 else -1.0)
    counts = torch.arange(num_simulations + 1, dtype=torch.double)
    lower = torch.where(inside, counts, inf).min(1).values
    upper = torch.where(inside, counts, -inf).max(1).values
    return lower / num_simulations, upper / num_simulations


def uniform_p_values(ranks: Tensor, num_draws: int) -> Tensor:
    """P-values of the hypothesis that ranks are uniform on 0..L.

    Args:
        ranks: (S, …), independent along the first dimension; −1 where there is none.
        num_draws: L.

    Returns:
        (…), double; NaN where there are no ranks. Of more than 400 different ones all but the smallest are rounded up.
    """
    columns = ranks.reshape(len(ranks), -1).cpu()
    result = torch.full(columns.shape[1:], torch.nan, dtype=torch.double)
    sizes = (columns >= 0).sum(0)
    for size in sizes.unique().tolist():
        if size:
            here = sizes == size
            result[here] = _p_values(columns[:, here], size, num_draws)
    return result.reshape(ranks.shape[1:])


def _p_values(ranks: Tensor, size: int, num_draws: int) -> Tensor:
    """P-values of columns (S, M) that have `size` ranks each."""
    tails = _tails(size, num_draws)
    histogram = torch.stack([torch.bincount(c[c >= 0], minlength=num_draws + 1) for c in ranks.T.long()], 1)
    below = histogram.cumsum(0)[:-1]  # (L, M)
    level, index = tails.gather(1, below).min(0).values.unique(return_inverse=True)
    known = torch.arange(len(level))
    if len(level) > MOST_LEVELS:  # all of the smallest ones
        half = MOST_LEVELS // 2
        known = torch.cat([known[:half], torch.linspace(half, len(level) - 1, half).long()]).unique()
    found = torch.cat([_exit_probability(tails, part) for part in level[known].split(AT_ONCE)])
    return found[torch.searchsorted(level[known], level)][index]


@lru_cache(maxsize=8)
def _tails(size: int, num_draws: int) -> Tensor:
    """γ_i of every count, (L, S + 1)."""
    probability = torch.arange(1, num_draws + 1, dtype=torch.double).unsqueeze(1) / (num_draws + 1)
    counts = torch.arange(size + 1, dtype=torch.double)
    binomial = torch.distributions.Binomial(size, probability, validate_args=False)
    mass = binomial.log_prob(counts).exp()
    below, above = mass.cumsum(1), mass.flip(1).cumsum(1).flip(1)
    return (2 * torch.minimum(below, above)).clamp(max=1.0)


def _exit_probability(tails: Tensor, level: Tensor) -> Tensor:
    """P(γ ≤ level) of uniform ranks for each level, (B,)."""
    steps, size = len(tails), tails.shape[1] - 1
    counts = torch.arange(size + 1)
    bound = level.unsqueeze(1) * (1 + 1e-9)  # equal levels of two counts differ by rounding
    seen = tails > max(NEGLIGIBLE, bound.min().item())
    first, last = torch.where(seen, counts, size).min(1).values.tolist(), torch.where(seen, counts, 0).max(1).values
    width = max(1, *(b - a + 1 for a, b in zip(first, last.tolist(), strict=True)))
    rate = size / (steps + 1)
    mass = (counts.double() * log(rate) - rate - (counts + 1).double().lgamma()).exp()  # Poisson
    offsets = torch.arange(width)

    def poisson(count: Tensor) -> Tensor:
        return torch.where((count >= 0) & (count <= size), mass[count.clamp(0, size)], 0.0)

    @cache
    def jumps(moved: int) -> Tensor:
        """From each count of a window to each of the next one, whose first is larger by this much."""
        return poisson(offsets - offsets.unsqueeze(1) + moved)

    state, start = (offsets == 0).double().expand(len(level), -1), 0
    for i in range(steps):
        state = state @ jumps(first[i] - start)
        start = first[i]
        here = tails[i, (start + offsets).clamp(max=size)]
        state = torch.where((here > bound) & (start + offsets <= size), state, 0.0)
    inside = (state * poisson(size - start - offsets)).sum(1)
    total = size * log(size) - size - torch.tensor(size + 1.0, dtype=torch.double).lgamma()
    return torch.maximum(1 - inside / total.exp(), level / 2)  # the observed tail alone has level / 2
