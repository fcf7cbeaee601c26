"""The package on a device that is not the CPU: CUDA where there is one, and a simulated device everywhere.

Each runs in a process of its own, since torch knows a device for the whole life of a process.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import second
import torch

HERE = Path(__file__).parent
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


@pytest.mark.parametrize("name", ["second", pytest.param("cuda", marks=CUDA)])
def test_everything_runs_on(name, tmp_path):
    environment = os.environ | {"PYRO_VAE_DEVICE": name}
    if name == "second":
        if shutil.which("g++") is None:
            pytest.skip("no g++ to build the device with")
        environment["PYRO_VAE_SECOND_DEVICE"] = str(second.build(tmp_path))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", HERE / "on_device.py"]
    found = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-20000:] + found.stderr[-2000:]
