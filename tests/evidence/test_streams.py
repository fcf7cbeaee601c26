"""Evidence of data that are not in memory: arrays, memory maps and DataLoaders, against the truth."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from truths import LinearGaussian, exact_log_evidence, exact_vae, linear_vae, linear_vae_log_evidence

from pyro_vae import (
    adaptive_importance_sampling,
    annealed_importance_sampling,
    draw_particles,
    importance_sampling,
    prior_sampling,
    refine,
)

TRUTH = LinearGaussian(2, 4)
X = TRUTH.sample(50)
ESTIMATORS = {
    "importance": (importance_sampling, {"num_particles": 2000}),
    "compiled": (importance_sampling, {"num_particles": 2000, "chunk_size": 500, "compile": "auto"}),
    "prior": (prior_sampling, {"num_particles": 4000}),
    "adaptive": (adaptive_importance_sampling, {"num_particles": 300, "num_steps": 4}),
    "annealed": (annealed_importance_sampling, {"num_particles": 16, "num_temperatures": 20}),
}


class Named(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return {"x": X[i].numpy()}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


def mapped(folder, dtype="float64"):
    x = np.memmap(folder / "x", dtype, "w+", shape=X.shape)
    x[:] = X.numpy()
    x.flush()
    return np.memmap(folder / "x", dtype, "r", shape=X.shape)


KINDS = {
    "array": lambda _: X.double().numpy(),
    "memory map": mapped,
    "loader": lambda _: DataLoader(TensorDataset(X), batch_size=20),
    "dicts": lambda _: DataLoader(Named(), batch_size=20, num_workers=1),
    "stream": lambda _: DataLoader(Stream(), batch_size=20),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_takes_a_loader(name):
    vae = exact_vae(TRUTH, widen=1.2)
    estimate, options = ESTIMATORS[name]
    loader = DataLoader(TensorDataset(X), batch_size=20)
    found = estimate(vae.model, vae.guide, loader, seed=0, progress=False, **options)
    exact = TRUTH.log_evidence(X)
    assert found.log_evidence.shape == (50,)
    trusted = ~found.doubtful if name != "annealed" else torch.ones(50, dtype=torch.bool)  # too few chains for k-hat
    assert trusted.sum() > 25
    assert ((found.log_evidence - exact).abs() < 5 * found.standard_error + 1e-4)[trusted].all()


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_data_in_their_order(tmp_path, kind):
    vae = exact_vae(TRUTH, widen=1.2)
    found = importance_sampling(vae.model, vae.guide, KINDS[kind](tmp_path), num_particles=2000, seed=0)
    exact = TRUTH.log_evidence(X)
    assert ((found.log_evidence - exact).abs() < 5 * found.standard_error).all()
    if kind in ("array", "memory map"):  # the same chunks on the same random numbers
        assert torch.equal(
            found.log_evidence, importance_sampling(vae.model, vae.guide, X, num_particles=2000, seed=0).log_evidence
        )


def test_a_memory_map_is_never_read_as_a_whole(tmp_path):
    """In no pass are there more rows than were asked for, also of integers and beside what all rows share."""
    counts = np.memmap(tmp_path / "n", np.uint8, "w+", shape=(5000, 3))
    counts[:] = np.arange(15_000).reshape(5000, 3) % 7
    sizes, shared = set(), torch.tensor([1.0, 2.0, 3.0])

    def model(counts, scale):
        sizes.add(len(counts))
        assert counts.dtype == torch.uint8
        with pyro.plate("data", len(counts)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("counts", dist.Poisson(rate.unsqueeze(-1) * scale).to_event(1), obs=counts.float())

    def guide(counts, scale):  # the exact posterior
        with pyro.plate("data", len(counts)):
            pyro.sample("rate", dist.Gamma(2.0 + counts.float().sum(-1), 1.0 + scale.sum()))

    found = importance_sampling(model, guide, counts, shared, num_particles=10, chunk_size=1000, compile=False)
    n, s = torch.from_numpy(np.array(counts)).double(), shared.double()
    exact = (n * s.log() - (n + 1).lgamma()).sum(-1) + (2 + n.sum(-1)).lgamma() - (2 + n.sum(-1)) * (1 + s.sum()).log()
    torch.testing.assert_close(found.log_evidence, exact, atol=1e-3, rtol=1e-4)
    assert max(sizes) <= 1000


def test_other_tools_take_arrays_and_memory_maps(tmp_path):
    vae, data = linear_vae(2, 4), mapped(tmp_path, "float32")
    for x in (data, X.numpy()):
        particles = draw_particles(vae.model, vae.guide, x, num_particles=3, seed=0)
        assert torch.equal(
            particles.log_weight, draw_particles(vae.model, vae.guide, X, num_particles=3, seed=0).log_weight
        )
    refined = refine(vae.model, vae.guide, data, seed=0, progress=False)
    found = importance_sampling(vae.model, refined, data, num_particles=500, seed=0)
    assert (found.log_evidence - linear_vae_log_evidence(vae, X)).abs().max() < 0.02


def shuffling():
    return DataLoader(TensorDataset(X), batch_size=20, shuffle=True)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (shuffling, {}, ValueError, "got one that shuffles them.*Try shuffle=False"),
        (lambda: DataLoader(TensorDataset(X[:0])), {}, ValueError, "got one that yields none"),
        (lambda: DataLoader(Stream(), batch_size=20), {"plate": None}, ValueError, "plate=None, which needs all rows"),
        (lambda: DataLoader(["a"]), {}, TypeError, "with at least one tensor of rows"),
    ],
    ids=["shuffled", "empty", "joint", "strings"],
)
def test_loaders_that_give_no_rows_are_refused(args, options, error, message):
    vae = linear_vae(2, 4)
    with pytest.raises(error, match=message):
        importance_sampling(vae.model, vae.guide, args(), num_particles=5, **options)


@pytest.mark.parametrize("compile", [False, True])
def test_a_bad_row_is_counted_in_its_batch(compile, by_operation):
    vae, bad = linear_vae(2, 4), X.clone()
    bad[33, 1] = torch.nan
    loader = DataLoader(TensorDataset(bad), batch_size=20)
    with pytest.raises(ValueError, match="1 of 20 rows are NaN or infinite, the first at row 13") as caught:
        importance_sampling(vae.model, vae.guide, loader, num_particles=5, compile=compile)
    assert caught.value.__notes__ == ["Rows are counted from row 20 of the DataLoader."]


def test_batches_of_a_pair_whose_rows_go_together_have_one_size():
    """A model that says how many rows there are is not run on some of them."""

    def model(x):
        with pyro.plate("data", 10):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 10):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.randn(30)
    found = importance_sampling(model, guide, DataLoader(x, batch_size=10), num_particles=5)
    torch.testing.assert_close(found.log_evidence, exact_log_evidence(x).double(), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"expected batches of 10 rows.*got one of 5"):
        importance_sampling(model, guide, DataLoader(x[:25], batch_size=10), num_particles=5)
