"""`checked`: arguments whose names mean the same everywhere are held to it, at the door of each public function.

A count is a count whether it is called `num_particles` or `num_epochs`, and comes as an int, a NumPy integer or a
tensor of one integer. `checked` looks at the names of a function's parameters, checks those that `KINDS` has, and hands
on plain Python numbers. What depends on more than the one argument is checked by the function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch

from pyro_vae.arguments.tensors import check_tensors
from pyro_vae.arguments.values import (
    check_choice,
    check_count,
    check_elbo,
    check_end,
    check_features,
    check_flag,
    check_function,
    check_mapping,
    check_name,
    check_names,
    check_number,
    check_path,
    check_positive,
    check_seed,
    check_shape,
    check_two,
)

__all__ = ["checked"]

P = ParamSpec("P")
R = TypeVar("R")

share = partial(check_number, low=0.0, high=1.0, what="a probability between 0 and 1")
positive = partial(check_number, low=0.0, what="a positive number")
COUNTS = """num_particles num_samples num_epochs num_draws num_simulations num_temperatures num_leapfrog patience
    cache_size rank num_components num_categories period kernel_size stride in_features out_features total num"""
NAMES: dict[str, Callable[[str, Any], Any]] = {  # of one or several parameters, or of a parameter of one function
    COUNTS: check_count,
    "from_pyro.num_particles": partial(check_count, least=0),  # none: the log-likelihood is not integrated
    "num_steps num_simulated context_size": partial(check_count, least=0),
    "batch_size chunk_size": partial(check_count, most=2**63 - 1),
    "progress smooth resample mean doubly_reparameterized": check_flag,
    "clip_norm": partial(check_number, low=0.0, what="a positive norm"),
    "learning_rate": partial(check_number, low=0.0, ends="[)", what="a number of at least 0"),
    "spread smallest init": positive,
    "defensive": partial(share, ends="[)", what="a share of the particles in [0, 1)"),
    "dropout": partial(share, ends="[)"),
    "probability": partial(share, ends="[]"),
    "level": share,
    "rising": partial(share, ends="(]"),
    "threshold": partial(check_number, low=0.0, ends="[)", what="a number of at least 0"),
    "compile parallel adaptive": partial(check_choice, options=(True, False, "auto")),
    "plate": partial(check_name, what="the name of the plate of data points", advice='plate="data"'),
    "name prefix role": check_name,
    "event_shape in_shape shape": check_shape,
    "features": check_features,
    "hidden_sizes channels out_size": partial(check_shape, single=False),
    "low high": check_end,
    "limits values": check_two,
    "seed": check_seed,
    "checkpoint": check_path,
    "data validation_data": partial(check_tensors, nested=False),
    "loss elbo": check_elbo,
    "exact_draw draws coords dims stack": check_mapping,
    "kinds given": check_names,
    "scale df total_count concentration": check_positive,
    "decode": check_function,
    "inputs": partial(check_function, what="a function of the arguments", advice="inputs=lambda x: x"),
    "activation estimator": partial(check_function, classes=True),
    "network": partial(check_function, what="a module that maps rows of inputs to features", advice="MLP(3, [64])"),
}
KINDS = {name: check for names, check in NAMES.items() for name in names.split()}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose arguments are checked by their names, before anything else happens.

    None is taken where the annotation has it. Arguments that model and guide are called with (`*args`, `**kwargs`) may
    be anything, apart from arrays that would be misread.

    Raises:
        ValueError: a number out of range, or something that is none of the values known.
        TypeError: something else altogether.

    Example:
        >>> import numpy as np
        >>> @checked
        ... def draw(*, num_particles: int = 3):
        ...     return num_particles
        >>> draw(num_particles=np.int64(5))
        5
        >>> draw(num_particles="5")
        Traceback (most recent call last):
        TypeError: draw: num_particles: expected a whole number, got '5', a str. Try an int, such as 10.
    """
    signature = inspect.signature(function)
    kinds, optional, rest = {}, set(), []
    for p in signature.parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            rest.append(p.name)
        elif (check := KINDS.get(f"{function.__name__}.{p.name}", KINDS.get(p.name))) is not None:
            kinds[p.name] = check
            if "None" in str(p.annotation):
                optional.add(p.name)
    of_class = function.__name__ == "__init__"

    @wraps(function)
    def with_checks(*args: P.args, **kwargs: P.kwargs) -> R:
        where = type(args[0]).__name__ if of_class else function.__name__
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python's own words for arguments that are missing or too many
        given = bound.arguments
        for name in rest:
            check_tensors(f"{where}: {name}", given.get(name, ()))
        for name, value in given.items():
            if name in kinds and not (value is None and name in optional):
                given[name] = kinds[name](f"{where}: {name}", value)
        if not of_class:
            return function(*bound.args, **bound.kwargs)
        before = torch.get_rng_state()
        try:
            return function(*bound.args, **bound.kwargs)
        except Exception:
            torch.set_rng_state(before)  # weights that were drawn before something else did not fit
            raise

    return with_checks
