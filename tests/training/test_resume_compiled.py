"""Fits of compiled steps that are interrupted go on to the same bits."""

import pyro
import pytest
import torch
from states import same
from torch.utils.data import DataLoader, TensorDataset
from truths import small_vae

from pyro_vae import CompiledELBO, fit
from pyro_vae.training import resume


def run(path, data, *, stop=None, num_epochs=100, **options):
    """A fit of batches of 20 rows; Ctrl-C comes after the epoch `stop`."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    vae = small_vae()

    def decay(epoch):
        if epoch == stop:
            raise KeyboardInterrupt
        return 0.99**epoch

    options = {"num_epochs": num_epochs, "batch_size": 20, "seed": 3, "progress": False} | options
    schedule = lambda optim: torch.optim.lr_scheduler.LambdaLR(optim, decay)  # noqa: E731
    return fit(vae.model, vae.guide, data, scheduler=schedule, checkpoint=path, **options), vae.state_dict()


def check(path, data, stop, **options):
    options.setdefault("compile", "auto")
    whole, weights = run(None, data, **options)
    with pytest.warns(UserWarning, match=f"fit: interrupted after {stop} epochs"):
        run(path, data, stop=stop, **options)
    result, resumed = run(path, data, **options)
    assert (result.loss, result.num_steps) == (whole.loss, whole.num_steps)
    assert same(weights.values(), resumed.values())
    return result


def bits(rows):
    return torch.bernoulli(torch.full((rows, 4, 4), 0.4))


def test_a_fit_of_recorded_steps_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    """Of 300 steps, which "auto" records: interrupted in one process, taken up by the same call in another."""
    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0.0)
    x = bits(60)
    result = check(tmp_path / "fit.pt", x, 50)
    assert result.num_steps == 300
    again, _ = run(tmp_path / "fit.pt", x)  # a finished one has nothing to do
    assert again.loss == result.loss


@pytest.mark.parametrize(("rows", "stop"), [(50, 1), (50, 2), (30, 4)])
def test_with_and_without_a_smaller_last_batch(tmp_path, monkeypatch, rows, stop):
    """The recordings of each size are there when an uninterrupted fit would have them."""
    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0.0)
    check(tmp_path / "fit.pt", bits(rows), stop, num_epochs=7, loss=CompiledELBO(backend="eager"))


@pytest.mark.usefixtures("by_operation")
def test_whole_steps(tmp_path, monkeypatch):
    """One graph of loss, gradients and Adam: it rounds as generated code does, other than torch's own Adam."""
    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0.0)
    check(tmp_path / "fit.pt", bits(50), 4, num_epochs=7, compile=True, clip_norm=1.0)


def test_batches_of_a_loader(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0.0)
    loader = DataLoader(TensorDataset(bits(50)), batch_size=20, shuffle=True)
    check(tmp_path / "fit.pt", loader, 4, num_epochs=10, loss=CompiledELBO(backend="eager"))
