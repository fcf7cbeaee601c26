"""The private names of Python, Pyro, torch, ArviZ and scikit-learn that the package uses or overrides: all of them."""

import ast
import contextlib
import functools
import importlib
import inspect
import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops import packed
from torch import nn

import pyro_vae

PACKAGE = Path(pyro_vae.__file__).parent

# (where it is, its name, what breaks here without it)
PARTS = [
    ("pyro.poutine.runtime", "_PYRO_STACK", "compiled: handlers around a call are seen"),
    ("pyro.infer.Trace_ELBO", "_get_trace", "objectives, compiled: the traces that an ELBO makes are taken or changed"),
    ("pyro.infer.TraceMeanField_ELBO", "_get_traces", "objectives: BetaELBO"),
    ("pyro.infer.TraceMeanField_ELBO", "_differentiable_loss_particle", "objectives: BetaELBO overrides it"),
    ("a module of Pyro", "_pyro_samples", "models: weights with priors are sampled outside of plates"),
    ("a module of Pyro", "_pyro_context", "models: weights with priors are sampled once in a run"),
    ("torch", "_C", "evidence: LogLikelihood"),
    ("torch._C", "_disabled_torch_function_impl", "evidence: operations on LogLikelihood give plain tensors"),
    ("MCMC that has run", "_args", "integrations: from_pyro"),
    ("MCMC that has run", "_kwargs", "integrations: from_pyro"),
    ("MCMC that has run", "_diagnostics", "integrations: divergences in from_pyro"),
    ("MCMC that has run", "_samples", "integrations: the check that MCMC has run"),
    ("NUTS", "_reset", "integrations: with_statistics"),
    ("NUTS", "_build_basetree", "integrations: with_statistics, the energies of a trajectory's states"),
    ("NUTS", "_build_tree", "integrations: with_statistics, tree depths"),
    ("NUTS", "_kinetic_energy", "integrations: with_statistics, energies"),
    ("NUTS", "_max_tree_depth", "integrations: with_statistics"),
    ("NUTS", "_mean_accept_prob", "integrations: with_statistics, acceptance rates"),
    ("NUTS", "_potential_energy_last", "integrations: with_statistics, energies"),
    ("NUTS", "_t", "integrations: with_statistics"),
    ("NUTS", "_warmup_steps", "integrations: with_statistics"),
    ("NUTS", "_z_last", "integrations: with_statistics, the state that a trajectory ends in"),
    ("a masked distribution", "_mask", "pairs: masks of distributions"),
    ("a parameter of a plate", "_pyro_unconstrained_param", "pairs: parameters of single rows in fit"),
    ("a packed tensor", "_pyro_dims", "pairs: sums over discrete latents"),
    ("nodes of a trace", "_INPUT", "pairs: data that are not finite, in arguments"),
    ("infer of a deterministic site", "_deterministic", "pairs: sites that carry no probability"),
    ("infer of an enumerated site", "_enumerate_dim", "pairs: sums over discrete latents"),
    ("infer of an enumerated site", "_enumerate_symbol", "pairs: sums over discrete latents"),
    ("infer of an enumerated site", "_dim_to_symbol", "pairs: sums over discrete latents"),
    ("torch", "_inductor", "compiled: code is generated; without it graphs are replayed operation by operation"),
    ("torch.utils", "_pytree", "compiled: arguments that are nested"),
    ("torch.utils", "_python_dispatch", "particles: passes of a size that fits the caches"),
    ("torch.Tensor", "_backward_hooks", "compiled: hooks of gradients"),
    ("torch.Tensor", "_post_accumulate_grad_hooks", "compiled: hooks of gradients"),
    ("torch.Tensor", "_version", "distributions: draws that are scored from the noise that made them"),
    ("torch.distributions.Distribution", "_extended_shape", "distributions: draws"),
    ("torch.distributions.Distribution", "_validate_args", "distributions: validation of our own ones"),
    ("torch.distributions.Distribution", "_validate_sample", "distributions: validation of values"),
    ("a distribution", "_batch_shape", "distributions: expand"),
    ("a distribution", "_event_shape", "distributions: expand"),
    ("a mixture", "_component_distribution", "distributions: the support of a mixture"),
    ("a full Gaussian", "_unbroadcasted_scale_tril", "distributions: divergences of torch from and to our Gaussian"),
    ("a low-rank Gaussian", "_unbroadcasted_cov_diag", "distributions: divergences and moments of our low-rank one"),
    ("a low-rank Gaussian", "_unbroadcasted_cov_factor", "distributions: divergences and moments of our low-rank one"),
    ("a low-rank Gaussian", "_capacitance_tril", "distributions: divergences and moments of our low-rank one"),
    ("a transform", "_cached_x_y", "distributions: copies of flows that were used"),
    ("a module", "_parameters", "pairs: guides that set themselves up are left as they were"),
    ("a module", "_buffers", "pairs: guides that set themselves up are left as they were"),
    ("a module", "_modules", "pairs: guides that set themselves up are left as they were"),
    ("an optimizer", "_optimizer_step_pre_hooks", "compiled: hooks of an optimizer"),
    ("an optimizer", "_optimizer_step_post_hooks", "compiled: hooks of an optimizer"),
    ("torch.optim.optimizer", "_global_optimizer_pre_hooks", "compiled: hooks of all optimizers"),
    ("torch.optim.optimizer", "_global_optimizer_post_hooks", "compiled: hooks of all optimizers"),
    ("a fused optimizer", "_step_supports_amp_scaling", "training: steps that are skipped on a GPU without a wait"),
    ("sklearn.base.ClassNamePrefixFeaturesOutMixin", "_n_features_out", "integrations: names of the columns"),
]
STRINGS = {"_", "_dim_", "_given_latents", "_plate"}  # of names that we make
PUBLIC = {"_replace"}  # of named tuples


def traced():
    def model():
        x = pyro.deterministic("x", torch.zeros(()))
        pyro.sample("y", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        return x

    trace = pyro.poutine.trace(pyro.poutine.enum(model, first_available_dim=-1)).get_trace()
    trace.symbolize_dims()
    return trace


def mcmc():
    run = MCMC(NUTS(lambda: pyro.sample("x", dist.Normal(0.0, 1.0))), num_samples=1, disable_progbar=True)
    run.run()
    return run


def parameter_of_a_plate():
    with pyro.plate("data", 4, subsample_size=2):
        return pyro.param("p", torch.zeros(4), event_dim=0)


def adam(**options):
    return torch.optim.Adam([nn.Parameter(torch.zeros(1))], **options)


INSTANCES = {
    "a module of Pyro": pyro.nn.PyroModule,
    "MCMC that has run": mcmc,
    "NUTS": lambda: NUTS(lambda: pyro.sample("x", dist.Normal(0.0, 1.0))),
    "a masked distribution": lambda: dist.Normal(0.0, 1.0).mask(torch.tensor(True)),
    "a parameter of a plate": parameter_of_a_plate,
    "a packed tensor": lambda: packed.pack(torch.zeros(2), {-1: "a"}),
    "nodes of a trace": lambda: traced().nodes,
    "infer of a deterministic site": lambda: traced().nodes["x"]["infer"],
    "infer of an enumerated site": lambda: traced().nodes["y"]["infer"],
    "a distribution": lambda: dist.Normal(0.0, 1.0),
    "a mixture": lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0)),
    "a full Gaussian": lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "a low-rank Gaussian": lambda: dist.LowRankMultivariateNormal(torch.zeros(2), torch.ones(2, 1), torch.ones(2)),
    "a transform": lambda: dist.transforms.AffineTransform(0.0, 1.0, cache_size=1),
    "a module": lambda: nn.Linear(1, 1),
    "an optimizer": adam,
    "a fused optimizer": lambda: adam(fused=True),
}


def find(place):
    """A made instance, or a module or class by its dotted name."""
    if place in INSTANCES:
        return INSTANCES[place]()
    parent, _, name = place.rpartition(".")
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(parent), name)


@pytest.mark.parametrize(("place", "name", "breaks"), PARTS, ids=[f"{place}: {name}" for place, name, _ in PARTS])
def test_the_part_is_there(place, name, breaks):
    found = find(place)
    there = name in found if isinstance(found, dict) else hasattr(found, name) or name in of_classes([found])
    assert there, f"{breaks}, and {name} is gone"


# -- nothing else is used ---------------------------------------------------------------------------------------------


def private(names):
    return {name for name in names if re.match(r"_[A-Za-z]", name)}


def stored(tree):
    """Names of attributes that are assigned to."""
    return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}


def of_classes(classes):
    """Names of their methods and attributes."""
    return set().union(*(_of_class(cls) for cls in classes if inspect.isclass(cls)))


@functools.cache  # to find the source of a class takes a parse of its file
def _of_class(cls):
    names = set(vars(cls))
    with contextlib.suppress(OSError, TypeError):  # it is written in C
        names |= set(re.findall(r"self\.(_\w+)", inspect.getsource(cls)))
    return names


def of_bases(cls):
    """Those of the bases that are not of this package."""
    return of_classes(b for b in cls.__mro__ if b is not object and not b.__module__.startswith("pyro_vae"))


@functools.cache
def used_and_overridden():
    """{private name: files that use a part of others by it, or have one of their own in the place of such a part}"""
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    own = {n.name for _, n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    own |= {n.id for _, n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= set().union(*map(stored, trees.values()))
    found = {}
    for path, tree in trees.items():
        module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
        for c in tree.body:
            if isinstance(c, ast.ClassDef):
                defined = {n.name for n in c.body if isinstance(n, ast.FunctionDef)} | stored(c)
                for name in private(defined & of_bases(getattr(module, c.name))):
                    found.setdefault(name, set()).add(str(path.relative_to(PACKAGE)))
    for path, n in nodes:
        names = []
        if isinstance(n, ast.Attribute):
            names = [n.attr]
        elif isinstance(n, ast.Import) or (isinstance(n, ast.ImportFrom) and not n.module.startswith("pyro_vae")):
            names = [part for a in n.names for part in a.name.split(".")] + (getattr(n, "module", None) or "").split(
                "."
            )
        elif isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value.isidentifier():
            names = [n.value]
        for name in private(names) - own - STRINGS - PUBLIC - {"__future__"}:
            found.setdefault(name, set()).add(str(path.relative_to(PACKAGE)))
    return found


def test_every_private_name_is_listed():
    listed = {name for _, name, _ in PARTS}
    new = {name: sorted(files) for name, files in used_and_overridden().items() if name not in listed}
    assert new == {}, f"add a line to PARTS of tests/test_private_parts.py, or do without: {new}"


def test_nothing_is_listed_that_is_not_used():
    used = used_and_overridden()
    names = {word for path in PACKAGE.rglob("*.py") for word in re.findall(r"\b_[A-Za-z]\w*", path.read_text())}
    assert private({name for _, name, _ in PARTS}) - set(used) - names == set()
