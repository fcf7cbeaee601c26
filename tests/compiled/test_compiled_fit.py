"""Compiled fits against plain ones."""

import pyro
import pytest
import torch
from truths import linear_vae

from pyro_vae import CompiledELBO, fit
from pyro_vae.training.steps import Steps

# -- fit --------------------------------------------------------------------------------------------------------------


def run_fit(compile, *, rows=100, batch_size=32, epochs=6, **options):
    pyro.clear_param_store()
    torch.manual_seed(0)
    vae = linear_vae(2, 5)
    x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(2)) @ torch.randn(
        5, 5, generator=torch.Generator().manual_seed(3)
    )
    result = fit(
        vae.model, vae.guide, x, num_epochs=epochs, batch_size=batch_size, learning_rate=0.01, seed=1, compile=compile,
        progress=False, **options,
    )  # fmt: skip
    return vae, result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_norm": 1.0},
        {"scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)},
        {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1e-3), "clip_norm": 1.0},
    ],
    ids=["adam", "clipped", "scheduled", "sgd"],
)
def test_compiled_fit_takes_the_steps_of_the_plain_one(options, request):
    """Four batches an epoch, the last of four rows: the whole step, and steps beside it, are those of torch's Adam."""
    if "clip_norm" not in options:  # a later test has the code of Adam, which a scheduler does not change
        request.getfixturevalue("by_operation")
    plain, expected = run_fit(False, **options)
    compiled, result = run_fit(True, **options)
    assert result.num_steps == expected.num_steps == 24
    assert result.loss == pytest.approx(expected.loss, rel=2e-4)
    for a, b in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


def test_replayed_fit_is_the_plain_one_to_the_last_digit():
    plain, replayed = (run_fit(False, loss=loss)[1] for loss in (None, CompiledELBO(backend="eager")))
    assert replayed.loss == pytest.approx(plain.loss, rel=1e-6)


def test_many_compiled_steps_end_where_pyros_do():
    ends = [run_fit(how, rows=96, epochs=50)[1] for how in (False, True)]
    assert ends[0].num_steps == 150
    assert ends[0].loss[0] > ends[0].loss[-1] + 1
    mean = [sum(end.loss[-20:]) / 20 for end in ends]
    assert mean[0] == pytest.approx(mean[1], abs=0.02)


def bad_fit(compile):
    """The message, and the weights it leaves behind."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    vae = linear_vae(2, 5)
    x = torch.randn(64, 5)
    x[37] = 1e25  # finite, but its square is not
    with pytest.raises(ValueError, match=r"stopped before step \d+.*row 37 of the data") as caught:
        fit(vae.model, vae.guide, x, num_epochs=1, batch_size=4, compile=compile, seed=3, progress=False)
    return str(caught.value).replace("loss nan", "loss inf"), [p.detach() for p in vae.parameters()]


@pytest.mark.parametrize("deferred", [False, True])
def test_a_loss_that_is_not_finite_is_named_and_moves_nothing(monkeypatch, deferred, request):
    expected = bad_fit(False)
    if deferred:  # as where the device would have to be waited for
        request.getfixturevalue("by_operation")
        original = Steps.__init__

        def init(self, *args):
            original(self, *args)
            self._deferred = True

        monkeypatch.setattr(Steps, "__init__", init)
    for compile in (True, False) if deferred else (True,):
        message, weights = bad_fit(compile)
        assert message == expected[0]
        torch.testing.assert_close(weights, expected[1], rtol=1e-3, atol=1e-5)
