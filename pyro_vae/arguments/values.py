"""What a single argument has to be: each check gives the value back in plain Python, or says what was expected."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import inf
from os import PathLike
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO
from torch import Tensor

__all__ = [
    "LARGEST",
    "as_plain",
    "check_choice",
    "check_count",
    "check_elbo",
    "check_end",
    "check_features",
    "check_flag",
    "check_function",
    "check_mapping",
    "check_name",
    "check_names",
    "check_number",
    "check_path",
    "check_positive",
    "check_seed",
    "check_shape",
    "check_two",
    "shown",
]

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
    plain = as_plain(value)
    if isinstance(plain, bool) or not isinstance(plain, int):
        error = ValueError if isinstance(plain, float) else TypeError
        advice = int(plain) if isinstance(plain, float) and least <= plain < inf else max(least, 10)
        raise error(f"{where}: expected a whole number, got {shown(value)}. Try an int, such as {advice}.")
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
    plain = as_plain(value)
    if isinstance(plain, bool) or not isinstance(plain, (int, float)):
        raise TypeError(f"{where}: expected {what}, got {shown(value)}. Try {_between(low, high)}.")
    above = plain >= low if ends[0] == "[" else plain > low
    below = plain <= high if ends[1] == "]" else plain < high
    if not (-inf < plain < inf and above and below):
        raise ValueError(f"{where}: expected {what}, got {plain}. Try {_between(low, high)}.")
    return plain


def check_seed(where: str, value: Any) -> int:
    """A seed that torch, NumPy and Python take, as an int."""
    plain = as_plain(value)
    if isinstance(plain, bool) or not isinstance(plain, int) or not 0 <= plain < 2**32:
        error = ValueError if isinstance(plain, (int, float)) else TypeError
        raise error(f"{where}: expected a whole number from 0 to 2³² − 1, or None, got {shown(value)}. Try seed=0.")
    return plain


def check_flag(where: str, value: Any) -> bool:
    plain = as_plain(value)
    if not isinstance(plain, bool):
        raise TypeError(f"{where}: expected True or False, got {shown(value)}. Try True.")
    return plain


def check_choice(where: str, value: Any, options: Collection[Any]) -> Any:
    """One of the options, which are strings, flags or None."""
    plain = as_plain(value)
    if not any(type(plain) is type(option) and plain == option for option in options):
        *first, last = map(repr, options)
        known = f"{', '.join(first)} or {last}"
        if all(isinstance(option, str) for option in options):
            known = f"one of {', '.join([*first, last])}"
        raise ValueError(f"{where}: expected {known}, got {shown(value)}. Try {last}.")
    return plain


def check_name(where: str, value: Any, *, what: str = "a name", advice: str = "a str") -> str:
    if not isinstance(value, str):
        raise (ValueError if value is None else TypeError)(
            f"{where}: expected {what}, got {shown(value)}. Try {advice}."
        )
    return value


def check_path(where: str, value: Any) -> Any:
    if not isinstance(value, (str, PathLike)):
        raise TypeError(f'{where}: expected the name of a file, got {shown(value)}. Try "fit.pt".')
    return value


def check_mapping(where: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise TypeError(f"{where}: expected a dict by name, got {shown(value)}. Try {{name: …}}.")
    return value


def check_names(where: str, value: Any) -> tuple[str, ...]:
    """Several names as a tuple; one name is no sequence of its letters."""
    if isinstance(value, str) or not isinstance(value, Iterable) or not all(isinstance(x, str) for x in value):
        raise TypeError(f"{where}: expected a sequence of names, got {shown(value)}. Try ('z',).")
    return tuple(value)


def check_positive(where: str, value: Any) -> Any:
    """A positive number, a tensor of these, or a module that gives them."""
    if isinstance(value, torch.nn.Module):
        return value
    name = where.rpartition(" ")[2]
    if not isinstance(value, Tensor) or value.dim() == 0:
        return check_number(where, value, low=0.0, what=f"a positive {name}: a number, a tensor or a module")
    if value.is_complex() or value.is_meta or not ((value > 0) & value.isfinite()).all():
        raise ValueError(f"{where}: expected a positive {name}, got {shown(value)}. Try 1.0, or a module.")
    return value


def check_two(where: str, value: Any) -> tuple[float, float]:
    """Two finite numbers."""
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray, Tensor)) or len(value) != 2:
        raise TypeError(f"{where}: expected two numbers, got {shown(value)}. Try (0.0, 1.0).")
    return check_number(where, value[0]), check_number(where, value[1])


def check_end(where: str, value: Any) -> Any:
    """An end of an interval: a number, which may be infinite, or a tensor."""
    if isinstance(value, Tensor) and value.dim():
        return value
    end = as_plain(value)
    if isinstance(end, bool) or not isinstance(end, (int, float)) or end != end:
        raise TypeError(f"{where}: expected a number or a tensor, got {shown(value)}. Try 0.0.")
    return end


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
    plain = as_plain(value)
    if single and isinstance(plain, (int, float)):
        return (check_count(where, plain, least=least),)
    if not isinstance(plain, (Sequence, np.ndarray, Tensor)) or isinstance(plain, (str, bytes)):
        one = "an int or a tuple" if single else "a list or tuple"
        raise TypeError(f"{where}: expected {one} of sizes, got {shown(value)}. Try {'3, or ' * single}(8, 8).")
    return tuple(check_count(f"{where}[{i}]", n, least=least) for i, n in enumerate(plain))


def check_elbo(where: str, value: Any) -> ELBO:
    """An objective, with at least one particle: `pyro.infer.ELBO` itself takes any number of these."""
    if not isinstance(value, ELBO):
        name = where.rpartition(" ")[2]
        raise TypeError(f"{where}: expected a pyro.infer.ELBO, got {value!r}. Try {name}=pyro.infer.Trace_ELBO().")
    check_count(f"{where}: num_particles", value.num_particles)
    return value


def check_features(where: str, value: Any) -> int | tuple[int, ...]:
    """The width of a vector, or the shape of a feature map: not the same as a shape of one dimension."""
    shape = check_shape(where, value)
    return shape if isinstance(value, Sequence) else shape[0]


def as_plain(value: Any) -> Any:
    """A number of NumPy, or a tensor of one number, as one of Python; anything else as it is."""
    if isinstance(value, Tensor):
        return value.item() if value.dim() == 0 and value.layout is torch.strided and not value.is_meta else value
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    return value


def shown(value: Any) -> str:
    """A value for a message, in one short line."""
    plain = as_plain(value)
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
