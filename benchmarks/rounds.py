"""Timing systems against each other: one process for each, in turns, so that all see the same machine.

A benchmark script calls `measure` for a configuration. That starts the script itself once for each system, as
`script --worker`; the worker builds its system and runs as often as it is told to, while the others wait.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

Run = Callable[[int], Any]  # so many repetitions


def worker(systems: dict[str, Callable[..., Run]]) -> None:
    """Serves a parent's `measure`, if this process was started by one, and exits."""
    if "--worker" not in sys.argv:
        return
    name, config = sys.argv[-2], json.loads(sys.argv[-1])
    try:
        run = systems[name](**config)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        os._exit(0)
    if hasattr(run, "main"):  # something that wants the main thread, where the number of threads was set
        threading.Thread(target=_serve, args=(run,), daemon=True).start()
        run.main()
    else:
        _serve(run)


def _serve(run: Run) -> None:
    run(2)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        run(int(line))
        seconds = (time.perf_counter() - start) / getattr(run, "steps", 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": seconds, "peak": peak}), flush=True)
    os._exit(0)  # whatever threads are left


def measure(
    script: str, systems: list[str], config: dict[str, Any], *, threads: int, rounds: int = 5, seconds: float = 0.5
) -> dict[str, dict[str, Any]]:
    """Times systems in turns.

    Returns:
        {system: {"seconds": median time of one repetition, "peak": resident memory, KiB}}, or {"missing": why}.
    """
    env = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    flags = "" if threads > 1 else " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    env["XLA_FLAGS"] = env.get("XLA_FLAGS", "") + flags
    command = [sys.executable, "-W", "ignore", script, "--worker"]
    processes, results, repetitions = {}, {}, {}
    try:
        for name in systems:
            process = subprocess.Popen(
                [*command, name, json.dumps(config)], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            answer = _answer(process, name)
            if "missing" in answer:
                results[name] = answer
                continue
            processes[name] = process
            start = time.perf_counter()
            _ask(process, name, 1)
            repetitions[name] = max(1, round(seconds / (time.perf_counter() - start)))
        times: dict[str, list[float]] = {name: [] for name in processes}
        for _ in range(rounds):
            for name, process in processes.items():
                answer = _ask(process, name, repetitions[name])
                times[name].append(answer["seconds"] / repetitions[name])
                results[name] = {"seconds": median(times[name]), "peak": answer["peak"]}
    finally:
        for process in processes.values():
            process.stdin.close()
            process.wait()
    return {name: results[name] for name in systems}


def _ask(process: subprocess.Popen, name: str, repetitions: int) -> dict[str, Any]:
    process.stdin.write(f"{repetitions}\n")
    process.stdin.flush()
    return _answer(process, name)


def _answer(process: subprocess.Popen, name: str) -> dict[str, Any]:
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"the worker for {name!r} stopped")


def machine(threads: int) -> str:
    """The processor and the versions that a table was made with."""
    from importlib.metadata import PackageNotFoundError, version

    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    found = []
    for package in ("torch", "pyro-ppl", "jax", "numpyro", "pythae"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return f"{model}, {threads} threads; Python {platform.python_version()}, {', '.join(found)}"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all timings have."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one round of one system")
    parser.add_argument("--output", type=Path, default=Path("benchmark_output"))
    return parser
