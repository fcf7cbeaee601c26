"""What importing the package must not do, what it gives, and how large its rooms are."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_vae

PACKAGE = Path(pyro_vae.__file__).parent
FILES = sorted(p for p in PACKAGE.rglob("*.py"))


def test_files_functions_and_classes_are_short():
    lengths = {p.relative_to(PACKAGE): len(p.read_text().splitlines()) for p in FILES}
    assert {name: n for name, n in lengths.items() if n > 350} == {}
    assert statistics.median(n for name, n in lengths.items() if name.name != "__init__.py") <= 145
    long, wide = {}, {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node) is not None
                body = node.body[documented:]
                if body and body[-1].end_lineno - body[0].lineno + 1 > 60:
                    long[path.name, node.name] = body[-1].end_lineno - body[0].lineno + 1
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(n, ast.FunctionDef) for n in node.body)
                if methods > 15:
                    wide[path.name, node.name] = methods
    assert long == {}
    assert wide == {}


def test_tests_are_short_and_in_the_same_rooms():
    tests = Path(__file__).parent
    lengths = {p.relative_to(tests): len(p.read_text().splitlines()) for p in tests.rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 350} == {}
    rooms = {p.parent.name for p in PACKAGE.glob("*/*.py") if p.name != "__init__.py"}
    assert rooms <= {p.name for p in tests.iterdir() if p.is_dir()}


def test_import_has_no_side_effects():
    code = """
import sys, numpy, torch, pyro
before = (torch.get_default_dtype(), torch.get_num_threads(), torch.random.get_rng_state().sum().item(),
          pyro.settings.get(), torch.distributions.Distribution._validate_args, len(pyro.get_param_store()))
import pyro_vae
after = (torch.get_default_dtype(), torch.get_num_threads(), torch.random.get_rng_state().sum().item(),
         pyro.settings.get(), torch.distributions.Distribution._validate_args, len(pyro.get_param_store()))
assert before == after, (before, after)
print([m for m in ("arviz", "matplotlib", "zuko", "sklearn", "xarray") if m in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_public_names():
    for name in pyro_vae.__all__:
        assert getattr(pyro_vae, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pyro_vae.nonsense
