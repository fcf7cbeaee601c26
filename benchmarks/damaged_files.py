"""Damaged files: what happens when each of many is loaded.

Weights (both formats) and checkpoints of a fit are cut off, flipped, zeroed, given tensors of other shapes and dtypes,
pickles that would run code, and states that an optimizer cannot go on from; where a checksum can be made to fit, it is.
A file is to be refused, with its name and a reason, and nothing changed; or it gives the same result to the bit.

    python benchmarks/damaged_files.py [--cases 600]
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import pickle
import random
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae import VAE, fit
from pyro_vae.checkpoint import container, load_weights, save_weights, tensors
from pyro_vae.distributions import ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP

RESULTS = Path(__file__).parent / "results" / "damaged_files.md"
REFUSED, SAME, OTHER, CHANGED = "refused", "same result", "other result", "model changed"
VAGUE, EXECUTED, CRASHED = "no file or reason", "code executed", "crashed"
OUTCOMES = (REFUSED, SAME, OTHER, CHANGED, VAGUE, EXECUTED, CRASHED)
Rng = random.Random


def build(seed: int) -> VAE:
    pyro.clear_param_store()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        likelihood = ConditionalNormal(nn.Sequential(MLP(2, [8]), nn.BatchNorm1d(8)), 5, scale=1.0, features=8)
        return VAE(StandardNormal(2), likelihood, ConditionalNormal(MLP(5, [8]), 2))


def rows() -> Tensor:
    return torch.randn(30, 5, generator=torch.Generator().manual_seed(1))


def train(vae: VAE, path: Path | None, num_epochs: int) -> list[float]:
    schedule = lambda optim: torch.optim.lr_scheduler.StepLR(optim, 1, 0.9)  # noqa: E731
    options: dict[str, Any] = {"batch_size": 12, "seed": 0, "progress": False, "scheduler": schedule}
    options |= {"validation_data": rows(), "patience": 9}
    return fit(vae.model, vae.guide, rows(), num_epochs=num_epochs, checkpoint=path, **options).loss


# -- loading ----------------------------------------------------------------------------------------------------------


def load(kind: str, vae: VAE, path: Path) -> Any:
    return train(vae, path, 3) if kind == "fit" else load_weights(vae, path)


@cache
def reference(kind: str) -> tuple[bytes, Any, dict[str, Tensor]]:
    """An undamaged file; what loading it returns; the weights afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path, vae = Path(folder) / f"file.{kind}", build(0)
        if kind == "fit":
            train(vae, path, 2)
        else:
            save_weights(vae, path)
        data, vae = path.read_bytes(), build(1)
        return data, load(kind, vae, path), vae.state_dict()


def outcome(kind: str, data: bytes, folder: Path) -> tuple[str, str]:
    """What loading a file of these bytes leads to, and the message or the difference."""
    path, trap, vae = folder / f"file.{kind}", folder / "trap", build(1)
    path.write_bytes(data)
    before = {name: t.clone() for name, t in vae.state_dict().items()}
    random_state = torch.get_rng_state()
    _, expected, weights = reference(kind)
    try:
        found = load(kind, vae, path)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        as_it_was = same(before, vae.state_dict()) and torch.equal(random_state, torch.get_rng_state())
        named = isinstance(error, (ValueError, OSError)) and str(path) in message and len(message) > len(str(path)) + 40
        result = (REFUSED if named else VAGUE) if as_it_was else CHANGED
    else:
        message = ""
        result = SAME if found == expected and same(weights, vae.state_dict()) else OTHER
    if trap.exists():
        trap.unlink()
        result = EXECUTED
    return result, message.replace(str(path), "FILE")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


# -- damage -----------------------------------------------------------------------------------------------------------


def truncated(kind: str, rng: Rng, folder: Path) -> bytes:
    data = reference(kind)[0]
    return data[: rng.choice([rng.randrange(len(data)), len(data) - rng.randint(1, 100)])]


def flipped(kind: str, rng: Rng, folder: Path) -> bytes:
    data = bytearray(reference(kind)[0])
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def zeroed(kind: str, rng: Rng, folder: Path) -> bytes:
    data = bytearray(reference(kind)[0])
    start, size = rng.randrange(len(data)), rng.choice([1, 16, 512, 4096])
    data[start : start + size] = bytes(len(data[start : start + size]))
    return bytes(data)


def lengthened(kind: str, rng: Rng, folder: Path) -> bytes:
    return reference(kind)[0] + rng.randbytes(rng.choice([1, 64, 1000]))


def state_of(kind: str) -> Any:
    data = reference(kind)[0]
    if kind == "safetensors":
        return dict(build(0).state_dict())
    return container.unpack(data, "file", "fit" if kind == "fit" else "weights")


def packed(kind: str, state: Any) -> bytes:
    """A file with this state and a checksum that fits."""
    if kind == "safetensors":
        return tensors.pack(state, "file")
    return container.pack(state, "fit" if kind == "fit" else "weights")


def tensors_of(kind: str, state: Any) -> dict[str, Tensor]:
    return state["weights"] if kind == "fit" else state


def other_shape(kind: str, rng: Rng, folder: Path) -> bytes:
    state = state_of(kind)
    tensors = tensors_of(kind, state)
    name = rng.choice(sorted(tensors))
    t = tensors[name]
    tensors[name] = rng.choice([t[None], torch.zeros(0), torch.zeros(3, 1, 7), torch.cat([t.reshape(-1)] * 2)])
    return packed(kind, state)


def other_dtype(kind: str, rng: Rng, folder: Path) -> bytes:
    state = state_of(kind)
    tensors = tensors_of(kind, state)
    name = rng.choice(sorted(tensors))
    dtypes = {torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool} - {tensors[name].dtype}
    tensors[name] = tensors[name].to(rng.choice(sorted(dtypes, key=str)))
    return packed(kind, state)


def other_names(kind: str, rng: Rng, folder: Path) -> bytes:
    state = state_of(kind)
    tensors = tensors_of(kind, state)
    value = tensors.pop(rng.choice(sorted(tensors)))
    if rng.random() < 0.5:
        tensors["another"] = value
    return packed(kind, state)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.path),)


def with_code(kind: str, rng: Rng, folder: Path) -> bytes:
    """A pickle that makes a folder when it is read: bare, as torch.save writes it, or in a file with a checksum."""
    trap = Trap(folder / "trap")
    way = rng.randrange(3)
    if way == 0:
        return pickle.dumps({"weights": trap})
    if way == 1 or kind == "safetensors":
        buffer = io.BytesIO()
        torch.save({"weights": trap}, buffer)
        return buffer.getvalue()
    old, new = zipfile.ZipFile(io.BytesIO(reference(kind)[0])), io.BytesIO()
    with zipfile.ZipFile(new, "w") as archive:
        for record in old.namelist():
            code = pickle.dumps(trap, protocol=2) if record.endswith("data.pkl") else old.read(record)
            archive.writestr(record, code)
        archive.comment = container.MARK + b"0" * container.DIGITS
    data = new.getvalue()[: -container.DIGITS]
    return data + hashlib.sha256(data).hexdigest().encode()


def crafted(kind: str, rng: Rng, folder: Path) -> bytes:
    """Parts of a fit's state that its optimizer, scheduler or generators cannot go on from."""
    state = state_of(kind)
    if kind != "fit":
        return other_shape(kind, rng, folder)
    rng.choice(CRAFTED)(state, rng)
    return packed(kind, state)


def _moment(state: dict, rng: Rng) -> tuple[dict, str]:
    moments = state["optimizer"]["state"][rng.choice(sorted(state["optimizer"]["state"]))]
    return moments, rng.choice(["exp_avg", "exp_avg_sq"])


def _set_moment(change: Callable[[Tensor], Any]) -> Callable:
    def damage(state: dict, rng: Rng) -> None:
        moments, name = _moment(state, rng)
        moments[name] = change(moments[name])

    return damage


def _set(path: str, value: Any) -> Callable:
    def damage(state: dict, rng: Rng) -> None:
        *folders, last = path.split(".")
        for name in folders:
            state = state[int(name) if name.isdigit() else name]
        state[int(last) if last.isdigit() else last] = value

    return damage


def _drop(state: dict, rng: Rng) -> None:
    moments, name = _moment(state, rng)
    del moments[name]


CRAFTED = [
    *map(_set_moment, (lambda t: torch.zeros(2), lambda t: t[None], lambda t: torch.zeros(10**6).expand(3, -1))),
    *map(_set_moment, (torch.Tensor.double, torch.Tensor.int, torch.Tensor.to_sparse, lambda t: None, lambda t: 1.0)),
    _drop,
    _set("optimizer.state.0.step", torch.tensor(math.nan)),
    _set("optimizer.state.0.step", torch.zeros(5)),
    _set("optimizer.state.99", {"step": torch.tensor(1.0)}),
    _set("optimizer.state", [1, 2]),
    _set("optimizer.param_groups", []),
    _set("optimizer.param_groups.0.lr", math.nan),
    _set("optimizer.param_groups.0.lr", "fast"),
    _set("optimizer.param_groups.0.amsgrad", True),
    _set("optimizer.param_groups.0.fused", False),
    _set("optimizer.param_groups.0.betas", (0.9,)),
    _set("optimizer.param_groups.0.params", [0]),
    _set("optimizer", {"state": {}}),
    _set("schedule", None),
    _set("schedule.optimizer", 1),
    _set("schedule.last_epoch", "two"),
    _set("random.0.cpu", torch.zeros(10, dtype=torch.uint8)),
    _set("random.0.cpu", torch.full((5056,), 255, dtype=torch.uint8)),
    _set("random", 1),
    _set("losses.loss", ["a"]),
    _set("losses.best_epoch", 7),
    _set("losses", {"loss": [1.0]}),
    _set("steps", "many"),
    _set("best", {"w": torch.zeros(1)}),
    _set("loaders", {}),
    _set("arguments", 3),
    _set("weights", [torch.zeros(1)]),
]
DAMAGE = [truncated, flipped, zeroed, lengthened, other_shape, other_dtype, other_names, with_code, crafted]
KINDS = ("fit", "fit", "pt", "safetensors")


def case(i: int, folder: Path) -> tuple[str, str, bytes]:
    """Kind of file, kind of damage, bytes."""
    rng = Rng(i)
    damage = DAMAGE[i % len(DAMAGE)]
    kind = KINDS[i // len(DAMAGE) % len(KINDS)]
    return kind, damage.__name__, damage(kind, rng, folder)


def child(start: int, stop: int, log: Path) -> None:
    """Loads file after file; the log has a line of each that is begun and of each that is done."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(start, stop):
            kind, damage, data = case(i, Path(folder))
            with log.open("a") as file:
                file.write(json.dumps([i, kind, damage, CRASHED, ""]) + "\n")
            result, message = outcome(kind, data, Path(folder))
            with log.open("a") as file:
                file.write(json.dumps([i, kind, damage, result, message]) + "\n")


def report(cases: list[list]) -> str:
    table = Counter((damage, result) for _, _, damage, result, _ in cases)
    total = Counter(result for *_, result, _ in cases)
    lines = [
        "# Damaged files",
        "",
        f"{len(cases)} files, loaded one by one (`benchmarks/damaged_files.py`, seeds 0 to {len(cases) - 1}): half "
        "of them checkpoints of `fit`, a quarter each weights in torch's format and in that of safetensors. Shapes, "
        "dtypes, names, code and crafted states come with a checksum that fits.",
        "",
        f"| damage | {' | '.join(OUTCOMES)} |",
        f"|---|{'--:|' * len(OUTCOMES)}",
    ]
    for damage in (d.__name__ for d in DAMAGE):
        lines.append(f"| {damage.replace('_', ' ')} | {' | '.join(str(table[damage, r]) for r in OUTCOMES)} |")
    lines.append(f"| all | {' | '.join(str(total[r]) for r in OUTCOMES)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--child", nargs=3)
    options = parser.parse_args()
    if options.child:
        start, stop, log = options.child
        child(int(start), int(stop), Path(log))
        return
    done: dict[int, list] = {}
    with tempfile.TemporaryDirectory() as folder:
        log, start = Path(folder) / "log", 0
        while start < options.cases:
            command = [sys.executable, "-W", "ignore", __file__, "--child", str(start), str(options.cases), str(log)]
            subprocess.run(command, check=False)
            done |= {entry[0]: entry for entry in map(json.loads, log.read_text().splitlines())}
            start = max(done) + 1
    cases = [done[i] for i in sorted(done)]
    for i, kind, damage, result, message in cases:
        if result not in (REFUSED, SAME):
            print(f"{i}: {kind}, {damage}: {result}. {message}")
    text = report(cases)
    print(text)
    if options.cases >= 600:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
