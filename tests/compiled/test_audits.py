"""What nobody watches is found by audits, such as a file. What a run changes itself is not replayed."""

import itertools
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from torch import nn

from pyro_vae import CompiledELBO, fit, importance_sampling
from pyro_vae.compiled.audit import Audit
from pyro_vae.compiled.recording import record
from pyro_vae.compiled.recordings import LossAndGradients

X = torch.randn(48, generator=torch.Generator().manual_seed(0))


def scaled_pair(read):
    """A pair whose prior is scaled by a number that it reads."""

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=read()):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        a = pyro.param("a", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x, 1.0))

    return model, guide


def losses(elbo, pair, steps, change):
    """Losses of SVI, each under a seed of its own."""
    pyro.clear_param_store()
    svi = SVI(*pair, pyro.optim.SGD({"lr": 1e-3}), loss=elbo)
    found = []
    for step in range(steps):
        change(step)
        torch.manual_seed(step)
        found.append(svi.step(X))
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("elbo", "backend"),
    [(Trace_ELBO(), "eager"), (TraceGraph_ELBO(), "eager"), (Trace_ELBO(), "inductor")],
    ids=["Trace_ELBO", "TraceGraph_ELBO", "generated"],
)
def test_a_file_that_changes_is_found_and_plain_pyro_runs_from_then_on(tmp_path, elbo, backend):
    file = tmp_path / "scale"
    pair = scaled_pair(lambda: float(file.read_text()))

    def change(step):
        file.write_text("1.0" if step < 11 else "0.25")

    expected = losses(elbo, pair, 40, change)
    with pytest.warns(UserWarning, match=r"an audit found that replay 16 .* agreed was at replay 8") as caught:
        found = losses(CompiledELBO(elbo, backend=backend), pair, 40, change)
    assert len(caught) == 1
    assert caught[0].filename.endswith("svi.py") or caught[0].filename == __file__
    torch.testing.assert_close(found[:11], expected[:11], rtol=1e-5, atol=0)
    assert (found[11:17] - expected[11:17]).abs().min() > 1  # replays 10 to 15
    # from then on it is Pyro's loss, of weights that six wrong steps have moved
    torch.testing.assert_close(found[17:], expected[17:], rtol=0.1, atol=0)


@pytest.mark.parametrize("compile", [True, "eager"])
def test_fit_goes_back_to_where_the_last_audit_agreed(tmp_path, compile):
    file = tmp_path / "scale"
    pair = scaled_pair(lambda: float(file.read_text()))

    class Change:
        """A scheduler that changes the file in the sixth epoch."""

        epoch = 0

        def step(self):
            self.epoch += 1
            file.write_text("1.0" if self.epoch < 6 else "0.25")

    def run(loss):
        file.write_text("1.0")
        pyro.clear_param_store()
        options = {"num_epochs": 60, "batch_size": 16, "learning_rate": 0.05, "seed": 0, "progress": False}
        fit(*pair, X, scheduler=lambda _: Change(), loss=loss, compile=False, **options)
        return pyro.param("a").item()

    expected = run(None)
    loss = CompiledELBO(backend="inductor" if compile is True else "eager")
    with pytest.warns(UserWarning, match=r"fit: an audit .* weights of step 11; what steps 11 to 18 did is undone"):
        assert run(loss) == pytest.approx(expected, abs=0.01)


def audited(drawn):
    """An audit of a graph of x, or of x and a draw, with no gradients; and a replay that is 0.01 off."""
    x, norm = torch.tensor(1.0), torch.zeros(())
    function = (lambda: torch.randn(()) + x) if drawn else (lambda: x + 0)
    _, _, graph = record(lambda weight: [function(), norm], x)
    runs = []
    audit = Audit(graph, lambda args, kwargs: runs.append(audit.replays) or (function(), []), lambda reason: None)
    return audit, runs, lambda off=0.0: LossAndGradients(function() + off, norm, [], []), x


def test_a_sum_that_cancels_or_a_draw_at_its_threshold_is_no_difference():
    """Fused code rounds in another way; it is the recording that has to agree with Pyro, operation by operation."""
    audit, _, run, x = audited(drawn=True)
    for off in (0.0, 0.01, 0.01, 0.0, 0.01, 0.01):
        audit.replays = audit.agreed + 1_000_000
        audit.replay(lambda off=off: run(off), (), {}, [x], fused=True)
    audit.replays = audit.agreed + 1_000_000
    with pytest.raises(RuntimeError, match=r"an audit found .* gives the loss of generated code"):
        audit.replay(lambda: run(0.01), (), {}, [x], fused=True)  # three in a row
    audit, _, run, x = audited(drawn=True)
    audit.replays = 1_000_000
    with pytest.raises(RuntimeError, match="an audit found that replay 1000001 of a recording gives loss"):
        audit.replay(lambda: run(0.01), (), {}, [x], fused=False)


def test_audits_become_rare():
    audit, runs, run, x = audited(drawn=False)
    for _ in range(10_000):
        audit.replay(run, (), {}, [x], fused=False)
    assert runs[:8] == [2, 4, 8, 16, 32, 64, 128, 256]
    gaps = [b - a for a, b in itertools.pairwise(runs[7:])]
    assert min(gaps) >= 200
    assert max(gaps) <= 1000


class Reversed(torch.autograd.Function):
    """The identity, with a gradient that depends on a file."""

    file = None

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float(Reversed.file.read_text())


def test_audits_see_gradients_too(tmp_path):
    Reversed.file = tmp_path / "factor"
    Reversed.file.write_text("1.0")
    model, _ = scaled_pair(lambda: 1.0)

    def guide(x):
        a = pyro.param("a", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(Reversed.apply(a) * x, 1.0))

    compiled = CompiledELBO(backend="eager")
    with pytest.warns(UserWarning, match="an audit found that replay 8 of a recording gives a gradient of norm"):
        losses(compiled, (model, guide), 20, lambda step: Reversed.file.write_text("1.0" if step < 8 else "2.0"))


class Own:
    """State of its own, moved by each run."""

    def __init__(self, kind):
        self.kind, self.n, self.seen, self.last = kind, 0, [], None
        self.count, self.generator = itertools.count(), np.random.default_rng(0)

    def read(self):
        if self.kind == "counter":
            self.n += 1
            return min(1.0, self.n / 30)
        if self.kind == "list":
            self.seen.append(1)
            return min(1.0, len(self.seen) / 30)
        if self.kind == "tensor":
            self.last = torch.tensor(0.1) if self.last is None else self.last + 0.03
            return self.last
        if self.kind == "global":
            global runs
            runs += 1
            return min(1.0, runs / 30)
        if self.kind == "class":
            Own.runs += 1
            return min(1.0, Own.runs / 30)
        return {"random": random.random, "numpy": np.random.rand}[self.kind]()


class Iterating:
    def __init__(self, kind):
        self.own = {"count": itertools.count(), "generator": np.random.default_rng(0)}[kind]

    def read(self):
        return min(1.0, 0.1 + next(self.own) / 30) if isinstance(self.own, itertools.count) else self.own.random()


runs = Own.runs = 0


@pytest.mark.parametrize(
    "kind", ["counter", "list", "tensor", "global", "class", "random", "numpy", "count", "generator"]
)
@pytest.mark.parametrize("decides", [False, True])
def test_state_of_its_own_is_not_replayed(kind, decides):
    """Also where a recording fails half-way: the state has moved once for each step."""
    results = []
    for elbo in (Trace_ELBO(), CompiledELBO(backend="eager")):
        global runs
        runs = Own.runs = 0
        random.seed(0)
        np.random.seed(0)
        own = (Iterating if kind in ("count", "generator") else Own)(kind)
        model, guide = scaled_pair(own.read)

        def deciding(x, model=model):
            model(x)
            if x.sum() > 1e9:  # reads a value
                raise ValueError

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(losses(elbo, (deciding if decides else model, guide), 40, lambda step: None))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)
    assert sum("Pyro runs as it is" in str(w.message) for w in caught) == 1


def test_a_recording_that_fails_leaves_buffers_as_they_were():
    counts = []
    for elbo in (Trace_ELBO(), CompiledELBO(backend="eager")):
        norm = nn.BatchNorm1d(1, momentum=None)

        def model(x, norm=norm):
            loc = norm(x.unsqueeze(-1)).squeeze(-1)
            if loc.sum() > 1e9:
                raise ValueError
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, 1.0))

        guide = scaled_pair(lambda: 1.0)[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses(elbo, (model, guide), 5, lambda step: None)
        counts.append((norm.num_batches_tracked.item(), norm.running_mean.item()))
    assert counts[0] == counts[1]
    assert counts[0][0] == 5


def test_an_audit_leaves_buffers_gradients_and_random_numbers_as_they_were():
    results = []
    for elbo in (Trace_ELBO(), CompiledELBO(backend="eager")):
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(1)

        def model(x, norm=norm):
            pyro.module("norm", norm)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(norm((x + z).unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

        pyro.clear_param_store()
        svi = SVI(model, scaled_pair(lambda: 1.0)[1], pyro.optim.Adam({"lr": 1e-2}), loss=elbo)
        torch.manual_seed(1)
        found = [svi.step(X) for _ in range(70)]  # audits at replays 2, 4, … 64
        results.append((torch.tensor(found), norm.num_batches_tracked.item(), norm.running_var.item(), torch.rand(3)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compile", ["auto", True])
def test_evidence_of_a_model_that_reads_another_number_each_time(tmp_path, compile):
    file = tmp_path / "count"

    def read():  # a counter that nobody watches
        n = int(file.read_text())
        file.write_text(str(n + 1))
        return n

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 0.5 * read(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    file.write_text("0")
    options = {"num_particles": 80, "chunk_size": 48, "progress": False, "compile": compile}
    with pytest.warns(UserWarning, match="particles run one at a time.* chance in it that is no sample site"):
        importance_sampling(model, guide, X, **options)
    assert int(file.read_text()) >= 80  # each particle ran


def test_a_number_of_the_model_that_changes_between_passes(tmp_path):
    """A later replay that differs cannot be mended any more: the passes since the last audit may be wrong."""
    from pyro_vae.evidence.compiled import CompiledLogWeight
    from pyro_vae.particles.sampler import ParticleSampler

    file = tmp_path / "scale"
    file.write_text("1.0")

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, float(file.read_text())), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    draw = CompiledLogWeight(ParticleSampler(model, guide, (X,)), generate_code=False)
    for i in range(12):
        file.write_text("1.0" if i < 5 else "2.0")
        if i < 10:
            draw(4, slice(0, 48))
    with pytest.raises(ValueError, match=r"after 10 passes of 48 rows it gives other log-weights .*Try compile=False"):
        draw(4, slice(0, 48))
