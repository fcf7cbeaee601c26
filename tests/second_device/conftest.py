import os

import pytest
import second
import torch

if library := os.environ.get("PYRO_VAE_SECOND_DEVICE"):
    second.load(library)


@pytest.fixture
def device():
    return torch.device(os.environ["PYRO_VAE_DEVICE"])
