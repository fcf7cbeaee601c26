import os

os.environ.setdefault("MPLBACKEND", "Agg")

import pyro
import pytest
import torch

torch.set_num_threads(1)  # the tensors are small: threads would only wait for each other
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _fresh():
    """Every test starts from one seed and an empty parameter store, and leaves torch's defaults alone."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    dtype, validation = torch.get_default_dtype(), pyro.settings.get("validate_infer")
    yield
    assert torch.get_default_dtype() is dtype
    assert pyro.settings.get("validate_infer") is validation
