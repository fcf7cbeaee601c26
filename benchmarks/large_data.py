"""Data larger than memory: 4 GB as a memory map, and rows of 768 000 numbers, within 1 GiB of anonymous memory.

    python benchmarks/large_data.py [--megabytes 4101] [--limit 1024] [--folder DIR] [--kinds float32,wide]

Each data set is written to disk, in chunks. A process of its own, whose anonymous memory the kernel limits from its
start on (`RLIMIT_DATA`), trains a VAE on it by `fit`, and estimates log p(x) of all rows by `importance_sampling`.
`RLIMIT_DATA` counts the heap and private mappings. It does not count pages of the file, which the kernel keeps as long
as nobody else wants the memory. The table goes to benchmark_output/large_data.md as well.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pyro_vae import VAE, fit, importance_sampling
from pyro_vae.distributions import ConditionalMultivariateNormal, ConditionalNormal, StandardNormal
from pyro_vae.networks import MLP

PARTS = 64  # a network reads as many means of a wide row


class Kind(NamedTuple):
    """A data set, and how it is read."""

    what: str
    columns: int
    dtype: str
    batch_size: int
    num_particles: int
    loader: bool = False


KINDS = {
    "float32": Kind("memory map of float32", 1024, "float32", 512, 10),
    "uint8": Kind("memory map of uint8, converted in the model", 3072, "uint8", 512, 10),
    "loader": Kind("the same, DataLoader with a worker", 3072, "uint8", 512, 10, loader=True),
    "wide": Kind("memory map of float32", 768_000, "float32", 8, 5),
}


class Rows(Dataset):
    """Rows of an array."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> np.ndarray:
        return np.array(self.x[i])


class Parts(nn.Module):
    """The means of the parts of a row."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (PARTS, -1)).mean(-1)


class Repeated(nn.Module):
    """p(x|z) with one mean for each part of a row."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.linear, self.times = nn.Linear(2, PARTS), columns // PARTS

    def forward(self, z: Tensor) -> dist.Distribution:
        loc = self.linear(z).unsqueeze(-1)
        return dist.Normal(loc.expand(*loc.shape[:-1], self.times).flatten(-2), 0.1).to_event(1)


def made(columns: int) -> VAE:
    """A VAE whose weights are small, whatever the width of the data."""
    torch.manual_seed(0)
    encoder: nn.Module = MLP(columns, [32])
    likelihood: nn.Module = ConditionalNormal(MLP(2, [32]), columns, scale=0.1)
    if columns > 10_000:
        encoder, likelihood = nn.Sequential(Parts(), MLP(PARTS, [32])), Repeated(columns)
    return VAE(StandardNormal(2), likelihood, ConditionalMultivariateNormal(encoder, 2))


def write_data(path: Path, rows: int, columns: int, dtype: str) -> None:
    """Noise around one of two patterns for each row, of parts that are alike."""
    rng = np.random.default_rng(0)
    patterns = rng.uniform(0.3, 0.7, (2, PARTS)).repeat(columns // PARTS, 1).astype("float32")
    size = max(1, 2**22 // columns)
    with path.open("wb") as file:
        for start in range(0, rows, size):
            n = min(size, rows - start)
            x = patterns[rng.integers(0, 2, n)] + 0.1 * rng.standard_normal((n, columns), dtype="float32")
            file.write((255 * x.clip(0, 1)).astype("uint8").tobytes() if dtype == "uint8" else x.tobytes())


def run(kind: Kind, path: str, rows: int) -> dict[str, float]:
    """Trains and evaluates."""
    x: Any = np.memmap(path, kind.dtype, "r", shape=(rows, kind.columns))
    vae = made(kind.columns)
    model, guide = vae.model, vae.guide
    if kind.dtype == "uint8":
        model, guide = (lambda x, f=f: f(x.float() / 255) for f in (vae.model, vae.guide))
    if kind.loader:
        x = DataLoader(Rows(x), batch_size=kind.batch_size, num_workers=1)
    times = [time.perf_counter()]
    result = fit(model, guide, x, num_epochs=1, batch_size=kind.batch_size, seed=0, progress=False)
    times.append(time.perf_counter())
    options = {"num_particles": kind.num_particles, "seed": 0, "progress": False, "checkpoint": f"{path}.pt"}
    evidence = importance_sampling(model, guide, x, **options)
    times.append(time.perf_counter())
    if len(evidence.log_evidence) != rows:
        raise RuntimeError(f"expected {rows} rows, got {len(evidence.log_evidence)}")
    return {"loss": result.loss[-1], "fit": times[1] - times[0], "evidence": times[2] - times[1]}


def measured(name: str, path: Path, rows: int, limit: int) -> tuple[dict[str, float] | None, float, str]:
    """What a process with limited memory says, the most anonymous memory that it had, in MiB, and its errors."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [sys.executable, __file__, "--child", name, str(path), str(rows)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limited
    )  # fmt: skip
    most = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status")
        found = re.search(r"RssAnon:\s+(\d+)", status.read_text()) if status.exists() else None
        most = max(most, int(found[1]) if found else 0)
        time.sleep(0.1)
    out, errors = process.communicate()
    return json.loads(out) if process.returncode == 0 else None, most / 2**10, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=4101, help="of each data set")
    parser.add_argument("--limit", type=int, default=1024, help="MiB of anonymous memory")
    parser.add_argument("--folder", type=Path, help="for the data; default: a temporary one")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, path, rows = args.child
        print(json.dumps(run(KINDS[name], path, int(rows))))
        return
    lines = [
        f"Limit of anonymous memory: {args.limit} MiB, one epoch, one thread",
        "",
        "| data | shape | GB | batch | fit, s | particles | evidence of all rows, s | most anonymous memory, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name in args.kinds.split(","):
            kind = KINDS[name]
            weight = kind.columns * np.dtype(kind.dtype).itemsize
            rows = -(-args.megabytes * 2**20 // weight)
            path = Path(folder) / "data"
            write_data(path, rows, kind.columns, kind.dtype)
            found, most, errors = measured(name, path, rows, args.limit * 2**20)
            if found is None:
                raise SystemExit(f"{name}: not within the limit.\n{errors}")
            lines.append(
                f"| {kind.what} | {rows} × {kind.columns} | {rows * weight / 1e9:.2f} | {kind.batch_size} "
                f"| {found['fit']:.0f} | {kind.num_particles} | {found['evidence']:.0f} | {most:.0f} |"
            )
            print(lines[-1], flush=True)
            Path(f"{path}.pt").unlink()
    folder = Path("benchmark_output")
    folder.mkdir(exist_ok=True)
    (folder / "large_data.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
