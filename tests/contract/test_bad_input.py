"""Bad input of every public function and argument: it works, or says where, expected, got, try; nothing is changed.

The tables are in `bad_input_calls` and `bad_input_values`, one case and its judgement in `bad_input`.
"""

import random
from collections import Counter

import numpy as np
import pyro
import pytest
import torch
from bad_input import CALLS, cases, kind_of, run
from bad_input_calls import BASES, LIKE_TORCH, MADE_BY_TOOLS, NOT_FOR_USERS, ROOMS
from bad_input_values import VALUES

CASES = list(cases())
BY_ARGUMENT = {}
for _case in CASES:
    BY_ARGUMENT.setdefault((_case.function, _case.parameter), []).append(_case)


@pytest.fixture(scope="module")
def counts():
    """Outcomes of all cases that ran in this process; printed at the end."""
    found = Counter()
    yield found
    print(f"\nbad input: {found.total()} cases of {len(CALLS)} functions: {dict(found)}")  # noqa: T201


@pytest.mark.parametrize("argument", BY_ARGUMENT, ids="-".join)
def test_bad_input(argument, counts, tmp_path, monkeypatch):
    """All cases of one argument: to set up a test takes longer than most cases."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for case in BY_ARGUMENT[argument]:
        found[case.value] = outcome_of(case)
        counts[found[case.value][0]] += 1
    assert {value: f"{outcome}: {text}" for value, (outcome, text) in found.items() if outcome != "fine"} == {}


def outcome_of(case):
    for generator in (np.random.seed, random.seed, torch.default_generator.manual_seed):
        generator(0)
    pyro.clear_param_store()
    outcome, text = run(case)
    if outcome == "slow":  # the first call of its kind may import what it needs
        outcome, text = run(case)
    return outcome, text


def test_there_are_enough():
    assert len(CASES) > 4000
    assert len(set(map(str, CASES))) == len(CASES) == sum(map(len, BY_ARGUMENT.values()))


def test_every_public_name_and_argument_is_in_the_tables():
    known = {name.partition(".")[0] for name in CALLS} | {
        *MADE_BY_TOOLS.split(),
        *LIKE_TORCH.split(),
        *BASES,
        *NOT_FOR_USERS,
    }
    public = {name for room in ROOMS for name in room.__all__ if callable(getattr(room, name))}
    assert public - known == set()
    kinds = {f"{name}({p})": kind_of(name, p) for name, call in CALLS.items() for p in call.parameters}
    assert {argument: kind for argument, kind in kinds.items() if kind not in {*VALUES, "skip"}} == {}


@pytest.mark.filterwarnings("ignore:trying to observe a value outside of inference:RuntimeWarning")
@pytest.mark.parametrize("name", CALLS)
def test_the_call_that_the_cases_change_is_right(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CALLS[name](CALLS[name].arguments())
