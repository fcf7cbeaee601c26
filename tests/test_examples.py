"""The examples, as a user runs them, with small settings."""

import runpy
import subprocess
import sys
from pathlib import Path

import arviz as az
import matplotlib
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
pytest.importorskip("sklearn")


def run(*arguments):
    command = [sys.executable, "-W", "error", EXAMPLES / "fashion_mnist.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", "PATH": ""})


def test_fashion_mnist_or_the_digits(tmp_path):
    out = run("--num-epochs", "1", "--limit", "10", "--num-particles", "50", "--output", tmp_path / "out")
    assert out.returncode == 0, out.stderr
    if not FASHION_MNIST.is_dir():
        assert "apt-get install dataset-fashion-mnist" in out.stdout
    assert "diagonal" in out.stdout
    assert "full" in out.stdout
    files = {p.name for p in (tmp_path / "out").iterdir()}
    figures = {"training", "reconstructions", "samples", "traversal", "embedding", "khat"}
    assert {f"{name}.png" for name in figures} <= files
    for name in ("diagonal", "full"):
        assert f"weights_{name}.pt" in files
        tree = az.from_netcdf(str(tmp_path / "out" / f"posterior_{name}.nc"))
        assert tree["posterior"]["z"].dims[:3] == ("chain", "draw", "data")


SCRIPTS = [
    "amortized_groups",
    "autoencoder",
    "beta_vae",
    "calibration",
    "cevae",
    "conditional_vae",
    "coupling",
    "deep_markov",
    "decoder_in_nuts",
    "denoising",
    "flow_posterior",
    "forward_kl",
    "gaussian_decoder",
    "generate",
    "hierarchical",
    "kl_directions",
    "known_code",
    "leave_one_out",
    "likelihoods",
    "linear_vae",
    "missing_data",
    "mixed_table",
    "pharmacokinetics",
    "pipeline",
    "posterior_collapse",
    "prior_sampling",
    "prior_vae",
    "priors",
    "semi_supervised",
    "set_encoder",
    "stacked_autoencoder",
    "supervised_groups",
]


def test_every_script_is_here():
    others = {"fashion_mnist", "fashion_mnist_benchmark", "images", "script"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, *others}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run_and_draw(tmp_path, monkeypatch, capsys, name):
    """In this process, which has imported what they need."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", "--output", str(tmp_path)])
    with matplotlib.rc_context():
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert f"picture: {tmp_path / name}.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "/proc/nowhere"], "cannot write to /proc/nowhere"),
        (["--data", "/proc/nowhere"], "no Fashion-MNIST in /proc/nowhere: missing train-images-idx3-ubyte.gz"),
        (["--num-epochs", "0"], "expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_said_before_training(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["fashion_mnist.py", "--output", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / "fashion_mnist.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
