"""fit: Ctrl-C ends it with what there is, and its file can be gone on from."""

import errno
import math
import os

import pyro
import pytest
import torch
from states import same, weights
from truths import LinearGaussian, linear_vae

from pyro_vae import FitResult, fit
from pyro_vae.checkpoint import read, replacing
from pyro_vae.checkpoint.held import hold
from pyro_vae.models.stacking import fit_layers
from pyro_vae.training import resume


@pytest.fixture
def x():
    return LinearGaussian(2, 4).sample(30)


class Interrupts(torch.utils.data.Dataset):
    """Rows of a tensor, until a number of them has been read."""

    def __init__(self, x, at):
        self.x, self.left = x, at

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.x[i]


def run(path, x, *, at=0, num_epochs=6, **options):
    """A fit that Ctrl-C ends at the row `at` of all that are read, of which ten are looked at beforehand."""
    pyro.clear_param_store()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = linear_vae(2, 4)
    rows = torch.utils.data.DataLoader(Interrupts(x, at), batch_size=10, shuffle=True)
    options = {"seed": 0, "progress": False} | options
    return fit(vae.model, vae.guide, rows, num_epochs=num_epochs, checkpoint=path, **options), vae


def test_in_the_middle_of_an_epoch(tmp_path, x, monkeypatch):
    """The weights have the steps of the epoch that was not finished, the file has those of the last one that was."""
    monkeypatch.setattr(resume, "KEEPING", math.inf)
    with pytest.warns(UserWarning, match=r"interrupted after 2 epochs and 7 steps.*goes on from the last .*l.pt"):
        result, vae = run(tmp_path / "l.pt", x, at=10 + 60 + 15)
    assert result.interrupted
    assert (len(result.loss), result.num_steps) == (2, 7)
    assert repr(result).startswith("FitResult(2 epochs, 7 steps, last loss")
    assert repr(result).endswith("interrupted)")
    saved = read(tmp_path / "l.pt", "fit")
    assert (saved["steps"], saved["losses"]["loss"]) == (6, result.loss)
    assert not same(weights(vae), [saved["weights"][f"VAE.{n}"] for n, _ in vae.named_parameters()])
    whole, expected = run(None, x)
    resumed, vae = run(tmp_path / "l.pt", x)
    assert not resumed.interrupted
    assert (resumed.loss, resumed.num_steps) == (whole.loss, whole.num_steps)
    assert same(weights(vae), weights(expected))


def test_before_an_epoch_is_over_there_is_no_file(tmp_path, x):
    with pytest.warns(UserWarning, match="interrupted after 0 epochs and 1 steps"):
        result, _ = run(tmp_path / "l.pt", x, at=10 + 15)
    assert repr(result) == "FitResult(0 epochs, 1 steps, interrupted)"
    assert list(tmp_path.iterdir()) == []


def test_without_a_checkpoint_the_best_weights_come_back(x):
    with pytest.warns(UserWarning, match="or the best ones, with patience"):
        result, vae = run(None, x, at=10 + 60 + 15, validation_data=x, patience=5)
    whole, expected = run(None, x, num_epochs=2, validation_data=x, patience=5)
    assert result.best_epoch == whole.best_epoch
    assert same(weights(vae), weights(expected))


def test_a_second_one_while_the_first_writes_leaves_the_old_file(tmp_path, x, monkeypatch):
    run(tmp_path / "l.pt", x, num_epochs=2)
    before = (tmp_path / "l.pt").read_bytes()

    def replace(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(replacing.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "l.pt", x, at=10 + 30 + 15)
    assert (tmp_path / "l.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["l.pt"]


def test_no_further_layer_is_trained(x, monkeypatch):
    seen = []

    def interrupted(model, guide, **options):
        seen.append(model)
        return FitResult([1.0], interrupted=True)

    monkeypatch.setattr("pyro_vae.models.stacking.fit", interrupted)
    assert len(fit_layers([linear_vae(2, 4), linear_vae(1, 2)], x, num_epochs=1)) == 1
    assert len(seen) == 1


# -- before training starts -------------------------------------------------------------------------------------------


def refused(path, x, error, match):
    vae = linear_vae(2, 4)
    before, state = weights(vae), torch.get_rng_state()
    with pytest.raises(error, match=match):
        fit(vae.model, vae.guide, x, num_epochs=2, checkpoint=path, progress=False)
    assert same(before, weights(vae))
    assert torch.equal(state, torch.get_rng_state())


def test_a_file_that_another_fit_writes(tmp_path, x):
    with hold(tmp_path / "l.pt"):
        refused(tmp_path / "l.pt", x, ValueError, r"checkpoint: .*l.pt is being written by another fit, in process \d+")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_the_first_epoch(tmp_path, x, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(replacing.os, "write", full)
    refused(tmp_path / "l.pt", x, OSError, r"l.pt cannot be written: No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path, x):
    refused(tmp_path / "no" / "l.pt", x, ValueError, r"checkpoint: .*l.pt: expected a file in a folder, got no folder")
