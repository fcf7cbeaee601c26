"""Data larger than memory, and DataLoaders of all kinds: the steps of a tensor, and never all rows at once."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from truths import LinearGaussian, linear_vae

from pyro_vae import fit
from pyro_vae.pairs import arrays
from pyro_vae.training.data import Batches

X = LinearGaussian(2, 4).sample(50)


def losses(data, **options):
    torch.manual_seed(1)
    vae = linear_vae(2, 4)
    return fit(vae.model, vae.guide, data, **{"num_epochs": 3, "batch_size": 20, "seed": 0} | options).loss


class Stream(IterableDataset):
    """The rows of X without a length, each time it is read, or only a few times."""

    def __init__(self, times=1000):
        self.times = times

    def __iter__(self):
        self.times -= 1
        return iter(X if self.times >= 0 else ())


class Dicts(Dataset):
    """Rows by name, as NumPy arrays."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return {"x": X[i].numpy()}


def numpy_rows(rows):
    return np.stack([row.numpy() for row in rows])


def in_order(batch_size):
    return losses(DataLoader(TensorDataset(X), batch_size=batch_size))


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(Stream(), batch_size=20),
        lambda: DataLoader(Dicts(), batch_size=20),
        lambda: DataLoader(X, batch_size=20, collate_fn=numpy_rows),
        lambda: DataLoader(list(X.split(20)), batch_size=None),
        lambda: DataLoader(X, batch_sampler=[list(r) for r in torch.arange(50).split(20)]),
        lambda: DataLoader(TensorDataset(X), batch_size=20, num_workers=2),
    ],
    ids=["stream", "dicts", "numpy", "batches", "batch sampler", "workers"],
)
def test_loaders_of_the_same_batches_give_the_same_losses(loader):
    assert losses(loader()) == pytest.approx(in_order(20), rel=0.05)  # the draws of z are others


class Twice(IterableDataset):
    """A generator, which is used up."""

    def __init__(self):
        self.rows = iter(X)

    def __iter__(self):
        return self.rows


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: {"data": DataLoader(Stream(0), batch_size=20)}, "data: expected a DataLoader that yields batches"),
        (lambda: {"data": DataLoader(Stream(3), batch_size=20)}, "data: .* got one that yields none"),
        (lambda: {"data": DataLoader(TensorDataset(X[:0]))}, "data: .* got one that yields none"),
        (lambda: {"data": X, "validation_data": DataLoader(Stream(0))}, "validation_data: .* yields none"),
        (lambda: {"data": DataLoader(Twice())}, "read again, got an IterableDataset whose __iter__ returns the same"),
    ],
    ids=["empty", "dry", "no rows", "validation", "used up"],
)
def test_loaders_that_yield_nothing_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        losses(**data())


@pytest.mark.parametrize("size", [7, 50, 200])
def test_a_full_batch_is_as_large_as_those_of_the_loader(size):
    """Code is generated for it, whatever `batch_size` says, also where there are fewer rows than were asked for."""
    batches = Batches(DataLoader(X, batch_size=size), 128)
    assert batches.first().size == batches.full_size == min(size, 50)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f8", "f2"])
def test_memory_maps_of_any_floats_are_as_tensors(tmp_path, dtype):
    mapped = np.memmap(tmp_path / "x", dtype, "w+", shape=X.shape)
    mapped[:] = X.numpy()
    read = np.memmap(tmp_path / "x", dtype, "r", shape=X.shape)
    expected = losses(X)
    for data in (mapped, read, read[:], np.asarray(read), {"x": read}):
        assert arrays.is_on_disk(Batches(data, 8).columns[0])
        assert losses(data) == pytest.approx(expected, rel=1e-2 if dtype == "f2" else 1e-5)


def test_integers_reach_the_model_as_they_are_and_batch_by_batch(tmp_path):
    images = np.memmap(tmp_path / "x", np.uint8, "w+", shape=(50, 4))
    images[:] = np.arange(200).reshape(50, 4)
    torch.manual_seed(1)
    vae, seen = linear_vae(2, 4), set()

    def scaled(function):
        def run(x):
            seen.add((len(x), x.dtype))
            return function(x.float() / 255)

        return run

    result = fit(scaled(vae.model), scaled(vae.guide), images, num_epochs=2, batch_size=20, seed=0, compile=False)
    assert {dtype for _, dtype in seen} == {torch.uint8}
    assert max(size for size, _ in seen) == 20
    torch.manual_seed(1)
    other = linear_vae(2, 4)
    assert result.loss == fit(
        other.model, other.guide, torch.from_numpy(images).float() / 255, num_epochs=2, batch_size=20, seed=0,
        compile=False,
    ).loss  # fmt: skip
    for data in (images, torch.from_numpy(images)):
        with pytest.raises(TypeError) as caught:
            losses(data)
        assert "uint8, which reaches model and guide as it is" in caught.value.__notes__[0]


def test_rows_are_checked_in_slices_of_bounded_size():
    wide = torch.zeros(11, 2**20)
    sizes = [s.stop - s.start for s in arrays.slices([wide, torch.zeros(11)], 3 * 2**22 + 100)]
    assert sizes == [3, 3, 3, 2]
    assert [s.stop for s in arrays.slices([torch.zeros(5, 100)], 1)] == [1, 2, 3, 4, 5]
    narrow = torch.zeros(20_000, 3)
    narrow[19_999, 1] = torch.nan
    with pytest.raises(ValueError, match="1 of 20000 rows are NaN or infinite, the first at row 19999"):
        Batches(narrow, 8).check()


LIMITED = """
    import re, resource, sys
    import numpy as np, pyro, pyro.distributions as dist, torch
    from pyro_vae import fit, importance_sampling

    torch.set_num_threads(1)
    net = torch.nn.Linear(1, 1)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = net(z.unsqueeze(-1)).expand(*z.shape, x.shape[-1])
            pyro.sample("x", dist.Normal(loc, 30.0).to_event(1), obs=x.float())

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.float().mean(-1), 1.0))

    def work(x):
        fit(model, guide, x, num_epochs=1, batch_size=8, progress=False)
        path = f"{sys.argv[1]}.{x.dtype}.pt"
        found = importance_sampling(model, guide, x, num_particles=2, progress=False, checkpoint=path)
        assert len(found.log_evidence) == len(x)

    work(np.zeros((20, 3), np.float32))
    used = int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[2]),) * 2)
    for dtype in ("float32", "uint8"):
        work(np.memmap(sys.argv[1], dtype, "r").reshape(-1, 96_000)[:400])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts mappings on Linux")
def test_wide_rows_train_and_are_evaluated_in_bounded_memory(tmp_path):
    """150 MB on disk, of which a slice of 8192 rows, or all of them as floats, would not fit into what there is."""
    with (tmp_path / "x").open("wb") as file:
        for i in range(400):
            file.write(np.full(96_000, i % 7, np.float32).tobytes())
    limit = 100 * 2**20  # of which 60 are needed
    assert (tmp_path / "x").stat().st_size > 1.4 * limit
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(tmp_path / "x"), str(limit)]
    # glibc gives back what was freed, instead of keeping it in pieces that happen to be of no use, more in some runs
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
