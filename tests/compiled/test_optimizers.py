"""Compiled steps of torch's optimizers against torch's own, over 40 or 100 steps in double precision."""

import pyro
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam, RMSprop
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from truths import linear_vae

from pyro_vae import CompiledELBO, fit
from pyro_vae.compiled.adam import WholeStep
from pyro_vae.compiled.recording import record_gradients

STEPS, FIT_STEPS = 100, 40
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture
def calls(monkeypatch, by_operation):
    """Counts whole steps."""
    return count_calls(monkeypatch)


def count_calls(monkeypatch):
    calls, original = [], WholeStep.__call__

    def call(self, *arguments):
        calls.append(self)
        return original(self, *arguments)

    monkeypatch.setattr(WholeStep, "__call__", call)
    return calls


# -- fit: 10 epochs of three full batches and a ragged one, or 40 of one batch: a scheduler then moves each step ------


class Freezes:
    """A scheduler of a kind: it freezes the parameters of even positions for some epochs."""

    def __init__(self, optimizer):
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]][::2]
        self.epoch = 0

    def step(self):
        self.epoch += 1
        if self.epoch in (4, 7):
            for p in self.parameters:
                p.requires_grad_(self.epoch == 7)


class Moves:
    """A scheduler of a kind: it moves each number that a group of Adam has."""

    def __init__(self, optimizer):
        self.groups, self.epoch = optimizer.param_groups, 0

    def step(self):
        self.epoch += 1
        for k, group in enumerate(self.groups):
            share = (1 + (self.epoch + 7 * k) % 20) / 20
            group.update(lr=0.01 * share, betas=(0.95 * share, 0.9 + 0.09 * share), eps=1e-6 * share)
            group["weight_decay"] = 0.1 * (1 - share)  # zero at times


def cycle(steps, momenta=(0.5, 0.95)):
    return lambda optimizer: OneCycleLR(
        optimizer, max_lr=0.02, total_steps=steps + 1, base_momentum=momenta[0], max_momentum=momenta[1]
    )


def decaying(optimizer):
    return LambdaLR(optimizer, lambda epoch: 1 / (1 + 0.1 * epoch))


def groups(kind, **options):
    """Two groups with numbers of their own."""
    return lambda parameters: kind(
        [
            {"params": parameters[::2], "lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.05, "eps": 1e-5},
            {"params": parameters[1::2]},
        ],
        lr=0.005,
        **options,
    )


def of(kind, **options):
    return lambda parameters: kind(parameters, **{"lr": 0.01, **options})


def tensors(**options):
    def make(parameters):
        betas = torch.tensor(0.8), torch.tensor(0.99)
        return AdamW(parameters, lr=torch.tensor(0.01), betas=betas, weight_decay=0.1, **options)

    return make


def run(compiled, optimizer, scheduler=None, *, clip_norm=None, every_step=False):
    """The optimizer of a fit, and the parameters."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    vae = linear_vae(2, 5).double()
    x = torch.randn(56, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    made = []
    result = fit(
        vae.model, vae.guide, x[:32] if every_step else x, num_epochs=FIT_STEPS if every_step else FIT_STEPS // 4,
        batch_size=32 if every_step else 16, seed=1, scheduler=scheduler, clip_norm=clip_norm, progress=False,
        optimizer=lambda parameters: made.append(optimizer(parameters)) or made[0],
        compile=False, loss=CompiledELBO() if compiled else None,
    )  # fmt: skip
    assert result.num_steps == FIT_STEPS
    return made[0], list(vae.parameters())


def assert_same(ours, theirs):
    """Parameters and all that the optimizers know of them."""
    (optimizer, parameters), (expected, known) = ours, theirs
    for p, q in zip(parameters, known, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **CLOSE)
        torch.testing.assert_close(dict(optimizer.state.get(p, {})), dict(expected.state.get(q, {})), **CLOSE)


WHOLE = {
    "adam, fused": (of(Adam, fused=True), {"clip_norm": 0.5}),
    "adam, cycle each step": (of(Adam), {"scheduler": cycle(FIT_STEPS), "every_step": True}),
    "adam, no betas": (of(Adam, betas=(0.0, 0.0), eps=1e-3), {}),
    "adamw, numbers are tensors": (tensors(), {"scheduler": decaying}),
    "adamw, fused, numbers are tensors": (tensors(fused=True), {"scheduler": decaying}),
    "adam, groups": (groups(Adam), {"scheduler": cycle(FIT_STEPS // 4), "clip_norm": 0.5}),
    "adam, all numbers move": (groups(Adam), {"scheduler": Moves, "every_step": True}),
    "adam, one by one, decoupled": (of(Adam, foreach=False, weight_decay=0.1, decoupled_weight_decay=True), {}),
    "adam, frozen and not": (groups(Adam), {"scheduler": Freezes, "clip_norm": 0.5}),
    "adamw, cycle each step": (of(AdamW, weight_decay=0.1), {"scheduler": cycle(FIT_STEPS), "every_step": True}),
    "adamw, groups": (groups(AdamW, weight_decay=0.2), {"scheduler": decaying}),
    "adamw, all numbers move": (groups(AdamW), {"scheduler": Moves}),
    "adamw, fused, frozen and not": (of(AdamW, fused=True), {"scheduler": Freezes}),
}


# the two whose numbers move in each step: the others would take seconds each, for code of the same operations
GENERATED = ["adam, all numbers move", "adamw, cycle each step"]


@pytest.mark.parametrize("case", [case for case in WHOLE if case not in GENERATED])
def test_whole_steps_are_those_of_torch(case, calls):
    optimizer, options = WHOLE[case]
    expected = run(False, optimizer, **options)
    assert not calls
    assert_same(run(True, optimizer, **options), expected)
    assert len(calls) >= FIT_STEPS // 4  # where shapes change, a recording is made late


@pytest.mark.parametrize("case", GENERATED)
def test_generated_code_takes_the_steps_of_torch(case, monkeypatch):
    optimizer, options = WHOLE[case]
    expected, calls = run(False, optimizer, **options), count_calls(monkeypatch)
    assert_same(run(True, optimizer, **options), expected)
    assert len(calls) >= FIT_STEPS // 4


PLAIN = {
    "sgd": (of(SGD), {"clip_norm": 0.5}),
    "sgd, momentum, cycle each step": (
        of(SGD, momentum=0.9, weight_decay=0.1),
        {"scheduler": cycle(FIT_STEPS), "every_step": True},
    ),
    "sgd, nesterov": (of(SGD, momentum=0.9, nesterov=True), {"scheduler": Freezes}),
    "rmsprop": (of(RMSprop, momentum=0.5, centered=True), {"scheduler": decaying}),
    "nadam": (of(NAdam, weight_decay=0.1, decoupled_weight_decay=True), {"scheduler": cycle(FIT_STEPS // 4)}),
    "amsgrad": (of(Adam, amsgrad=True), {"scheduler": cycle(FIT_STEPS // 4)}),
    "adamw, amsgrad": (groups(AdamW, amsgrad=True), {}),
    "maximize": (of(Adam, maximize=True, lr=1e-4), {}),
}


@pytest.mark.parametrize("case", PLAIN)
def test_other_optimizers_take_their_own_steps_on_compiled_gradients(case, calls):
    optimizer, options = PLAIN[case]
    assert_same(run(True, optimizer, **options), run(False, optimizer, **options))
    assert not calls


# -- what changes beside the numbers of the groups ---------------------------------------------------------------------


class Problem:
    """A regression on other rows in each step: a matrix, a vector, a number, and a parameter that is trained later."""

    def __init__(self, dtype=torch.float64):
        torch.manual_seed(5)
        draws = [torch.randn(shape, dtype=dtype) for shape in ((4, 3), (3,), ())]
        self.parameters = [nn.Parameter(draw) for draw in (*draws, torch.randn(3, dtype=torch.float64))]
        self.rows = torch.randn(STEPS, 8, 4, dtype=dtype)
        self.later = self.parameters[-1]

    def loss(self, x):
        weight, bias, scale, later = self.parameters
        y = (x @ weight + bias) * scale.exp() + later.sin()
        return (y - x[:, 1:].cos()).square().mean()

    def optimizer(self, kind=Adam, **options):
        weight, bias, scale, _ = self.parameters
        return kind([{"params": [weight, scale], "weight_decay": 0.1}, {"params": [bias]}], lr=0.01, **options)


def train_by_torch(problem, optimizer, events, clip_norm=None):
    for t, x in enumerate(problem.rows):
        events.get(t, lambda *_: None)(optimizer, problem)
        for p in problem.parameters:
            p.grad = None
        problem.loss(x).backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(problem.parameters, clip_norm)
        optimizer.step()


def train_whole(problem, optimizer, events, clip_norm=None):
    """The number of whole steps."""

    def function(x):
        loss = problem.loss(x)
        loss.backward()
        return [loss.detach()]

    one = torch.ones((), dtype=torch.float64)
    _, _, graph = record_gradients(function, problem.rows[0], weight=one)
    whole, taken, stopped = None, 0, torch.zeros((), dtype=torch.bool)
    for t, x in enumerate(problem.rows):
        events.get(t, lambda *_: None)(optimizer, problem)
        if whole is None and WholeStep.fits(optimizer, graph):
            whole = WholeStep(graph, optimizer, clip_norm)
        if whole is not None and whole.holds():
            whole(stopped, x, one)
            taken += 1
            continue
        if whole is not None:
            whole.settle()
        (_, norm), gradients = graph(x, one)
        for leaf, gradient in zip(graph.leaves, gradients, strict=True):
            leaf.grad = gradient
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(graph.leaves, clip_norm, norm)
        optimizer.step()
        if whole is not None:
            whole.resume()
    whole.settle()
    return taken


def loaded(optimizer, problem):
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry.update(step=torch.tensor(3.0), exp_avg=entry["exp_avg"] * 2)
    optimizer.load_state_dict(state)


def counts_set(optimizer, problem):
    for p in problem.parameters[:2]:
        optimizer.state[p]["step"].fill_(1)


def moment_replaced(optimizer, problem):
    optimizer.state[problem.parameters[0]]["exp_avg"] = torch.ones(4, 3, dtype=torch.float64)


def moved_to_another_group(optimizer, problem):
    first, second = optimizer.param_groups
    second["params"].append(first["params"].pop(0))


def toggled(name):
    def toggle(optimizer, problem):
        optimizer.param_groups[0][name] = not optimizer.param_groups[0][name]

    return toggle


def hooked(optimizer, problem):
    def halve(optimizer, args, kwargs):
        for p in problem.parameters:
            p.grad *= 0.5

    problem.hook = optimizer.register_step_pre_hook(halve)


def replaced(optimizer, problem):
    def step():
        type(optimizer).step(optimizer)
        with torch.no_grad():
            problem.parameters[0].mul_(0.99)

    optimizer.step = step


CHANGES = {  # and how many of the 99 steps that follow the first are not whole
    "nothing": ({}, 0),
    "state is loaded": ({25: loaded, 60: loaded}, 2),
    "counts are set": ({25: counts_set, 60: counts_set}, 2),
    "state is forgotten": ({25: lambda optimizer, problem: optimizer.state.pop(problem.parameters[0])}, 1),
    "a moment is another tensor": ({25: moment_replaced}, 1),
    "a group is added": ({25: lambda optimizer, problem: optimizer.add_param_group({"params": problem.later})}, 1),
    "a parameter moves to another group": ({25: moved_to_another_group}, 1),
    "a parameter is left out": ({25: lambda optimizer, _: optimizer.param_groups[0]["params"].pop(0)}, 1),
    "decay is decoupled": ({25: toggled("decoupled_weight_decay"), 60: toggled("decoupled_weight_decay")}, 2),
    "maximize": ({25: toggled("maximize"), 60: toggled("maximize")}, 36),
    "a hook": ({25: hooked, 60: lambda _, problem: problem.hook.remove()}, 36),
    "another step": ({25: replaced, 60: lambda optimizer, _: vars(optimizer).pop("step")}, 36),
}


@pytest.mark.parametrize(("kind", "case"), [(Adam, "nothing"), *((AdamW, case) for case in CHANGES)])
def test_changes_are_seen(kind, case, calls):
    events, aside = CHANGES[case]
    clip_norm = 1.0 if kind is AdamW else None
    ours, theirs = Problem(), Problem()
    optimizer, expected = ours.optimizer(kind), theirs.optimizer(kind)
    train_by_torch(theirs, expected, events, clip_norm)
    assert train_whole(ours, optimizer, events, clip_norm) == STEPS - 1 - aside
    assert_same((optimizer, ours.parameters), (expected, theirs.parameters))


@pytest.mark.parametrize("generated", [False, True])
def test_single_beside_double_precision(generated, monkeypatch, request):
    """A parameter without dimensions keeps its dtype beside the scalars."""
    if not generated:
        request.getfixturevalue("calls")
    ours, theirs = Problem(torch.float32), Problem(torch.float32)
    optimizers = [AdamW(problem.parameters, lr=0.01, eps=1e-4, fused=True) for problem in (ours, theirs)]
    train_by_torch(theirs, optimizers[1], {})
    assert train_whole(ours, optimizers[0], {}) == STEPS - 1
    for p, q in zip(ours.parameters, theirs.parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_optimizers_that_it_does_not_take():
    problem = Problem()
    _, _, graph = record_gradients(lambda x: [problem.loss(x)], problem.rows[0], weight=torch.ones(()))
    assert not graph.leaves
    parameters = problem.parameters
    assert WholeStep.fits(Adam(parameters), graph)
    assert WholeStep.fits(AdamW(parameters), graph)
    assert not WholeStep.fits(type("Adam", (Adam,), {})(parameters), graph)
    for optimizer in (SGD(parameters), Adam(parameters, amsgrad=True), AdamW(parameters, maximize=True)):
        assert not WholeStep.fits(optimizer, graph)
