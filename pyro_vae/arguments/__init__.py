"""What an argument has to be, by its name. The lowest room, which all others may ask."""

from pyro_vae.arguments.door import checked
from pyro_vae.arguments.tensors import check_dense, check_tensors, refuse_unusual
from pyro_vae.arguments.values import (
    check_choice,
    check_count,
    check_function,
    check_name,
    check_number,
    check_positive,
    check_seed,
    check_shape,
)

__all__ = [
    "check_choice",
    "check_count",
    "check_dense",
    "check_function",
    "check_name",
    "check_number",
    "check_positive",
    "check_seed",
    "check_shape",
    "check_tensors",
    "checked",
    "refuse_unusual",
]
