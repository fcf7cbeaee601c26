"""Which code belongs to libraries, and which to the user.

Libraries are told by whole names of packages, and by where these are installed: `torch_nets` is not in `torch`, and a
script's own `statistics.py` is not Python's.
"""

from __future__ import annotations

import inspect
import site
import sys
import sysconfig
import warnings
from functools import lru_cache
from pathlib import Path

__all__ = ["FRAMEWORK", "USER", "holder", "is_library", "warn"]

OWN = frozenset({"torch", "numpy", "pyro", __name__.partition(".")[0]})  # wherever they are installed
INSTALLED = frozenset(
    {
        *("arviz", "funsor", "functorch", "h5py", "jax", "jaxlib", "matplotlib", "networkx", "numpyro", "opt_einsum"),
        *("fsspec", "jinja2", "mpmath", "packaging", "pytest", "sympy", "typing_extensions"),
        *("pandas", "PIL", "scipy", "sklearn", "torchvision", "tqdm", "xarray", "zuko"),
    }
)

USER, LIBRARY, FRAMEWORK = 0, 1, 2  # whose an object is: those of frameworks make things anew in each run, as scratch


def holder(module: str | None) -> int:
    """Whose objects the classes of this module make, and whose functions stand in it."""
    if not is_library(module):
        return USER
    return FRAMEWORK if str(module).partition(".")[0] in ("torch", "pyro", "pyro_vae", "zuko") else LIBRARY


def is_library(module: str | None) -> bool:
    """Whether the module of this name is one of a library that changes nothing by itself."""
    return _is_library_package(str(module).partition(".")[0])  # what is no string is none of a library's


@lru_cache(maxsize=1000)
def _is_library_package(package: str) -> bool:
    if package in OWN or package == "builtins":
        return True
    if package.lstrip("_") not in INSTALLED and package not in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(package), "__file__", None)
    return file is None or any(folder in Path(file).resolve().parents for folder in _folders())


@lru_cache(maxsize=1)
def _folders() -> frozenset[Path]:
    """Where Python keeps its own modules and those that are installed."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return frozenset(Path(path).resolve() for path in (*paths, *site.getsitepackages(), site.getusersitepackages()))


def warn(message: str) -> None:
    """Warns at the line of the user's code from which all this was called."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_back is not None and is_library(frame.f_globals.get("__name__")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
