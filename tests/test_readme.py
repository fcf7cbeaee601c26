"""The README's Python runs as it stands, block after block, and prints what it says."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README.read_text(), re.DOTALL)


def test_python_blocks_run(capsys):
    pytest.importorskip("sklearn")
    namespace = {}
    for language, code in BLOCKS:
        if language == "python":
            exec(code, namespace)
    printed = capsys.readouterr().out
    shown = next(code for language, code in BLOCKS if not language)
    assert shown.splitlines()[0] in printed  # "Evidence of … data points …"
    assert "0 of 20 points not to trust" in printed  # the second model's guide is exact


def test_exactly_two_set_up_commands():
    commands = [code.strip() for language, code in BLOCKS if language == "bash"]
    assert len(commands) == 2
    assert all(len(command.splitlines()) == 1 for command in commands)


def test_tests_that_are_named_are_there():
    named = set(re.findall(r"`(test_\w+)`", README.read_text()))
    assert named
    assert named <= {path.stem for path in Path(__file__).parent.rglob("test_*.py")}
