"""Rows found again by their values."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.evidence.own_rows import OwnRows
from pyro_vae.pairs.pair import Pair


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([len(x), x.shape[-1]]).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros((), dtype=x.dtype)), 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_zeros_and_ones_are_told_apart(dtype):
    """Whose bits differ in few places, and the highest ones."""
    x = torch.bernoulli(torch.full((20000, 30), 0.5)).to(dtype)
    rows = OwnRows(Pair(model, guide, (x,)).rows, "test")
    order = torch.randperm(len(x))
    found = rows.find((x[order],), {})
    assert torch.equal(x[found], x[order])
    assert len(found.unique()) == len(x.unique(dim=0))
