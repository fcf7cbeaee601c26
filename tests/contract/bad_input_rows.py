"""The values that are put in place of numbers and of rows, and what each of them deserves.

A value is (name, make, verdict). `make` takes the arguments of a call that is right and gives the value, or, as a
`Change`, other arguments. The verdict is "wrong" (has to be refused), "right" (has to work), "either" (has to do one of
these), "mine" (a user's function raises `Mine`, which has to come through) or "through" (any error comes through).
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch

NAN, INF = math.nan, math.inf


class Mine(Exception):
    """What a user's own function raises: it has to come through as it is."""


class Change(dict):
    """Other arguments, of several names."""


def raises(*_, **__):
    raise Mine("mine")


def wrong(**values):
    return [(name, make, "wrong") for name, make in values.items()]


def right(**values):
    return [(name, make, "right") for name, make in values.items()]


def either(**values):
    return [(name, make, "either") for name, make in values.items()]


def constant(value):
    return lambda _: value


def of_x(function):
    """Values made from the rows of a call that is right."""
    return lambda call: function(torch.as_tensor(call["args"][0] if "args" in call else rows_of(call)))


def rows_of(call):
    return next(
        call[name]
        for name in ("data", "x", "z", "X", "Z", "pseudo_inputs", "log_likelihood", "log_weight")
        if name in call
    )


def nothing_observed(*_, **__):
    with pyro.plate("data", 4):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def masked(x):
    return np.ma.masked_array(x.numpy(), mask=np.arange(x.numel()).reshape(x.shape) == 1)


def at(x, value):
    x = x.clone()
    x.view(-1)[1] = value
    return x


NO_NUMBER = wrong(
    text=constant("3"),
    none=constant(None),
    list=constant([3]),
    object=lambda _: object(),
    nan=constant(NAN),
    infinite=constant(INF),
    vector=lambda _: torch.tensor([3.0, 4.0]),
    complex=constant(3 + 1j),
)
COUNT = (
    NO_NUMBER
    + wrong(
        half=constant(2.5),
        whole_float=constant(3.0),
        flag=constant(True),
        negative=constant(-3),
        huge=constant(2**70),
        float_tensor=lambda _: torch.tensor(3.0),
        meta=lambda _: torch.ones((), dtype=torch.int64, device="meta"),
    )
    + right(
        numpy=constant(np.int64(3)),
        tensor=lambda _: torch.tensor(3),
    )
)
NUMBER = NO_NUMBER + wrong(flag=constant(True))
MATRIX = wrong(  # of numbers
    text=constant("x"),
    none=constant(None),
    number=constant(3.0),
    object=lambda _: object(),
    nan=of_x(lambda x: at(x, NAN)),
    empty=of_x(lambda x: x[:0]),
    scalar=lambda _: torch.zeros(()),
    objects=of_x(lambda x: np.array(x.numpy(), dtype=object)),
    texts=of_x(lambda x: x.numpy().astype(str)),
    sparse=of_x(lambda x: x.to_sparse()),
    nested=of_x(lambda x: torch.nested.nested_tensor(list(x))),
    complex=of_x(lambda x: x.to(torch.complex64)),
    masked=of_x(masked),
    meta=of_x(lambda x: x.to("meta")),
)
ROWS = (
    MATRIX
    + wrong(
        infinite=of_x(lambda x: at(x, INF)),
        one_number_a_row=of_x(lambda x: x[:, 0].contiguous()),
        narrow=of_x(lambda x: x[:, :2].contiguous()),
        pandas=of_x(lambda x: pd.DataFrame(x.numpy())),
        records=of_x(lambda x: x.numpy().view([("a", "f4"), ("b", "f4"), ("c", "f4")])),
        lists=of_x(lambda x: x.tolist()),
        dates=constant(np.array(["2020-01-01"], dtype="datetime64[D]")),
    )
    + either(
        higher_rank=of_x(lambda x: x.expand(2, 4, 3)),
        integers=of_x(lambda x: x.long()),
        half=of_x(lambda x: x.half()),
        double=of_x(lambda x: x.double()),
        numpy=of_x(lambda x: x.numpy()),
        numpy_double=of_x(lambda x: x.double().numpy()),
        big_endian=of_x(lambda x: x.numpy().astype(">f4")),
        frozen=of_x(lambda x: np.frombuffer(x.numpy().tobytes(), "f4").reshape(x.shape)),
    )
    + right(
        one_row=of_x(lambda x: x[:1]),
        strided=of_x(lambda x: x.t().contiguous().t()),
        with_gradient=of_x(lambda x: x.clone().requires_grad_()),
    )
)
