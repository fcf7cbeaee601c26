"""Training in two processes against one: milliseconds and bytes of a step, and what they say of many ranks.

    python benchmarks/ranks.py

`fit` trains a VAE on batches of images in one process with two threads, and under torchrun in two with one thread each;
so does the same VAE in plain torch, under DistributedDataParallel, which sums gradients during the backward pass. They
take turns; medians of epochs, then of rounds. What a sum over ranks takes is measured alone as well, over sizes. The
cost on networks is extrapolated by their latency and bandwidth. The table goes to benchmark_output/ranks.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import peers
import rounds
import torch

CONFIGURATIONS = (("784-400-50", 128), ("784-400-50", 1024))
ROUNDS, EPOCHS, STEPS = 3, 5, 12
SIZES = [2**k for k in range(8, 25, 4)]  # floats
LINKS = {"10 Gbit/s": (10e9 / 8, 50e-6), "25 Gbit/s": (25e9 / 8, 30e-6), "100 Gbit/s": (100e9 / 8, 10e-6)}
MANY = (2, 4, 8, 16, 32, 64)


def work(network: str, batch: int) -> dict:
    """Seconds per step of a fit, of what the ranks wait for each other in it, and of sums alone."""
    from pyro_vae import fit
    from pyro_vae.ranks import Ranks, ranks

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ends, waits, waited = [time.perf_counter()], [], [0.0]
    own = Ranks.sum

    def timed(self: Ranks, tensors: list) -> None:
        start = time.perf_counter()
        own(self, tensors)
        waited[0] += time.perf_counter() - start

    def end_of_epoch(epoch: int) -> float:
        ends.append(time.perf_counter())
        waits.append(waited[0])
        return 1.0

    Ranks.sum = timed
    x = peers.images(network, batch * STEPS)
    vae = peers.ours(network, "diagonal")
    options = {"batch_size": batch, "num_epochs": EPOCHS, "compile": True, "seed": 0, "progress": False}
    fit(vae.model, vae.guide, x, scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, end_of_epoch), **options)
    Ranks.sum = own
    epochs, waiting = ([b - a for a, b in pairwise(t)][2:] for t in (ends, waits))
    sums = {}
    for size in SIZES if ranks().several else []:
        tensor, times = torch.zeros(size), []
        for _ in range(20):
            ranks().gather(0)  # both are here
            start = time.perf_counter()
            own(ranks(), [tensor])
            times.append(time.perf_counter() - start)
        sums[size] = median(times)
    parameters = sum(p.numel() for p in vae.parameters())
    return {"step": median(epochs) / STEPS, "wait": median(waiting) / STEPS, "parameters": parameters, "sums": sums}


def plain_torch(network: str, batch: int) -> dict:
    """Seconds per step of the same VAE and optimizer in plain torch."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    module = peers.Networks(network)
    module.forward = module.loss
    optimizer = torch.optim.Adam(module.parameters(), fused=True)
    if size > 1:
        torch.distributed.init_process_group("gloo")
        module = torch.nn.parallel.DistributedDataParallel(module)
    x = peers.images(network, batch * STEPS // size)
    times = []
    for _ in range(EPOCHS):
        start = time.perf_counter()
        for rows in torch.randperm(len(x)).split(batch // size):
            optimizer.zero_grad(set_to_none=True)
            loss = module(x[rows])
            loss.backward()
            optimizer.step()
            assert loss.isfinite()
        times.append(time.perf_counter() - start)
    if size > 1:
        time.sleep(0.2)  # gloo's threads have to let go of Python objects: with the lock held, their end waits for ever
        torch.distributed.destroy_process_group()
    return {"step": median(times[2:]) / STEPS}


def start(ranks: int, network: str, batch: int, how: str = "--worker") -> dict:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, __file__, how, network, str(batch)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // ranks)}
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    return json.loads(next(line for line in out.splitlines() if line.startswith("{")))


def line_through(sums: dict[int, float]) -> tuple[float, float]:
    """Latency in seconds, and bytes per second, of sums over two ranks: the smallest one, and the largest two."""
    sizes = sorted(sums)
    slope = (sums[sizes[-1]] - sums[sizes[-2]]) / (4 * (sizes[-1] - sizes[-2]))
    return sums[sizes[0]], 1 / slope


def ring(size: float, ranks: int, bandwidth: float, latency: float) -> float:
    """Seconds of a ring all-reduce of so many bytes: 2(R − 1) messages of 1/R of them, one after the other."""
    return 2 * (ranks - 1) * (size / ranks / bandwidth + latency)


def main() -> None:
    lines = [
        "| network | batch | parameters | MB per step | one process, 2 threads | two ranks | ratio | in sums "
        "| plain torch, one process | DistributedDataParallel, two ranks | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    found, sums = {}, []
    for network, batch in CONFIGURATIONS:
        ways = [(1, "--worker"), (2, "--worker"), (1, "--plain-torch"), (2, "--plain-torch")]
        pairs = [[start(n, network, batch, how) for n, how in ways] for _ in range(ROUNDS)]
        one, two, plain, parallel = (median(run[i]["step"] for run in pairs) for i in range(4))
        wait, n = median(run[1]["wait"] for run in pairs), pairs[0][0]["parameters"]
        sums += [{int(k): v for k, v in run[1]["sums"].items()} for run in pairs]
        found[network, batch] = one, n
        row = f"| {network} | {batch} | {n:,} | {4e-6 * n:.2f} | {1e3 * one:.2f} ms | {1e3 * two:.2f} ms"
        row = f"{row} | {one / two:.2f} | {1e3 * wait:.2f} ms"
        lines.append(f"{row} | {1e3 * plain:.2f} ms | {1e3 * parallel:.2f} ms | {plain / parallel:.2f} |")
        print(lines[-1], flush=True)
    latency, bandwidth = line_through({size: median(s[size] for s in sums) for size in SIZES})
    lines += [
        "",
        f"A sum over two ranks takes {1e3 * latency:.2f} ms and {1e9 / bandwidth:.2f} ms per MB (gloo, loopback).",
        "",
        "Extrapolated: a step of R ranks is the computation of one process / R, and a ring all-reduce at the bandwidth "
        "and latency of the link (10 Gbit/s and 50 µs, 25 and 30, 100 and 10). Speed-up over one process, and after "
        "the slash the milliseconds of communication:",
        "",
        "| network | batch | link | " + " | ".join(f"{r} ranks" for r in MANY) + " |",
        "|---|---|---|" + "---|" * len(MANY),
    ]
    for (network, batch), (one, n) in found.items():
        for link, (speed, delay) in LINKS.items():
            costs = [ring(4 * n, r, speed, delay) for r in MANY]
            cells = [f"{one / (one / r + cost):.1f} / {1e3 * cost:.2f}" for r, cost in zip(MANY, costs, strict=True)]
            lines.append(f"| {network} | {batch} | {link} | " + " | ".join(cells) + " |")
    folder = Path("benchmark_output")
    folder.mkdir(exist_ok=True)
    text = f"{rounds.machine(2)}\n\n" + "\n".join(lines) + "\n"
    (folder / "ranks.md").write_text(text)
    print(text)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        print(json.dumps(work(sys.argv[-2], int(sys.argv[-1]))), flush=True)
    elif "--plain-torch" in sys.argv:
        print(json.dumps(plain_torch(sys.argv[-2], int(sys.argv[-1]))), flush=True)
    else:
        main()
