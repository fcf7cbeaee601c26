"""Killed runs, of those of `benchmarks/killed_runs.py`: started again, they end at the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked")

CODE = """
import importlib, sys, torch
import killed_runs
for code in ("plain Pyro", "recorded", "two ranks"):
    killed_runs.CODE[code]["num_epochs"] = 6
importlib.import_module("torch._inductor.compile_fx")  # once, and not in each of the processes
truths, folder = {}, killed_runs.Path(sys.argv[1])
for i in (0, 9, 17, 3):
    print(i, *killed_runs.case(i, folder, truths)[2], sep=",")
"""


def test_runs_that_are_killed_end_at_the_same_bits(tmp_path):
    """In a process of its own: those that it starts need one in which nothing has been computed yet."""
    path = [str(Path(__file__).parents[2] / "benchmarks"), *sys.path]
    run = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=True,
    )
    runs = [line.split(",") for line in run.stdout.splitlines()]
    assert len(runs) == 4
    for events in runs:
        assert {"came to the end", "to the bit", "tidy"} <= set(events), events
    assert sum("killed" in events for events in runs) >= 3
