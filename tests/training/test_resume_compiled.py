"""A fit of recorded steps that is interrupted."""

import pyro
import pytest
import torch
from truths import small_vae

from pyro_vae import fit

# -- an interrupted fit -----------------------------------------------------------------------------------------------


def test_a_fit_of_recorded_steps_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    """Of 300 steps, which "auto" records: interrupted in one process, taken up by the same call in another."""
    monkeypatch.setattr("pyro_vae.training.resume.SECONDS_BETWEEN", 0.0)
    x = torch.bernoulli(torch.full((60, 4, 4), 0.4))

    def run(path, stop=None):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = small_vae()

        def decay(epoch):
            if epoch == stop:
                raise KeyboardInterrupt
            return 0.99**epoch

        options = {"num_epochs": 100, "batch_size": 20, "compile": "auto", "seed": 3, "progress": False}
        schedule = lambda optim: torch.optim.lr_scheduler.LambdaLR(optim, decay)  # noqa: E731
        result = fit(vae.model, vae.guide, x, scheduler=schedule, checkpoint=path, **options)
        return result, vae.state_dict()

    whole, weights = run(None)
    with pytest.warns(UserWarning, match="fit: interrupted after 50 epochs and 150 steps"):
        run(tmp_path / "fit.pt", stop=50)
    result, resumed = run(tmp_path / "fit.pt")
    assert result.loss == pytest.approx(whole.loss, rel=1e-6)  # sums are rounded otherwise until steps are recorded
    assert result.num_steps == whole.num_steps == 300
    for name, value in weights.items():
        torch.testing.assert_close(value, resumed[name])
    again, _ = run(tmp_path / "fit.pt")  # a finished one has nothing to do
    assert again.loss == result.loss
