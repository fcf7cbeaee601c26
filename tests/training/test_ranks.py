"""The same script under torchrun: two ranks end where one process does."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).with_name("rank_runs.py")
RUNS = [
    "plain",
    "recorded",
    "ranks_of_their_own_weights",
    "loader",
    "distributed_sampler",
    "globals_of_all_rows",
    "random_draws",
    "not_finite",
    "other_data",
    "other_weights",
    "other_calls",
    "outside_of_the_plate",
    "error_of_one",
    "interrupted",
    "few_rows",
    "one_alone",
    "calibration",
    "evidence",
    "resumed_draws",
    "resumed",
]


def run(folder, *names):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, FILE, folder, *names]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{number of ranks: what each rank found}. Of several test processes the first runs them for all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "out").exists():
            out = run(folder, *RUNS)
            (folder / "out").write_text(out.stderr if out.returncode else "")
    assert (folder / "out").read_text()[-3000:] == ""
    files = {1: ["one"], 2: ["0", "1"]}
    return {n: [torch.load(folder / f"{name}.pt", weights_only=False) for name in files[n]] for n in files}


def largest_difference(first, second):
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "name",
    ["plain", "recorded", "ranks_of_their_own_weights", "loader", "distributed_sampler", "globals_of_all_rows"],
)
def test_two_ranks_end_where_one_process_does(found, name):
    """To 1e-9 in double precision; and both ranks at the same bits."""
    (one,), (first, second) = ([ranks[name] for ranks in found[n]] for n in (1, 2))
    assert largest_difference(one["weights"], first["weights"]) < 1e-9
    assert all(map(torch.equal, first["weights"], second["weights"]))
    assert one["loss"] == pytest.approx(first["loss"], abs=1e-9)
    assert first["loss"] == second["loss"]
    if name in ("plain", "recorded"):
        assert one["num_steps"] == first["num_steps"] > 200
        assert len(one["loss"]) == one["best_epoch"] + 10 < 150  # stopped early, in the same epoch
        assert one["best_epoch"] == first["best_epoch"] == second["best_epoch"]
        assert one["validation_loss"] == pytest.approx(first["validation_loss"], abs=1e-9)


def test_each_rank_draws_numbers_of_its_own(found):
    """The first rank those of one process; outside of a fit with a seed nothing has moved."""
    (one,), (first, second) = ([ranks["random_draws"] for ranks in found[n]] for n in (1, 2))
    assert torch.equal(one["next"], first["next"])
    assert torch.equal(one["next"], second["next"])
    assert torch.equal(one["draws"], first["draws"])
    assert not torch.equal(first["draws"], second["draws"])


def test_all_ranks_stop_where_one_has_a_loss_that_is_not_finite(found):
    (message, unchanged), (other, unchanged_too) = (rank["not_finite"] for rank in found[2])
    assert message == other
    assert "rank 1: fit stopped before step 0" in message or "rank 0: fit stopped before step 0" in message
    assert "the first is row 150 of the data" in message
    assert unchanged
    assert unchanged_too


def test_ranks_that_do_not_do_the_same_are_told(found):
    for rank in found[2]:
        assert rank["other_data"].startswith("fit: expected the same data in all 2 ranks, got [(0, (203, 5)")
        assert "expected the same call in all 2 ranks, got fit, simulation_based_calibration" in rank["other_calls"]
        assert rank["few_rows"].startswith("data: expected at least one row of a batch for each of 2 ranks, got")
    assert found[1][0]["few_rows"] is None


def test_ranks_of_other_weights_and_data_sets_are_told_or_made_the_same(found):
    for of_evidence, _, of_loader, of_calibration in (rank["other_weights"] for rank in found[2]):
        assert "expected the same rows, model, guide or weights in all 2 ranks" in of_evidence
        assert "expected the same rows, model, guide or weights in all 2 ranks" in of_calibration
        assert "expected the same data in all 2 ranks" in of_loader
    assert torch.equal(*(rank["other_weights"][1] for rank in found[2]))


def test_what_all_rows_share_counts_once_or_is_refused(found):
    assert found[1][0]["outside_of_the_plate"] == (None,) * 4
    for rank in found[2]:
        *outside, sums = rank["outside_of_the_plate"]
        for name, message in zip(["mean", "y", "f"], outside, strict=True):
            assert f"{name!r} outside of it, which would count once for each rank" in message
        assert "loss: expected a sum over data points in several ranks" in sums


def test_an_error_and_an_interrupt_reach_all_ranks(found):
    first, second = found[2]
    assert first["error_of_one"] == second["error_of_one"]
    assert first["error_of_one"].startswith("of the second rank")  # and then the shapes of Pyro's trace
    first, second = first["interrupted"], second["interrupted"]
    assert first["interrupted"]
    assert second["interrupted"]
    assert first["num_steps"] == second["num_steps"] > 10
    assert all(map(torch.equal, first["weights"], second["weights"]))


def test_one_alone_does_as_one_process(found):
    (one,), (first, second) = ([ranks["one_alone"] for ranks in found[n]] for n in (1, 2))
    assert second is None
    assert all(map(torch.equal, one["weights"], first["weights"]))


def test_evidence_is_that_of_one_process(found):
    """To the bit, in the order of the rows."""
    (one,), others = ([ranks["evidence"] for ranks in found[n]] for n in (1, 2))
    for other in others:
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(len(value) == 60 for value in one.values())
    assert largest_difference([one["importance_sampling"]], [one["kept"]]) < 3.0
    assert not torch.equal(one["importance_sampling"], one["kept"])


def test_simulations_are_shared_out(found):
    first, second = (rank["calibration"] for rank in found[2])
    assert first["p"] == second["p"] > 0.01
    assert torch.equal(first["ranks"], second["ranks"])
    assert len(first["ranks"]) == 401
    assert not torch.equal(first["ranks"][:200], first["ranks"][-200:])


def test_ranks_draw_numbers_of_their_own_after_a_file_of_one_process(found):
    first, second = (rank["resumed_draws"] for rank in found[2])
    assert not torch.equal(first, second)


def test_a_dead_rank_ends_the_run_which_goes_on_with_any_number(found, tmp_path):
    """Within a minute, of which most is to start; on as many ranks to the bit, on one to rounding."""
    start = time.monotonic()
    out = run(tmp_path, "killed")
    assert out.returncode != 0
    assert time.monotonic() - start < 60
    assert "Signal 9 (SIGKILL)" in out.stderr
    assert "fit.checkpoint" in [path.name for path in tmp_path.iterdir()]
    shutil.copy(tmp_path / "fit.checkpoint", tmp_path / "of_one.checkpoint")
    out = run(tmp_path, "resumed")
    assert out.returncode == 0, out.stderr[-3000:]
    files = (tmp_path / f"{name}.pt" for name in ("0", "1", "one"))
    whole, (first, second, one) = found[2][0]["resumed"], (torch.load(f, weights_only=False)["resumed"] for f in files)
    assert len(whole["loss"]) == 8
    assert whole["loss"] == first["loss"]
    for weights in (first["weights"], second["weights"]):
        assert all(map(torch.equal, whole["weights"], weights))
    assert largest_difference(whole["weights"], one["weights"]) < 1e-9
