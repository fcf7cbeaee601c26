"""The house: which file may import which, and what importing the package must not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_vae

PACKAGE = Path(pyro_vae.__file__).parent
MAY_IMPORT = {
    "networks": set(),
    "gaussians": set(),
    "checks": set(),
    "checkpoint": set(),
    "plots": set(),
    "progress": set(),
    "conditional": set(),
    "elements": set(),
    "discrete": {"conditional", "elements"},
    "priors": {"conditional"},
    "flows": {"conditional"},
    "tables": {"conditional"},
    "distributions": {"conditional", "discrete", "elements", "flows", "gaussians", "priors", "tables"},
    "batches": {"checks"},
    "traces": set(),
    "vectorized": {"traces"},
    "layout": {"traces", "vectorized"},
    "particles": {"checks", "layout", "traces", "vectorized"},
    "densities": {"particles", "traces"},
    "vae": {"checks", "conditional", "traces"},
    "pareto": set(),
    "evidence": {"pareto", "particles", "progress", "traces"},
    "kernels": {"graphs", "particles", "traces"},
    "proposals": {"densities"},
    "importance": {"densities", "evidence", "kernels", "particles", "proposals", "traces"},
    "comparison": {"evidence"},
    "objectives": {"particles", "traces", "vectorized"},
    "beta": {"traces"},
    "imputation": {"checks", "particles", "traces"},
    "diagnostics": {"particles", "traces"},
    "stacking": {"conditional", "training", "vae"},
    "transformer": {"conditional", "distributions", "importance", "networks", "training", "vae"},
    "denoising": set(),
    "sandwich": {"annealing", "evidence", "particles", "traces"},
    "annealing": {"adaptation", "densities", "evidence", "particles", "proposals"},
    "adaptation": {"densities", "evidence", "particles", "proposals"},
    "graphs": set(),
    "watch": set(),
    "compiled": {"graphs", "traces", "watch"},
    "pairs": {"batches", "checks", "traces"},
    "whole_step": {"graphs"},
    "steps": {"batches", "compiled", "pairs", "traces", "whole_step"},
    "resume": {"checkpoint", "pairs", "steps", "traces"},
    "training": {"batches", "compiled", "pairs", "progress", "resume", "steps", "traces"},
    "io_arviz": {"evidence", "particles", "progress", "traces"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_vae"):
            found.add(node.module.partition(".")[2] or "pyro_vae")
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("pyro_vae")}
    return found


@pytest.mark.parametrize("name", sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__"))
def test_arrows_point_down(name):
    assert name in MAY_IMPORT, "a new file: say what it may import"
    assert imports(PACKAGE / f"{name}.py") <= MAY_IMPORT[name]


def test_files_are_short():
    lengths = {p.name: len(p.read_text().splitlines()) for p in PACKAGE.glob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


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
