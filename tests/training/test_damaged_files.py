"""Damaged files, of those of `benchmarks/damaged_files.py`: refused with file and reason, and nothing changed."""

import pytest
from damaged_files import CRAFTED, DAMAGE, KINDS, REFUSED, SAME, Rng, outcome, packed, reference, state_of


@pytest.mark.parametrize("kind", sorted(set(KINDS)))
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_refused_or_gives_the_same(tmp_path, kind, damage):
    for seed in range(3):
        result, message = outcome(kind, damage(kind, Rng(seed), tmp_path), tmp_path)
        assert result in (REFUSED, SAME), message


@pytest.mark.parametrize("i", range(len(CRAFTED)))
def test_a_state_that_nothing_can_go_on_from_is_refused(tmp_path, i):
    """Its checksum fits: all parts of it are held against what they are to replace."""
    state = state_of("fit")
    CRAFTED[i](state, Rng(0))
    result, message = outcome("fit", packed("fit", state), tmp_path)
    assert result == REFUSED, message


@pytest.mark.parametrize("kind", sorted(set(KINDS)))
def test_an_undamaged_file_is_not(tmp_path, kind):
    assert outcome(kind, reference(kind)[0], tmp_path) == (SAME, "")
