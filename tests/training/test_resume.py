"""fit: runs that repeat, stop early, and go on from a checkpoint."""

import math
import os

import pyro
import pytest
import torch
from pyro.distributions import Normal
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.utils.data import DataLoader, TensorDataset
from truths import LinearGaussian, linear_vae, small_vae

from pyro_vae import BetaELBO, CombinedELBO, fit
from pyro_vae.checkpoint import read, save_weights, write
from pyro_vae.objectives.schedules import linear


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_seed_repeats_to_the_bit_and_leaves_the_random_state():
    x = LinearGaussian(2, 4).sample(50)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(1)
        vae = linear_vae(2, 4)
        before = torch.get_rng_state()
        result = fit(vae.model, vae.guide, x, num_epochs=3, batch_size=20, seed=seed)
        assert torch.get_rng_state().equal(before)
        runs.append((result.loss, weights(vae)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert not same(runs[0][1], runs[2][1])


def test_early_stopping_keeps_the_best_weights():
    """Fifty rows, many parameters: it overfits, and the best weights come back."""
    torch.manual_seed(0)
    data = torch.bernoulli(torch.full((100, 4, 4), 0.5))
    x, validation = data[:30], data[30:]
    vae = small_vae(4)
    result = fit(
        vae.model, vae.guide, x, num_epochs=500, learning_rate=0.03, validation_data=validation, patience=10, seed=0
    )
    assert len(result.loss) == len(result.validation_loss) == result.best_epoch + 11 < 500
    assert result.validation_loss[result.best_epoch] == min(result.validation_loss)
    again = fit(  # no step: the validation loss of the weights that were kept, with the same random numbers
        vae.model,
        vae.guide,
        x,
        num_epochs=1,
        validation_data=validation,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
    )
    assert again.validation_loss[0] == pytest.approx(min(result.validation_loss), rel=1e-6)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def x():
    return LinearGaussian(2, 4).sample(30)


def run(path, x, *, num_epochs=2, vae=None, **options):
    """A fit of a VAE that is the same each time, as in a new process."""
    pyro.clear_param_store()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = linear_vae(2, 4) if vae is None else vae
    options = {"batch_size": 10, "seed": 0, "progress": False} | options
    return fit(vae.model, vae.guide, x, num_epochs=num_epochs, checkpoint=path, **options), vae


def decay(optim):
    return torch.optim.lr_scheduler.ExponentialLR(optim, 0.9)


def groups(parameters):
    return torch.optim.Adam([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=1e-3)


@pytest.mark.parametrize(
    ("change", "written", "given"),
    [
        ({"batch_size": 15, "seed": 1}, "batch_size=10, seed=0", "batch_size=15, seed=1"),
        ({"seed": None}, "seed=0", "seed=None"),
        ({"learning_rate": 0.1}, "learning_rate=0.001", "learning_rate=0.1"),
        ({"optimizer": lambda p: torch.optim.Adam(p, lr=0.1)}, "learning_rate=0.001", "learning_rate=0.1"),
        ({"rows": 20}, "rows=30, data='.*'", "rows=20, data='.*'"),
        ({"loss": TraceMeanField_ELBO()}, r"loss='Trace_ELBO\(\)'", r"loss='TraceMeanField_ELBO\(\)'"),
        ({"loss": Trace_ELBO(2)}, r"loss='Trace_ELBO\(\)'", r"loss='Trace_ELBO\(num_particles=2\)'"),
        ({"clip_norm": 1.0}, "clip_norm=None", "clip_norm=1.0"),
        ({"last": 9.0}, "data='.*'", "data='.*'"),
        ({"scheduler": decay}, "scheduler=None", r"scheduler='ExponentialLR\(.*\)'"),
        (
            {"optimizer": lambda p: torch.optim.Adam(p, betas=(0.5, 0.9))},
            "optimizer='Adam.*0.999.*'",
            "optimizer='Adam.*'",
        ),
    ],
)
def test_another_run_is_refused(tmp_path, x, change, written, given):
    run(tmp_path / "l.pt", x)
    vae, change = linear_vae(2, 4), dict(change)
    before = weights(vae)
    rows = x[: change.pop("rows", 30)].clone()
    rows[-1, -1] = change.pop("last", rows[-1, -1])
    with pytest.raises(ValueError, match=f"l.pt was written with {written}; this call has {given}. Try the same"):
        run(tmp_path / "l.pt", rows, num_epochs=3, vae=vae, **change)
    assert same(before, weights(vae))


@pytest.mark.filterwarnings("ignore:fit ended at beta")
@pytest.mark.parametrize(
    ("was", "now"),
    [
        (BetaELBO(2.0), BetaELBO(3.0)),
        (BetaELBO(linear(10)), BetaELBO(linear(20))),
        (CombinedELBO([(Trace_ELBO(), 1.0)]), CombinedELBO([(Trace_ELBO(), 2.0)])),
        (CombinedELBO([(Trace_ELBO(), 1.0)]), CombinedELBO([(Trace_ELBO(2), 1.0)])),
    ],
)
def test_an_objective_of_other_numbers_is_refused(tmp_path, x, was, now):
    """The same goes on, whatever it has done in between."""
    run(tmp_path / "l.pt", x, loss=was)
    run(tmp_path / "other.pt", x, loss=was)
    run(tmp_path / "l.pt", x, loss=was, num_epochs=3)
    with pytest.raises(ValueError, match=r"written with loss='.*'; this call has loss='.*'"):
        run(tmp_path / "l.pt", x, loss=now, num_epochs=4)


def test_other_validation_data_are_compared_anew(tmp_path, x):
    """Their losses have nothing to do with those of the first, which are far lower."""
    options = {"patience": 2, "learning_rate": 0.01}
    run(tmp_path / "l.pt", x, num_epochs=3, validation_data=0.1 * x, **options)
    result, vae = run(tmp_path / "l.pt", x, num_epochs=8, validation_data=3 * x, **options)
    assert len(result.loss) == 8
    assert min(result.validation_loss[:3]) < min(result.validation_loss[3:])
    assert result.best_epoch == 3 + torch.tensor(result.validation_loss[3:]).argmin()
    kept = read(tmp_path / "l.pt", "fit")["best"]
    assert all(torch.equal(kept[f"VAE.{name}"], value) for name, value in vae.state_dict().items())


def test_views_of_other_strides_are_data_too(tmp_path, x):
    """The bytes of their rows are those of a copy."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Normal(pyro.param("c", torch.zeros(())), 1.0), obs=x)

    for i, view in enumerate((x[:, 1], x.T[2], torch.zeros(1).expand(30), x[::2, 0], x[:1, 1])):
        losses = []
        for data in (view, view.clone()):
            pyro.clear_param_store()
            result = fit(model, lambda x: None, data, num_epochs=1 + len(losses), checkpoint=tmp_path / f"{i}", seed=0)
            losses.append(result.loss[0])
        assert losses[0] == losses[1]


def test_a_relative_path_stays_where_it_was(tmp_path, x, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run("l.pt", x, scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: go_to("elsewhere", epoch)))
    assert [p.name for p in tmp_path.glob("**/*.pt")] == ["l.pt"]
    assert len(read(tmp_path / "l.pt", "fit")["losses"]["loss"]) == 2


def go_to(folder, epoch):
    if epoch == 1:
        os.chdir(folder)
    return 1.0


def test_a_fit_that_is_done_already_leaves_what_it_trained_in_the_store(tmp_path, x):
    run(tmp_path / "l.pt", x)
    names = sorted(pyro.get_param_store().keys())
    run(tmp_path / "l.pt", x)
    assert sorted(pyro.get_param_store().keys()) == names != []


def test_fewer_epochs_than_there_are_is_refused(tmp_path, x):
    result, _ = run(tmp_path / "l.pt", x, num_epochs=3)
    vae = linear_vae(2, 4)
    before = weights(vae)
    with pytest.raises(ValueError, match=r"l.pt is of 3 epochs already; this call has num_epochs=2. Try num_epochs=3"):
        run(tmp_path / "l.pt", x, num_epochs=2, vae=vae)
    assert same(before, weights(vae))
    assert run(tmp_path / "l.pt", x, num_epochs=3)[0].loss == result.loss


def test_a_loader_of_other_batches_is_refused(tmp_path, x):
    run(tmp_path / "l.pt", DataLoader(TensorDataset(x), batch_size=10))
    run(tmp_path / "l.pt", DataLoader(TensorDataset(x), batch_size=10), num_epochs=3)
    with pytest.raises(ValueError, match="written with batch_size=10; this call has batch_size=15"):
        run(tmp_path / "l.pt", DataLoader(TensorDataset(x), batch_size=15), num_epochs=4)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"optimizer": groups}, "param_groups: expected 2 values, got 1"),
        ({"scheduler": decay}, "schedule: expected dict, got NoneType"),
        ({"optimizer": torch.optim.AdamW}, "optimizer: expected AdamW, got Adam"),
        ({"optimizer": lambda p: torch.optim.Adam(p, amsgrad=True)}, "amsgrad: expected True, got False"),
    ],
)
def test_a_refusal_changes_nothing(tmp_path, x, change, what):
    """Also where the arguments of a call that are written down do not tell."""
    path = tmp_path / "l.pt"
    run(path, x)
    run(tmp_path / "changed.pt", x, **change)
    saved = read(path, "fit") | {"arguments": read(tmp_path / "changed.pt", "fit")["arguments"]}
    write(saved, path, "fit")
    vae = linear_vae(2, 4)
    before, state = weights(vae), torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"l.pt is of another model, guide, optimizer, .*{what}.*; all is as it was"):
        run(path, x, num_epochs=3, vae=vae, **change)
    assert same(before, weights(vae))
    assert state.equal(torch.get_rng_state())


@pytest.mark.parametrize("what", ["junk", "empty", "weights", "half", "folder"])
def test_a_foreign_file_is_refused(tmp_path, x, what):
    path = tmp_path / "l.pt"
    if what == "folder":
        path.mkdir()
    elif what == "weights":
        save_weights(linear_vae(2, 4), path)
    else:
        run(path, x)
        path.write_bytes({"junk": b"no weights", "empty": b"", "half": path.read_bytes()[:2000]}[what])
    expected = (
        ": expected the name of a file" if what == "folder" else r" was not written by fit\(checkpoint=…\).* Try "
    )
    with pytest.raises(ValueError, match=rf"checkpoint: .*l.pt{expected}"):
        run(path, x)


def test_validation_may_come_later(tmp_path, x):
    run(tmp_path / "l.pt", x, num_epochs=2)
    result, _ = run(tmp_path / "l.pt", x, num_epochs=5, validation_data=x)
    assert [math.isnan(v) for v in result.validation_loss] == [True, True, False, False, False]
    assert result.validation_loss[result.best_epoch] == min(result.validation_loss[2:])


def test_patience_may_come_later(tmp_path, x, monkeypatch):
    """Nobody kept the best weights so far: the best epoch is looked for anew, and its weights come back."""
    losses = iter([1.0, 2.0, 5.0, 3.0, 4.0, 6.0])
    monkeypatch.setattr("pyro_vae.training.loop._evaluate", lambda *_: next(losses))
    run(tmp_path / "l.pt", x, num_epochs=2, validation_data=x)
    result, vae = run(tmp_path / "l.pt", x, num_epochs=9, validation_data=x, patience=2)
    assert result.validation_loss == [1.0, 2.0, 5.0, 3.0, 4.0, 6.0]
    assert result.best_epoch == 3
    assert same(weights(vae), weights(run(None, x, num_epochs=4)[1]))
    last, vae = run(tmp_path / "l.pt", x, num_epochs=6)  # without patience: the last weights
    assert last.loss == result.loss
    assert same(weights(vae), weights(run(None, x, num_epochs=6)[1]))


def test_a_finished_run_ends_as_it_did(tmp_path, x):
    """Its objective is at the last step, so that no warning says otherwise."""
    for _ in range(2):
        run(tmp_path / "l.pt", x, num_epochs=4, loss=BetaELBO(linear(5)))
    with pytest.warns(UserWarning, match="fit ended at beta = 0.5"):
        run(tmp_path / "m.pt", x, num_epochs=2, loss=BetaELBO(linear(10)))
    with pytest.warns(UserWarning, match="fit ended at beta = 0.5"):
        run(tmp_path / "m.pt", x, num_epochs=2, loss=BetaELBO(linear(10)))
