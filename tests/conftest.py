import os
import random
from types import SimpleNamespace

os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pyro
import pytest
import torch
from torch.fx.experimental import proxy_tensor

from pyro_vae.compiled import adam, recording

torch.set_num_threads(1)  # the tensors are small: threads would only wait for each other
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _fresh():
    """Every test starts from one seed and an empty parameter store, and leaves torch's defaults alone."""
    pyro.clear_param_store()
    # as pyro.set_rng_seed, which on a CPU takes a millisecond: torch notes a stack trace for each kind of device
    random.seed(0)
    np.random.seed(0)
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)
    dtype, validation = torch.get_default_dtype(), pyro.settings.get("validate_infer")
    yield
    assert torch.get_default_dtype() is dtype
    assert pyro.settings.get("validate_infer") is validation


def shape_alone(proxy, value):
    proxy.node.meta["val"] = SimpleNamespace(shape=getattr(value, "shape", None))
    return proxy


@pytest.fixture(autouse=True)
def _short_recordings(request, monkeypatch):
    """Notes no more of the values in a recording than their shapes: the rest takes two thirds of its time, for nothing.

    Generated code starts from nothing noted. Files that say `WHOLE_RECORDINGS = True` have all.
    """
    make = recording.make_fx

    def short(function):
        def run(*inputs):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(proxy_tensor, "set_meta", shape_alone, raising=False)
                return make(function)(*inputs)

        return run

    if not getattr(request.module, "WHOLE_RECORDINGS", False):
        monkeypatch.setattr(recording, "make_fx", short)


@pytest.fixture
def by_operation(monkeypatch):
    """Graphs run operation by operation, as code takes seconds to generate."""
    for module in (adam, recording):
        monkeypatch.setattr(module, "generate", lambda module, held, inputs: module.forward)
