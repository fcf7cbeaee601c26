"""The wheel and the sdist hold every sub-package, and what is installed from them can be imported."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in (ROOT / "pyro_vae").rglob("*.py")
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Of the tracked files alone, as from a clean clone."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, files.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    code = f"from setuptools import build_meta as b; b.build_wheel({str(out)!r}); b.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=source, check=True, capture_output=True)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_both_hold_every_module(built):
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "pyro_vae").rglob("*.py")} | {"pyro_vae/py.typed"}
    with zipfile.ZipFile(built[0]) as wheel, tarfile.open(built[1]) as sdist:
        assert expected <= set(wheel.namelist())
        assert expected <= {name.partition("/")[2] for name in sdist.getnames()}
        assert not [name for name in wheel.namelist() if name.startswith(("tests", "benchmarks"))]


def test_an_installed_wheel_can_be_imported(built, tmp_path):
    """In a fresh environment over this one's packages, and not from this checkout."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    place = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], capture_output=True, check=True
    )
    site = Path(place.stdout.decode().strip())
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, built[0]]
    subprocess.run(install, check=True)
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others))  # after the wheel's own place
    code = f"""
import importlib, pyro_vae
assert pyro_vae.__file__.startswith({str(site)!r}), pyro_vae.__file__
for name in {MODULES!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([python, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PACKAGES = {"pyro": "pyro-ppl", "sklearn": "scikit-learn"}  # of modules with another name


def test_extras_hold_what_the_examples_import():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["examples"]]
    wanted += extras["flows"] if "pyro-vae[flows]" in wanted else []
    listed = {re.split(r"[^\w-]", requirement)[0] for requirement in wanted}
    files = list((ROOT / "examples").rglob("*.py"))
    imported = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    ours = {path.stem for path in files} | {path.parent.name for path in files} | {"pyro_vae"}
    others = imported - ours - sys.stdlib_module_names
    assert {PACKAGES.get(name, name) for name in others} - listed == set()
