"""The private names of Pyro, torch and ArviZ that the package uses, all of them, and what breaks without each."""

import ast
import importlib
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, TraceMeanField_ELBO
from torch import nn

import pyro_vae

PACKAGE = Path(pyro_vae.__file__).parent


def trace():
    def model():
        x = pyro.deterministic("x", torch.zeros(()))
        pyro.sample("y", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        return x

    return pyro.poutine.trace(pyro.poutine.enum(model, first_available_dim=-1)).get_trace()


def packed():
    found = trace()
    found.symbolize_dims()
    return found


def mcmc():
    run = MCMC(NUTS(lambda: pyro.sample("x", dist.Normal(0.0, 1.0))), num_samples=1, disable_progbar=True)
    run.run()
    return run


def packed_tensor():
    from pyro.ops import packed

    return packed.pack(torch.zeros(2), {-1: "a"})


def subsampled_parameter():
    with pyro.plate("data", 4, subsample_size=2):
        return pyro.param("p", torch.zeros(4), event_dim=0)


def affine():
    return dist.transforms.AffineTransform(0.0, 1.0, cache_size=1)


def mixture():
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0))


# (name, how to get at it, where it is used, what breaks without it)
PARTS = [
    ("_PYRO_STACK", lambda: importlib.import_module("pyro.poutine.runtime"), "compiled/elbo", "handlers around a call"),
    ("_inductor", lambda: torch, "compiled/codegen", "generated code: graphs are replayed operation by operation"),
    ("_pytree", lambda: torch.utils, "compiled", "arguments that are nested"),
    ("_python_dispatch", lambda: torch.utils, "particles/chunks", "passes of a size that fits the caches"),
    ("_getframe", lambda: __import__("sys"), "compiled/recording", "losses that Pyro reads to report them"),
    ("_mask", lambda: dist.Normal(0.0, 1.0).mask(torch.tensor(True)), "pairs/sites", "masks of distributions"),
    ("_args", mcmc, "integrations/arviz", "from_pyro"),
    ("_kwargs", mcmc, "integrations/arviz", "from_pyro"),
    ("_diagnostics", mcmc, "integrations/arviz", "divergences in from_pyro"),
    ("_samples", mcmc, "integrations/arviz", "the check that MCMC has run"),
    ("_validate_args", lambda: dist.Normal(0.0, 1.0), "distributions", "validation of our own distributions"),
    ("_validate_sample", lambda: dist.Normal(0.0, 1.0), "distributions", "validation of values"),
    ("_batch_shape", lambda: dist.Normal(0.0, 1.0), "distributions/gaussians", "expand"),
    ("_event_shape", lambda: dist.Normal(0.0, 1.0), "distributions/gaussians", "expand"),
    ("_extended_shape", lambda: dist.Normal(0.0, 1.0), "distributions/gaussians", "draws"),
    ("_component_distribution", mixture, "distributions/priors", "mixtures whose components are made again"),
    (
        "_cached_x_y",
        lambda: dist.transforms.AffineTransform(0.0, 1.0, cache_size=1),
        "distributions/flows",
        "copies of used flows",
    ),
    ("_version", lambda: torch.zeros(1), "distributions", "draws that are scored without solving for their noise"),
    ("_get_traces", TraceMeanField_ELBO, "objectives/beta", "BetaELBO"),
    ("_optimizer_step_pre_hooks", lambda: torch.optim.Adam([nn.Parameter(torch.zeros(1))]), "compiled/adam", "hooks"),
    ("_optimizer_step_post_hooks", lambda: torch.optim.Adam([nn.Parameter(torch.zeros(1))]), "compiled/adam", "hooks"),
    (
        "_step_supports_amp_scaling",
        lambda: torch.optim.Adam([nn.Parameter(torch.zeros(1))], fused=True),
        "training/steps",
        "steps that are skipped on a GPU without waiting for it",
    ),
    ("_parameters", lambda: nn.Linear(1, 1), "pairs/untouched", "guides that set themselves up"),
    ("_buffers", lambda: nn.Linear(1, 1), "pairs/untouched", "guides that set themselves up"),
    ("_modules", lambda: nn.Linear(1, 1), "pairs/untouched", "guides that set themselves up"),
    ("_pyro_unconstrained_param", subsampled_parameter, "pairs/parameters", "parameters of single rows in fit"),
    ("_pyro_dims", packed_tensor, "pairs/enumeration", "sums over discrete latents"),
]
# keys of Pyro's messages
KEYS = [
    ("_INPUT", lambda: trace().nodes, "arguments of a trace: data that are not finite"),
    ("_deterministic", lambda: trace().nodes["x"]["infer"], "deterministic sites, which carry no probability"),
    ("_enumerate_dim", lambda: trace().nodes["y"]["infer"], "sums over discrete latents"),
    ("_enumerate_symbol", lambda: packed().nodes["y"]["infer"], "sums over discrete latents"),
    ("_dim_to_symbol", lambda: packed().nodes["y"]["infer"], "sums over discrete latents"),
]
KNOWN = {name for name, *_ in [*PARTS, *KEYS]}
STRINGS = {"_", "_dim_", "_plate"}  # of names that we make
PUBLIC = {"_replace"}  # of named tuples


@pytest.mark.parametrize(("name", "get", "where", "breaks"), PARTS, ids=[p[0] for p in PARTS])
def test_the_part_is_there(name, get, where, breaks):
    assert hasattr(get(), name), f"{name} is gone; {where} needs it: {breaks}"


@pytest.mark.parametrize(("name", "get", "breaks"), KEYS, ids=[k[0] for k in KEYS])
def test_the_key_is_there(name, get, breaks):
    assert name in get(), f"{name} is gone: {breaks}"


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def test_every_private_name_is_listed():
    """Attributes, imports and strings that begin with an underscore, and that the package does not define."""
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    own = {n.name for _, n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    own |= {n.id for _, n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {
        n.attr
        for _, n in nodes
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and n.attr not in KNOWN
    }
    found = {}
    for path, n in nodes:
        names = []
        if isinstance(n, ast.Attribute):
            names = [n.attr]
        elif isinstance(n, ast.ImportFrom) and not (n.module or "").startswith("pyro_vae"):
            names = [*(n.module or "").split("."), *(alias.name for alias in n.names)]
            names = [] if n.module == "__future__" else names
        elif isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value.isidentifier():
            names = [n.value]
        for name in names:
            if is_private(name) and name not in own | KNOWN | STRINGS | PUBLIC:
                found.setdefault(name, set()).add(str(path.relative_to(PACKAGE)))
    assert found == {}, f"private names that tests/test_private_parts.py does not list: {found}"
