"""Bands of ranks against the enumeration of all ranks, and against simulation."""

from itertools import product

import pytest
import torch

from pyro_vae.diagnostics.ecdf_bands import ecdf_bands, uniform_p_values


@pytest.mark.parametrize(("size", "num_draws"), [(4, 3), (1, 1), (1, 4), (6, 2), (5, 4)])
def test_p_values_are_those_of_all_ranks_enumerated(size, num_draws):
    """P(p ≤ a) = a for every value a that p takes."""
    ranks = torch.tensor(list(product(range(num_draws + 1), repeat=size))).T
    p = uniform_p_values(ranks, num_draws)
    for value in p.unique().tolist():
        assert (p <= value * (1 + 1e-9)).double().mean().item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(("size", "num_draws"), [(500, 100), (60, 20), (3, 7)])
def test_ranks_leave_the_bands_where_the_p_value_is_small(size, num_draws):
    ranks = torch.randint(0, num_draws + 1, (size, 400))
    ranks[:, :50] = (ranks[:, :50] * 0.8).long()  # some that are not uniform
    p = uniform_p_values(ranks, num_draws)
    shares = torch.stack([(ranks < i).double().mean(0) for i in range(1, num_draws + 1)])
    for probability in (0.95, 0.5):
        lower, upper = (b.unsqueeze(1) for b in ecdf_bands(size, num_draws, probability))
        outside = ((shares < lower - 1e-9) | (shares > upper + 1e-9)).any(0)
        assert torch.equal(outside, p <= 1 - probability)
    few = (p[50:] <= 0.05).double().sum().item()  # of 350: 17.5 expected at most
    assert few <= 17.5 + 4 * (350 * 0.05 * 0.95) ** 0.5


def test_of_many_p_values_the_large_ones_are_rounded_up():
    ranks = torch.randint(0, 51, (100, 1500))
    ranks[:, 0] = torch.randint(0, 26, (100,))
    together, alone = (
        uniform_p_values(ranks.reshape(100, 15, 100), 50).flatten()[:300],
        uniform_p_values(ranks[:, :300], 50),
    )
    assert alone[0] < 1e-10
    assert (together >= alone * (1 - 1e-6) - 1e-14).all()
    assert (together <= alone * 1.1 + 1e-14).all()
    order = alone.argsort()[:5]
    torch.testing.assert_close(together[order], alone[order], rtol=1e-6, atol=1e-14)


def test_ranks_that_are_missing_do_not_count():
    ranks = torch.randint(0, 21, (50, 2))
    ranks[10:30, 1] = -1
    p = uniform_p_values(torch.cat([ranks, torch.full((50, 1), -1)], 1), 20)
    torch.testing.assert_close(p[0], uniform_p_values(ranks[:, 0], 20))
    torch.testing.assert_close(p[1], uniform_p_values(torch.cat([ranks[:10, 1], ranks[30:, 1]]), 20))
    assert p[2].isnan()


def test_a_probability_that_is_none():
    with pytest.raises(ValueError, match="probability: expected a number between 0 and 1, got 95"):
        ecdf_bands(100, 20, 95)
