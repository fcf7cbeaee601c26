"""The values that are put in place of an argument, by the kind of the argument."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyro
import torch
from bad_input_rows import (
    COUNT,
    INF,
    MATRIX,
    NAN,
    NUMBER,
    ROWS,
    Change,
    constant,
    nothing_observed,
    raises,
    right,
    wrong,
)

FUNCTION = [
    *wrong(
        none=constant(None),
        text=constant("model"),
        number=constant(3),
        tensor=lambda _: torch.zeros(3),
        kind=constant(torch.nn.Linear),
    ),
    ("raises", constant(raises), "mine"),
]
PAIR = [  # changes of model and guide together
    ("swapped", lambda call: Change(model=call["guide"], guide=call["model"]), "wrong"),
    ("equal", lambda call: Change(model=call["model"], guide=call["model"]), "wrong"),
    ("guides", lambda call: Change(model=call["guide"], guide=call["guide"]), "wrong"),
    ("nothing_observed", lambda _: Change(model=nothing_observed, guide=nothing_observed), "wrong"),
]
MODULE = wrong(none=constant(None), text=constant("net"), number=constant(3), kind=constant(torch.nn.Linear))
SHAPE = wrong(
    none=constant(None),
    text=constant("3"),
    half=constant(2.5),
    float=constant(3.0),
    negative=constant(-3),
    zero=constant(0),
    zero_inside=constant((2, 0)),
    negative_inside=constant((3, -1)),
    flag=constant(True),
    texts=constant(("a",)),
    huge=constant(2**70),
) + right(numpy=constant(np.int64(3)), tensor=lambda _: torch.tensor(3), size=constant(torch.Size([3])))
SIZES = wrong(
    none=constant(None),
    number=constant(3),
    text=constant("34"),
    negative=constant([-1]),
    zero=constant([0]),
    half=constant([2.5]),
    nan=constant([NAN]),
    texts=constant(["4"]),
)
PLATE = wrong(
    unknown=constant("nope"), number=constant(3), bytes=constant(b"data"), flag=constant(True), empty=constant("")
)
VALUES = {
    "evidence": wrong(
        none=constant(None),
        text=constant("ab"),
        list=constant([1, 2]),
        numbers=lambda _: {"a": 1.0, "b": 2.0},
        empty=constant({}),
        one=lambda call: {"a": call["evidence"]["a"]},
    ),
    "weights": [(name, make, "through" if name == "nan" else verdict) for name, make, verdict in MATRIX],
    "log_weight": wrong(
        text=constant("x"),
        number=constant(3.0),
        short=lambda _: torch.zeros(2),
        sparse=lambda _: torch.zeros(20).to_sparse(),
        complex=lambda _: torch.zeros(20, dtype=torch.complex64),
        meta=lambda _: torch.zeros(20, device="meta"),
        integers=lambda _: torch.zeros(20, 3),
    ),
    "data": [*ROWS, ("loader", lambda call: torch.utils.data.DataLoader([]), "wrong")],
    "parts": wrong(none=constant(None), text=constant("ab"), number=constant(3), numbers=constant([3, 4])),
    "table": [(name, make, "through" if verdict == "wrong" else "either") for name, make, verdict in MATRIX],
    "random_state": [(name, constant(value), "through") for name, value in {"text": "a", "negative": -1}.items()],
    "numbers": wrong(
        text=constant("ab"), number=constant(3.0), texts=constant(("a", "b")), three=constant((0.0, 1.0, 2.0))
    ),
    "levels": wrong(
        none=constant(None),
        text=constant("ab"),
        number=constant(0.5),
        above=constant([2.0]),
        nan=constant([NAN]),
        texts=constant(["a"]),
    ),
    "picture": wrong(
        none=constant(None),
        text=constant("ab"),
        number=constant(3.0),
        texts=constant([["a"]]),
        object=lambda _: object(),
        scalar=lambda _: torch.zeros(()),
        complex=lambda _: torch.zeros(2, 2, dtype=torch.complex64),
        sparse=lambda _: torch.zeros(5, 2).to_sparse(),
        meta=lambda _: torch.zeros(5, 2, device="meta"),
    ),
    "pseudo_inputs": MATRIX,
    "end": wrong(
        text=constant("a"), list=constant(["a"]), nan=constant(NAN), none=constant(None), complex=constant(1j)
    ),
    "predictions": wrong(text=constant("a"), number=constant(3), narrow=lambda _: torch.zeros(4, 2)),
    "contexts": wrong(
        text=constant("a"),
        number=constant(3),
        scalar=lambda _: torch.zeros(()),
        sparse=lambda _: torch.eye(4).to_sparse(),
        meta=lambda _: torch.zeros(4, 2, device="meta"),
        short=lambda _: torch.zeros(2, 2),
        unwanted=lambda _: torch.zeros(4, 2),
    ),
    "own": [  # rows of a model whose own errors come through as they are
        (
            name,
            make,
            "through" if name in ("one_number_a_row", "narrow", "higher_rank", "integers", "half") else verdict,
        )
        for name, make, verdict in ROWS
    ],
    "vae_rows": [(name, make, "either" if name in ("empty", "infinite") else verdict) for name, make, verdict in ROWS],
    "codes": [(name, make, "either" if name == "empty" else verdict) for name, make, verdict in MATRIX],
    "incomplete": [(name, make, "right" if name == "nan" else verdict) for name, make, verdict in ROWS],
    "total": [*(case for case in COUNT if case[2] == "wrong"), *right(tensor=lambda _: torch.tensor(8))],
    "needed": [case if case[0] != "none" else ("nothing", *case[1:]) for case in FUNCTION],
    "kept_function": FUNCTION[:-1],  # which is not called yet
    "unused": wrong(text=constant("guide"), number=constant(3), tensor=lambda _: torch.zeros(3)),
    "not_negative": [*NUMBER, ("negative", constant(-1.0), "wrong")],
    "fixed": wrong(
        text=constant("a"),
        list=constant([1.0, "a"]),
        object=lambda _: object(),
        nan=constant(NAN),
        zero=constant(0.0),
        negative=constant(-1.0),
        infinite=constant(INF),
        complex=constant(1j),
        shape=lambda _: torch.ones(7),
    ),
    "features": wrong(
        text=constant("a"), half=constant(2.5), negative=constant(-1), zero=constant(0), nan=constant(NAN)
    ),
    "names": wrong(number=constant(3), numbers=constant([1]), text=constant("nope")),
    "layers": wrong(
        none=constant(None),
        text=constant("ab"),
        number=constant(3),
        empty=constant([]),
        one=lambda call: call["layers"][0],
        functions=constant([raises, raises]),
    ),
    "count": [*COUNT, ("zero", constant(0), "wrong")],
    "count_or_zero": COUNT,
    "positive": [*NUMBER, ("negative", constant(-1.0), "wrong"), ("zero", constant(0.0), "wrong")],
    "share": [*NUMBER, ("negative", constant(-0.1), "wrong"), ("above_one", constant(1.5), "wrong")],
    "number": NUMBER,
    "weight": NUMBER + wrong(negative=constant(-1.0)) + [("raises", constant(raises), "mine")],
    "seed": wrong(
        text=constant("a"),
        negative=constant(-1),
        huge=constant(2**64),
        half=constant(1.5),
        nan=constant(NAN),
        flag=constant(True),
        list=constant([1]),
        vector=lambda _: torch.tensor([1, 2]),
    )
    + right(numpy=constant(np.int64(1)), tensor=lambda _: torch.tensor(1), none=constant(None)),
    "plate": PLATE,
    "plate_or_auto": PLATE,
    "plate_of_fit": PLATE,
    "network": MODULE,
    "flag": wrong(text=constant("yes"), none=constant(None), number=constant(2), list=constant([])),
    "auto": wrong(
        text=constant("yes"),
        number=constant(2),
        none=constant(None),
        list=constant([]),
        array=constant(np.array([1, 2])),
    ),
    "choice": wrong(text=constant("nope"), number=constant(3), list=constant(["a"]), flag=constant(True)),
    "series": [],
    "name": wrong(number=constant(3), bytes=constant(b"vae"), list=constant(["a"])),
    "rows": ROWS,
    "matrix": MATRIX,
    "function": FUNCTION,
    "pair": FUNCTION + PAIR,
    "maker": wrong(text=constant("a"), number=constant(3), tensor=lambda _: torch.zeros(3)),
    "module": MODULE,
    "shape": SHAPE,
    "sizes": SIZES,
    "distribution": wrong(none=constant(None), text=constant("normal"), number=constant(3), list=constant([])),
    "mapping": wrong(
        text=constant("z"), number=constant(3), list=constant([1]), unknown=lambda _: {"nope": torch.zeros(4)}
    ),
    "labels": wrong(text=constant("z"), number=constant(3), unknown=constant({"nope": ["a"]})),
    "elbo": wrong(
        text=constant("elbo"),
        number=constant(3),
        kind=constant(pyro.infer.Trace_ELBO),
        no_particles=lambda _: pyro.infer.Trace_ELBO(num_particles=0),
        half_particles=lambda _: pyro.infer.Trace_ELBO(num_particles=2.5),
    ),
    "optimizer": [
        *wrong(
            text=constant("adam"),
            number=constant(3),
            kind=constant(list),
            second_order=lambda _: lambda p: torch.optim.LBFGS(p),
            of_pyro=lambda _: pyro.optim.Adam({}),
            nothing=lambda _: lambda p: None,
        ),
        ("raises", constant(raises), "mine"),
    ],
    "scheduler": [
        *wrong(text=constant("step"), number=constant(3), nothing=lambda _: lambda o: None),
        ("raises", constant(raises), "mine"),
    ],
    "device": wrong(text=constant("gpu"), number=constant(2.5), meta=constant("meta"), list=constant([])),
    "path": wrong(
        number=constant(3.5),
        flag=constant(True),
        list=constant(["a"]),
        folder=lambda _: Path.cwd(),
        no_folder=constant("nowhere/fit.pt"),
    ),
}
VALUES["series"] = VALUES["picture"]
