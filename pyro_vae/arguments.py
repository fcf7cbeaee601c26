"""Arguments, checked at the door of each public function: names that mean the same everywhere are held to it.

A count is a count whether it is called `num_particles` or `num_epochs`, and comes as an int, a NumPy integer or a
tensor of one integer. `checked` looks at the names of a function's parameters, checks those that `KINDS` has, and hands
on plain Python numbers. What depends on more than the one argument is checked by the function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial, wraps
from math import inf, isfinite
from os import PathLike
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "check_choice",
    "check_count",
    "check_function",
    "check_mapping",
    "check_name",
    "check_names",
    "check_number",
    "check_positive",
    "check_seed",
    "check_shape",
    "checked",
    "refuse_unusual",
]

P = ParamSpec("P")
R = TypeVar("R")
LARGEST = 2**31 - 1


def check_count(where: str, value: Any, *, least: int = 1, most: int = LARGEST) -> int:
    """A whole number as an int.

    Example:
        >>> check_count("num_particles", torch.tensor(3))
        3
        >>> check_count("num_particles", 2.5)
        Traceback (most recent call last):
        ValueError: num_particles: expected a whole number, got 2.5. Try an int, such as 2.
    """
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, int):
        error = ValueError if isinstance(plain, float) else TypeError
        advice = int(plain) if isinstance(plain, float) and isfinite(plain) and plain >= least else max(least, 10)
        raise error(f"{where}: expected a whole number, got {_shown(value)}. Try an int, such as {advice}.")
    if plain < least:
        raise ValueError(f"{where}: expected at least {least}, got {plain}. Try {max(least, 10)}.")
    if plain > most:
        raise ValueError(f"{where}: expected at most {most}, got {plain}. Try a smaller number.")
    return plain


def check_number(
    where: str, value: Any, *, low: float = -inf, high: float = inf, ends: str = "()", what: str = "a finite number"
) -> float:
    """A finite number between `low` and `high`; brackets in `ends` include these.

    Example:
        >>> check_number("defensive", np.float32(0.5), low=0, high=1, ends="[)")
        0.5
    """
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, (int, float)):
        raise TypeError(f"{where}: expected {what}, got {_shown(value)}. Try {_between(low, high)}.")
    above = plain >= low if ends[0] == "[" else plain > low
    below = plain <= high if ends[1] == "]" else plain < high
    if not (isfinite(plain) and above and below):
        raise ValueError(f"{where}: expected {what}, got {plain}. Try {_between(low, high)}.")
    return plain


def check_seed(where: str, value: Any) -> int:
    """A seed that torch, NumPy and Python take, as an int."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, int) or not 0 <= plain < 2**32:
        error = ValueError if isinstance(plain, (int, float)) else TypeError
        raise error(f"{where}: expected a whole number from 0 to 2³² − 1, or None, got {_shown(value)}. Try seed=0.")
    return plain


def check_flag(where: str, value: Any) -> bool:
    plain = _plain(value)
    if not isinstance(plain, bool):
        raise TypeError(f"{where}: expected True or False, got {_shown(value)}. Try True.")
    return plain


def check_choice(where: str, value: Any, options: Collection[Any]) -> None:
    """Raises ValueError unless the value is one of the options, which are strings, flags or None."""
    plain = _plain(value)
    if not any(type(plain) is type(option) and plain == option for option in options):
        *first, last = map(repr, options)
        raise ValueError(f"{where}: expected {', '.join(first)} or {last}, got {_shown(value)}. Try {last}.")


def check_name(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{where}: expected a name, got {_shown(value)}. Try a str.")
    return value


def check_path(where: str, value: Any) -> Any:
    if not isinstance(value, (str, PathLike)):
        raise TypeError(f'{where}: expected the name of a file, got {_shown(value)}. Try "fit.pt".')
    return value


def check_mapping(where: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise TypeError(f"{where}: expected a dict by name, got {_shown(value)}. Try {{name: …}}.")
    return value


def check_names(where: str, value: Any) -> tuple[str, ...]:
    """Several names as a tuple; one name is no sequence of its letters."""
    if isinstance(value, str) or not isinstance(value, Iterable) or not all(isinstance(x, str) for x in value):
        raise TypeError(f"{where}: expected a sequence of names, got {_shown(value)}. Try ('z',).")
    return tuple(value)


def check_positive(where: str, value: Any) -> Any:
    """A positive number, a tensor of these, or a module that gives them."""
    if isinstance(value, torch.nn.Module):
        return value
    if not isinstance(value, Tensor) or value.dim() == 0:
        return check_number(where, value, low=0.0, what="a positive number, a tensor of these or a module")
    if value.is_complex() or value.is_meta or not ((value > 0) & value.isfinite()).all():
        raise ValueError(f"{where}: expected a positive number or tensor, got {_shown(value)}. Try 1.0, or a module.")
    return value


def check_function(
    where: str, value: Any, what: str = "a function", advice: str = "lambda x: …", *, classes: bool = False
) -> Any:
    """Raises TypeError for what cannot be called, and for a class, which would be made and not run."""
    if not callable(value) or isinstance(value, Tensor) or (isinstance(value, type) and not classes):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{where}: expected {what}, got {got}. Try {advice}.")
    return value


def check_shape(where: str, value: Any, *, least: int = 1, single: bool = True) -> tuple[int, ...]:
    """A shape as a tuple of ints; with `single`, an int is the length of a vector.

    Example:
        >>> check_shape("event_shape", np.int64(3)), check_shape("event_shape", [28, 28])
        ((3,), (28, 28))
    """
    plain = _plain(value)
    if single and isinstance(plain, (int, float)):
        return (check_count(where, plain, least=least),)
    if not isinstance(plain, (Sequence, np.ndarray, Tensor)) or isinstance(plain, (str, bytes)):
        one = "an int or a tuple" if single else "a list or tuple"
        raise TypeError(f"{where}: expected {one} of sizes, got {_shown(value)}. Try {'3, or ' * single}(8, 8).")
    return tuple(check_count(f"{where}[{i}]", n, least=least) for i, n in enumerate(plain))


def check_features(where: str, value: Any) -> int | tuple[int, ...]:
    """The width of a vector, or the shape of a feature map: not the same as a shape of one dimension."""
    shape = check_shape(where, value)
    return shape if isinstance(value, Sequence) else shape[0]


# -- tensors ----------------------------------------------------------------------------------------------------------


def check_tensors(where: str, value: Any) -> Any:
    """Raises TypeError for arrays in `value` that would be taken for something else: masked ones, whose mask nobody
    reads, and tensors on the device "meta", which have no numbers."""
    for path, x in _leaves(where, value):
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(
                f"{path}: expected an array without a mask, which is not read, got a masked array. Try "
                "x.filled(np.nan), with ObservedPart(likelihood) and MaskedInput(network), or x.data where none is "
                "missing."
            )
        if isinstance(x, Tensor) and x.is_meta:
            raise TypeError(f'{path}: expected a tensor with values, got one on device "meta". Try device="cpu".')
    return value


def refuse_unusual(where: str, value: Any, error: BaseException) -> None:
    """Raises TypeError if there is something in `value` that may have led to this error: anything but a dense tensor
    of numbers, which a model may take, and most do not."""
    for path, x in _leaves(where, value):
        got, advice = _unusual(x)
        if got is not None:
            raise TypeError(
                f"{path}: expected rows in a dense tensor of real numbers, as model and guide seem to take, got {got}. "
                f"Try {advice}. The error was: {type(error).__name__}: {error}"
            ) from error


def _unusual(x: Any) -> tuple[str | None, str]:
    if isinstance(x, Tensor):
        if x.is_nested or x.layout is not torch.strided:
            return ("a nested tensor", "x.to_padded_tensor(0.0)") if x.is_nested else ("a sparse one", "x.to_dense()")
        if x.is_complex() or x.is_quantized:
            return f"one of {x.dtype}", "torch.view_as_real(x)" if x.is_complex() else "x.dequantize()"
        if x.numel() == 0:
            return f"an empty one of shape {tuple(x.shape)}", "at least one row"
        return None, ""
    if isinstance(x, np.ndarray):
        return f"a numpy array of {x.dtype}", "torch.from_numpy(x.astype(np.float32))"
    if type(x).__name__ in ("DataFrame", "Series"):
        return f"a {type(x).__name__}", 'torch.from_numpy(x.to_numpy("float32"))'
    if x is None or isinstance(x, (bool, int)):  # flags and sizes
        return None, ""
    return _shown(x), "torch.as_tensor(…)"


def _leaves(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, x in value.items():
            yield from _leaves(f"{where}[{key!r}]", x)
    elif isinstance(value, (tuple, list)) and any(
        isinstance(x, (Tensor, np.ndarray, tuple, list, dict)) for x in value
    ):
        for i, x in enumerate(value):
            yield from _leaves(f"{where}[{i}]", x)
    else:
        yield where, value


# -- all arguments of a function ---------------------------------------------------------------------------------------

share = partial(check_number, low=0.0, high=1.0, what="a number between 0 and 1")
positive = partial(check_number, low=0.0, what="a positive number")
COUNTS = """num_particles num_samples num_epochs num_draws num_simulations num_temperatures num_leapfrog patience
    cache_size rank num_components num_categories period kernel_size stride in_features out_features size total num"""
NAMES: dict[str, Callable[[str, Any], Any]] = {  # of one or several parameters
    COUNTS: check_count,
    "num_steps num_simulated context_size": partial(check_count, least=0),
    "batch_size chunk_size": partial(check_count, most=2**63 - 1),
    "progress smooth resample mean doubly_reparameterized": check_flag,
    "learning_rate clip_norm spread smallest init": positive,
    "defensive dropout": partial(share, ends="[)"),
    "probability": partial(share, ends="[]"),
    "level": share,
    "rising": partial(share, ends="(]"),
    "threshold": partial(check_number, low=0.0, ends="[)", what="a number of at least 0"),
    "compile parallel adaptive": partial(check_choice, options=(True, False, "auto")),
    "plate name prefix role": check_name,
    "event_shape in_shape shape": check_shape,
    "features": check_features,
    "hidden_sizes channels out_size": partial(check_shape, single=False),
    "seed": check_seed,
    "checkpoint": check_path,
    "data validation_data": check_tensors,
    "exact_draw draws coords dims stack": check_mapping,
    "kinds given": check_names,
    "scale df total_count concentration": check_positive,
    "decode inputs": check_function,
    "activation estimator": partial(check_function, classes=True),
    "network": partial(check_function, what="a module", advice="MLP(3, [64])"),
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
        elif p.name in KINDS:
            kinds[p.name] = KINDS[p.name]
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
                given[name] = _checked(kinds[name], f"{where}: {name}", value)
        if not of_class:
            return function(*bound.args, **bound.kwargs)
        before = torch.get_rng_state()
        try:
            return function(*bound.args, **bound.kwargs)
        except Exception:
            torch.set_rng_state(before)  # weights that were drawn before something else did not fit
            raise

    return with_checks


def _checked(check: Callable, where: str, value: Any) -> Any:
    found = check(where, value)
    return value if found is None else found


def _plain(value: Any) -> Any:
    """A number of NumPy, or a tensor of one number, as one of Python; anything else as it is."""
    if isinstance(value, Tensor):
        return value.item() if value.dim() == 0 and value.layout is torch.strided and not value.is_meta else value
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    return value


def _shown(value: Any) -> str:
    """A value for a message, in one short line."""
    plain = _plain(value)
    if plain is None or isinstance(plain, (bool, int, float)):
        return repr(plain)
    if isinstance(plain, (Tensor, np.ndarray)):
        return f"a {type(plain).__name__} of shape {tuple(plain.shape)}" if not _nested(plain) else "a nested tensor"
    if isinstance(plain, type):
        return f"the class {plain.__name__}"
    text = repr(plain)
    return f"{text}, a {type(plain).__name__}" if len(text) < 40 else f"a {type(plain).__name__}"


def _nested(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_nested


def _between(low: float, high: float) -> str:
    if high < inf:
        return f"{(low + high) / 2:g}"
    return f"{low + 1:g}" if low > -inf else "0.0"
