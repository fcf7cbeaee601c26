"""Killed runs: fits that are killed at random, a third of them while they write, and started again.

Each run is one process, which is killed (SIGKILL) at a random time, or at a random place of a random write of its
checkpoint. The same call then runs in another process, to the end. It is held against one that nobody has killed: loss
history, validation losses, best epoch, weights and buffers, to the bit.

    python benchmarks/killed_runs.py [--cases 108]
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import signal
import socket
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_vae import VAE, CompiledELBO, fit
from pyro_vae.checkpoint import replacing
from pyro_vae.distributions import ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP
from pyro_vae.training import resume

RESULTS = Path(__file__).parent / "results" / "killed_runs.md"
CODE: dict[str, dict[str, Any]] = {
    "plain Pyro": {"compile": False, "num_epochs": 20},
    "recorded": {"loss": CompiledELBO(backend="eager"), "num_epochs": 20},
    "generated code": {"compile": True, "num_epochs": 20},
    "two ranks": {"compile": False, "num_epochs": 20},  # of which one is killed
}
KINDS = ("rows", "scheduler, validation", "DataLoader")


def rows(n: int, seed: int) -> Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))


def build() -> VAE:
    likelihood = ConditionalNormal(nn.Sequential(MLP(2, [8]), nn.BatchNorm1d(8)), 5, scale=1.0, features=8)
    return VAE(StandardNormal(2), likelihood, ConditionalNormal(MLP(5, [8]), 2))


def train(code: str, kind: str, path: Path | None) -> dict[str, Any]:
    """A fit of batches of 20, 20 and 10 rows; all that it leads to."""
    torch.manual_seed(0)
    vae = build()
    options: dict[str, Any] = {"batch_size": 20, "seed": 0, "progress": False} | CODE[code]
    data: Any = rows(50, 1)
    if kind == "DataLoader":
        own = torch.Generator().manual_seed(7)
        data = DataLoader(TensorDataset(data), batch_size=20, shuffle=True, generator=own)
    elif kind != "rows":
        options["scheduler"] = partial(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, T_0=7)
        options |= {"validation_data": rows(30, 2), "patience": 1000}
    result = fit(vae.model, vae.guide, data, checkpoint=path, **options)
    return {"result": vars(result), "weights": vae.state_dict()}


# -- processes --------------------------------------------------------------------------------------------------------


def start(code: str, work: Callable[[], Any]) -> list[int]:
    """Runs something in a process of its own, or in two; returns their numbers."""
    if code != "two ranks":
        return [_start(work)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [_start(work, address | {"RANK": str(rank)}) for rank in range(2)]


def end(children: list[int]) -> list[int]:
    """Waits for processes; how each of them ended."""
    return [os.waitpid(child, 0)[1] for child in children]


def _start(work: Callable[[], Any], environment: dict[str, str] | None = None) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(environment or {})
        warnings.simplefilter("ignore")
        pyro.clear_param_store()
        resume.SECONDS_BETWEEN = 0.0  # each epoch is written
        work()
        status = 0
    finally:
        os._exit(status)


def finish(code: str, kind: str, path: Path | None, to: Path) -> bool:
    """Runs a fit to its end and keeps what it leads to. Whether it came to its end."""

    def work() -> None:
        found = train(code, kind, path)
        if os.environ.get("RANK", "0") == "0":
            torch.save(found, to)

    return not any(end(start(code, work)))


def die_in_a_write(number: int, rng: random.Random) -> None:
    """Kills this process in the write of that number: amid its bytes, before it has the name, or right after."""
    place, part, count = rng.choice(["write", "fsync", "replace", "named"]), rng.random(), 0
    write, fsync, replace = os.write, os.fsync, os.replace
    kill = partial(os.kill, os.getpid(), signal.SIGKILL)

    def writes(file: int, data: Any) -> int:
        nonlocal count
        if len(data) < 1000:  # the number of a process that holds the file
            return write(file, data)
        count += 1
        if place == "write" and count == number:
            write(file, data[: int(part * len(data))])
            kill()
        return write(file, data)

    def flushes(file: int) -> None:
        if place == "fsync" and count == number:
            kill()
        fsync(file)

    def names(a: Path, b: Path) -> None:
        if place == "replace" and count == number:
            kill()
        replace(a, b)
        if place == "named" and count == number:
            kill()

    replacing.os.write, replacing.os.fsync, replacing.os.replace = writes, flushes, names


def run_and_kill(code: str, kind: str, path: Path, rng: random.Random, *, writing: bool, seconds: float) -> bool:
    """Starts a fit and kills it; whether that came before its end."""
    number = rng.randint(2, CODE[code]["num_epochs"])  # the first one is the trial

    def work() -> None:
        if writing and os.environ.get("RANK", "0") == "0":
            die_in_a_write(number, rng)
        train(code, kind, path)

    children = start(code, work)
    if not writing:
        time.sleep(rng.uniform(0.05, 1.0) * seconds)
        os.kill(rng.choice(children), signal.SIGKILL)
    return any(map(os.WIFSIGNALED, end(children)))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


# -- many -------------------------------------------------------------------------------------------------------------


def case(i: int, folder: Path, truths: dict[tuple[str, str], Any]) -> tuple[str, str, list[str]]:
    """The kinds of a run, and what happened to it. `truths` are those of runs that nobody killed, and their times."""
    code, kind = list(CODE)[i % 4], KINDS[i // 4 % 3]
    if (code, kind) not in truths:
        if CODE[code].get("compile"):
            finish(code, kind, None, folder / "truth")  # makes the code, which is then found on the disk
        begin = time.monotonic()
        assert finish(code, kind, folder / "unkilled.pt", folder / "truth")
        truths[code, kind] = torch.load(folder / "truth"), time.monotonic() - begin
        (folder / "unkilled.pt").unlink()
    truth, seconds = truths[code, kind]
    writing = i // 12 % 3 == 0
    events, own = [], folder / str(i)
    own.mkdir()
    for attempt in range(9):
        rng = random.Random(1000 * attempt + i)
        if run_and_kill(code, kind, own / "fit.pt", rng, writing=writing, seconds=seconds):
            events.append("killed")
            break
        (own / "fit.pt").unlink(missing_ok=True)  # it was done before: once more
    events += ["in a write"] * writing
    events += ["had a file"] * (own / "fit.pt").exists()
    events += ["left a partial file"] * bool(list(own.glob(".*.partial")))
    if finish(code, kind, own / "fit.pt", folder / "found"):
        events.append("came to the end")
        events += ["to the bit"] * same(truth, torch.load(folder / "found"))
    events += ["tidy"] * ([p.name for p in own.iterdir()] == ["fit.pt"])
    shutil.rmtree(own)
    return code, kind, events


COLUMNS = ("killed", "in a write", "had a file", "left a partial file", "came to the end", "tidy", "to the bit")


def report(cases: list[tuple[str, str, list[str]]]) -> str:
    lines = [
        "# Killed runs",
        "",
        f"{len(cases)} fits, killed and started again (`benchmarks/killed_runs.py`): batches of 20, 20 and 10 rows, "
        "batch norm, Adam, a checkpoint after each epoch. Those that had no file yet began anew. Of two ranks one is "
        "killed, and the other ends with an error. Tidy: in the end there is the checkpoint, and nothing else. To the "
        "bit: losses, weights and buffers of a run that nobody killed.",
        "",
        f"| steps | data | {' | '.join(COLUMNS)} |",
        f"|---|---|{'--:|' * len(COLUMNS)}",
    ]
    for code in CODE:
        for kind in KINDS:
            found = Counter(event for c, k, events in cases if (c, k) == (code, kind) for event in events)
            lines.append(f"| {code} | {kind} | {' | '.join(str(found[name]) for name in COLUMNS)} |")
    found = Counter(event for *_, events in cases for event in events)
    lines.append(f"| all | | {' | '.join(str(found[name]) for name in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=108)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases, truths = [], {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/code")
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes that outlive a killed one
        importlib.import_module("torch._inductor.compile_fx")  # once, and not in each of the processes
        for i in range(options.cases):
            cases.append(case(i, Path(folder), truths))
            print(i, *cases[-1], flush=True)
    text = report(cases)
    print(text)
    if options.cases >= 100:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
