"""What is in the files, which other programs read too."""

import copy
import errno
import io
import json
import os
import traceback
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn
from truths import small_vae

from pyro_vae.checkpoint import load_weights, read, save_weights, write
from pyro_vae.checkpoint.container import pack, unpack


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


class Tied(nn.Module):
    """One tensor under two names, one of half precision, scalars, an empty one, a view of a larger one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("short", torch.randn(4).bfloat16())
        self.register_buffer("count", torch.tensor(int(torch.randint(100, ()))))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("turned", torch.randn(2, 3).T)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("build", [small_vae, Tied])
def test_both_bring_back_every_bit(tmp_path, name, build):
    first, second = build(), build()
    assert not same(first, second)
    save_weights(first, tmp_path / name)
    load_weights(second, tmp_path / name)
    assert same(first, second)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_weights_of_their_own_are_not_tied(tmp_path, name):
    """Whichever of two matrices the one tensor took, it would be wrong for the other layer."""
    first, second = Tied(), Tied()
    first.second.weight = nn.Parameter(torch.randn(3, 3))
    save_weights(first, tmp_path / name)
    before = copy.deepcopy(second)
    with pytest.raises(ValueError, match=r"first.weight and second.weight: expected equal values, as they are one"):
        load_weights(second, tmp_path / name)
    assert same(before, second)


class Versioned(nn.Linear):
    """Its first version kept the bias with the other sign."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *args):
        if metadata.get("version") != 2:
            state[prefix + "bias"] = -state[prefix + "bias"]
        super()._load_from_state_dict(state, prefix, metadata, *args)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_modules_know_by_their_version_what_they_wrote(tmp_path, name):
    first, second = nn.Sequential(Versioned(2, 2)), nn.Sequential(Versioned(2, 2))
    save_weights(first, tmp_path / name)
    load_weights(second, tmp_path / name)
    assert same(first, second)


def test_other_programs_read_them(tmp_path):
    vae = small_vae()
    save_weights(vae, tmp_path / "w.pt")
    save_weights(vae, tmp_path / "w.safetensors")
    for found in (
        torch.load(tmp_path / "w.pt", weights_only=True),
        torch.load(tmp_path / "w.pt", weights_only=True, mmap=True),
        safetensors.torch.load_file(tmp_path / "w.safetensors"),
    ):
        assert all(t.equal(found[name]) for name, t in vae.state_dict().items())
    with zipfile.ZipFile(tmp_path / "w.pt") as archive:
        about = json.loads(archive.read("archive/pyro_vae.json"))
    assert about["kind"] == "weights"
    assert about["tensors"] == {
        n: f"{tuple(t.shape)} of {t.dtype}".replace("torch.", "") for n, t in vae.state_dict().items()
    }


def test_safetensors_from_elsewhere_need_no_checksum(tmp_path):
    first, second = small_vae(), small_vae()
    safetensors.torch.save_file(first.state_dict(), tmp_path / "w.safetensors")
    load_weights(second, tmp_path / "w.safetensors")
    assert same(first, second)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_tensors_of_other_layouts_are_refused_or_come_back(tmp_path, name):
    """Nothing of a module is loaded before one of its tensors turns out not to fit."""

    def build(sparse):
        module = nn.Linear(2, 2)
        module.register_buffer("graph", torch.randn(3, 3).to_sparse() if sparse else torch.randn(3, 3))
        return module

    sparse, dense = build(True), build(False)
    if name == "w.safetensors":
        with pytest.raises(
            TypeError, match=r"expected dense tensors, got another: graph is \(3, 3\) of float32, sparse"
        ):
            save_weights(sparse, tmp_path / name)
        return
    save_weights(sparse, tmp_path / name)
    again = build(True)
    load_weights(again, tmp_path / name)
    assert torch.equal(again.graph.to_dense(), sparse.graph.to_dense())
    before = [t.clone() for t in dense.state_dict().values()]
    with pytest.raises(ValueError, match=r"graph: expected \(3, 3\) of float32, got \(3, 3\) of float32, sparse_coo"):
        load_weights(dense, tmp_path / name)
    assert all(map(torch.equal, before, dense.state_dict().values()))


def test_tensors_without_values_are_refused(tmp_path):
    save_weights(nn.Linear(2, 2), tmp_path / "w.pt")
    for module in (nn.Linear(2, 2, device="meta"), nn.LazyLinear(2)):
        for tool in (save_weights, load_weights):
            with pytest.raises(ValueError, match="expected tensors with values, got weight; bias without"):
                tool(module, tmp_path / "w.pt")


def test_a_module_that_fails_halfway_stays_as_it_was(tmp_path):
    class Picky(nn.Linear):
        def _load_from_state_dict(self, *args):
            super()._load_from_state_dict(*args)
            if self.weight.sum() != self.expected:
                raise RuntimeError("not this one")

    module = Picky(2, 2)
    module.expected = module.weight.sum().item()
    before = [t.clone() for t in module.state_dict().values()]
    save_weights(nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="cannot be loaded into Picky, which stays as it was: not this one"):
        load_weights(module, tmp_path / "w.pt")
    assert all(map(torch.equal, before, module.state_dict().values()))


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ({"a": {"b": [1, object()]}}, "a/b/1: expected tensors, numbers, .*got object"),
        ({"a": torch.zeros(2, device="meta")}, "a: expected .*got a tensor without values"),
        ({"a": {(1, 2): 3}}, "a: expected names or numbers as keys"),
        ({"a": torch.zeros(2).numpy()}, "a: .*got ndarray"),
    ],
)
def test_what_is_not_plain_is_not_written(tmp_path, state, what):
    with pytest.raises(TypeError, match=what):
        write(state, tmp_path / "s.pt")
    assert list(tmp_path.iterdir()) == []


def test_another_version_and_another_kind_say_so(tmp_path):
    write({"a": 1}, tmp_path / "s.pt")
    assert read(tmp_path / "s.pt") == {"a": 1}
    with pytest.raises(ValueError, match=r"s.pt was not written by fit\(checkpoint=…\), but by save_weights"):
        read(tmp_path / "s.pt", "fit")
    data = pack({"a": 1}, "fit")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert json.loads(archive.read("archive/pyro_vae.json"))["version"] == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_vae.checkpoint.container.VERSION", 2)
        with pytest.raises(ValueError, match="has format 1, this version of pyro_vae reads format 2"):
            unpack(data, "s.pt", "fit")


@pytest.mark.parametrize("name", ["f.pt", "f.safetensors"])
def test_a_write_that_fails_leaves_no_view_in_its_traceback(tmp_path, monkeypatch, name):
    """The garbage collection of a buffer, together with a view of it, crashes some interpreters: 3.12.1 for one."""

    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="cannot be written") as caught:
        save_weights(nn.Linear(2, 2), tmp_path / name)
    frames, error = [], caught.value
    while error is not None:
        frames += [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
        error = error.__cause__ or error.__context__
    views = [x for local in frames for x in local.values() if isinstance(x, memoryview)]
    assert views  # of what is written, or this test sees nothing
    assert {type(view.obj) for view in views} == {bytes}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says that they will go
def test_quantized_tensors_come_back(tmp_path):
    def build():
        module = nn.Linear(2, 2)
        module.register_buffer("short", torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8))
        return module

    first, second = build(), build()
    save_weights(first, tmp_path / "w.pt")
    load_weights(second, tmp_path / "w.pt")
    assert torch.equal(first.short.int_repr(), second.short.int_repr())
