"""Whether a run is recorded is known to what runs, in its own thread, and to nothing afterwards."""

import threading

import pytest
import torch

from pyro_vae.compiled.recording import Untraceable, record
from pyro_vae.pairs.modes import is_recording


def test_inside_and_outside():
    seen = []

    def function(x):
        seen.append(is_recording())
        other = threading.Thread(target=lambda: seen.append(is_recording()))
        other.start()
        other.join()
        return [x + 1]

    assert not is_recording()
    record(function, torch.zeros(2))
    assert seen == [True, False]
    assert not is_recording()


def test_after_a_recording_that_failed():
    with pytest.raises(Untraceable):
        record(lambda x: [x] if x.sum() > 0 else [-x], torch.zeros(2))
    assert not is_recording()
