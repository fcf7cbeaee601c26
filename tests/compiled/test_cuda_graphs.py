"""CUDA graphs, held against a stand-in that knows memory by its place, as a captured graph does."""

from contextlib import contextmanager

import pyro
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from truths import small_vae

from pyro_vae import fit
from pyro_vae.compiled import adam, codegen, recording


class Captured:
    """`torch.cuda.CUDAGraph`: operations on places in memory. A capture computes nothing; a replay does all of it."""

    made = 0

    def __init__(self):
        Captured.made += 1
        self.operations = []

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, places in self.operations:
                for place, value in zip(places, tensors(function(*args, **kwargs)), strict=True):
                    if place.data_ptr() != value.data_ptr():  # neither a view nor written in place
                        place.copy_(value)


def tensors(x):
    return [t for t in pytree.tree_leaves(x) if isinstance(t, torch.Tensor)]


class Capture(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph, self.before = graph, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))  # its place now
        written = [
            a for a, s in zip(args, function._schema.arguments, strict=False) if s.alias_info and s.alias_info.is_write
        ]
        self.before += [(t, t.clone()) for t in tensors(written)]
        found = function(*args, **kwargs)
        self.graph.operations.append((function, args, kwargs, tensors(found)))
        return found

    def __exit__(self, *error):
        super().__exit__(*error)
        for t, value in reversed(self.before):
            t.copy_(value)


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    @contextmanager
    def capture(graph):
        with torch.random.fork_rng(devices=[]), Capture(graph):
            yield

    monkeypatch.setattr(Captured, "made", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Captured)
    monkeypatch.setattr(torch.cuda, "graph", capture)


def momentum(p, m, x):
    """A step that writes to what it holds."""
    m.copy_(0.9 * m + (p - x).sum(0))
    p.copy_(p - 0.1 * m)
    return [p.square().sum(), p + m]


def test_replays_are_runs_also_after_a_tensor_has_moved():
    plain, replayed = ([torch.ones(3), torch.zeros(3)] for _ in range(2))
    run, kept = codegen._Captured(momentum, 2), []
    for step in range(12):
        if step == 7:  # as optimizers and modules move them
            replayed[0].data = replayed[0].data.clone()
        x = torch.randn(4, 3)
        expected, found = momentum(*plain, x), run(*replayed, x)
        kept.append((found, [t.clone() for t in expected]))
    for found, expected in kept:  # later replays have not changed what earlier ones gave
        assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, plain, replayed))
    assert Captured.made == 2


@pytest.mark.parametrize(
    "x", [torch.randn(1, 3).expand(4, 3), torch.randn(3, 4).T, torch.randn(4, 6)[:, ::2]], ids=["expanded", "T", "gaps"]
)
def test_inputs_keep_their_strides(x):
    """Which generated code has been made for, and checks."""

    def run(p, x):
        assert x.stride() == strides
        return [p + x]

    strides, run_captured = x.stride(), codegen._Captured(run, 1)
    for _ in range(6):
        assert torch.equal(run_captured(torch.ones(3), x)[0], 1 + x)


def test_what_cannot_be_captured_runs_as_it_is():
    def run(p, x):
        return [p * float(x.sum())]

    captured, p = codegen._Captured(run, 1), torch.ones(3)
    for _ in range(3):
        captured(p, torch.ones(2))
    with pytest.warns(UserWarning, match="no CUDA graph of this function, .* not permitted when stream is capturing"):
        assert captured(p, torch.ones(2))[0].tolist() == [2.0] * 3
    assert captured(p, torch.full((2,), 2.0))[0].tolist() == [4.0] * 3
    assert Captured.made == 1


def test_a_fit_of_captured_steps_is_that_of_recorded_ones(monkeypatch, by_operation):
    """To the bit: random numbers, weights and the optimizer's state."""

    def run():
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae, x = small_vae(), torch.bernoulli(torch.full((60, 4, 4), 0.4))
        result = fit(vae.model, vae.guide, x, num_epochs=5, batch_size=20, seed=1, compile=True, progress=False)
        return result.loss, [p.detach().clone() for p in vae.parameters()]

    loss, expected = run()
    for module in (adam, recording):
        monkeypatch.setattr(module, "generate", lambda m, held, inputs: codegen._Captured(m.forward, len(held)))
    captured_loss, found = run()
    assert Captured.made == 1
    assert captured_loss == loss
    assert all(map(torch.equal, found, expected))
