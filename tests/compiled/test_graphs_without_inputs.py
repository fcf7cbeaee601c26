"""Graphs of functions that take no tensors: all that they read is in closures."""

import pytest
import torch

from pyro_vae.compiled.recording import record


@pytest.mark.parametrize("generate_code", [False, True])
@pytest.mark.parametrize(("num_inputs", "num_held"), [(0, 0), (0, 1), (0, 3), (2, 0), (2, 1), (2, 3)])
def test_a_replay_draws_what_the_function_draws(generate_code, num_inputs, num_held, device):
    held = [torch.randn(4, device=device) for _ in range(num_held)]

    def function(*inputs):
        read = torch.stack(held).sum(0) if held else 0.0  # what the function reads first stands first in its graph
        noise = torch.randn(4, device=device)
        return [noise.exp() + read, sum(inputs, noise * 2)]

    inputs = [torch.randn(4, device=device) for _ in range(num_inputs)]
    _, _, graph = record(function, *inputs)
    assert len(graph.tensors) == num_held
    if generate_code:
        graph.generate_code(*inputs)
    for seed in range(5):  # more than the runs before a capture
        inputs = [torch.randn(4, device=device) for _ in range(num_inputs)]
        for h in held:
            h.add_(0.1)  # a replay reads what is there now
        torch.manual_seed(seed)
        expected = function(*inputs)
        torch.manual_seed(seed)
        got, _ = graph(*inputs)
        torch.testing.assert_close(got, expected)
