import subprocess
import sys

import pytest
import torch
from truths import small_vae

from pyro_vae.checkpoint import load_weights, save_weights


def test_encoding_is_the_same_to_the_bit_in_a_new_process(tmp_path):
    vae = small_vae()
    save_weights(vae, tmp_path / "vae.pt")
    x = torch.bernoulli(torch.full((5, 4, 4), 0.5))
    torch.save((x, vae.encode(x).mean), tmp_path / "truth.pt")
    code = f"""
import sys, torch
sys.path.insert(0, "tests")
from truths import small_vae
from pyro_vae.checkpoint import load_weights
vae = small_vae()
load_weights(vae, {str(tmp_path / "vae.pt")!r})
x, mean = torch.load({str(tmp_path / "truth.pt")!r}, weights_only=True)
assert vae.encode(x).mean.equal(mean)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_load_whole_or_not_at_all(tmp_path):
    save_weights(small_vae(latent=3), tmp_path / "vae.pt")
    vae = small_vae(latent=2)
    before = {name: t.clone() for name, t in vae.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit VAE, which stays as it was \(likelihood.network"):
        load_weights(vae, tmp_path / "vae.pt")
    assert all(t.equal(before[name]) for name, t in vae.state_dict().items())


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    vae = small_vae()
    save_weights(vae, tmp_path / "vae.pt")
    before = (tmp_path / "vae.pt").read_bytes()

    def interrupted(state, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_weights(vae, tmp_path / "vae.pt")
    assert (tmp_path / "vae.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["vae.pt"]


@pytest.mark.parametrize("what", ["junk", "empty", "list", "folder"])
def test_foreign_files_are_refused(tmp_path, what):
    path = tmp_path / "vae.pt"
    if what == "folder":
        path.mkdir()
    elif what == "list":
        torch.save({"weights": [torch.zeros(3)]}, path)
    else:
        path.write_bytes(b"no weights" if what == "junk" else b"")
    with pytest.raises(ValueError, match=r"vae.pt was not written by save_weights.*Try"):
        load_weights(small_vae(), path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"vae.pt: expected a file in a folder, got no folder .*missing. Try to make it"
    ):
        save_weights(small_vae(), tmp_path / "missing" / "vae.pt")
    with pytest.raises(ValueError, match="expected the name of a file, got that of a folder"):
        save_weights(small_vae(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_wrong_order_says_so(tmp_path):
    vae, path = small_vae(), tmp_path / "vae.pt"
    for tool in (save_weights, load_weights):
        name = tool.__name__
        with pytest.raises(TypeError, match=rf"{name}: expected \(module, path\), got \(str, VAE\)\. Try them in"):
            tool(str(path), vae)
        with pytest.raises(TypeError, match=rf"{name}: .*got \(method, PosixPath\)\. Try a VAE, or another module"):
            tool(vae.model, path)
    assert not path.exists()


def test_weights_of_another_dtype_are_not_rounded_silently(tmp_path):
    single, double = small_vae(), small_vae().double()
    save_weights(double, tmp_path / "vae.pt")
    before = {name: t.clone() for name, t in single.state_dict().items()}
    with pytest.raises(ValueError, match=r"float32, got \(.*of float64.*Try to build .* in the dtype, as by module"):
        load_weights(single, tmp_path / "vae.pt")
    assert all(t.equal(before[name]) for name, t in single.state_dict().items())
    again = small_vae().double()
    load_weights(again, tmp_path / "vae.pt")
    assert all(t.equal(again.state_dict()[name]) for name, t in double.state_dict().items())
