"""Pairs of Pyro's examples through `draw_particles`, `importance_sampling`, `from_pyro_svi` and `az.summary`.

    git clone https://github.com/pyro-ppl/pyro && python benchmarks/pyro_examples pyro

Models and guides are imported from the checkout, trained for some steps on small data that are made here, and their
log-weights compared with those of one trace at a time by Pyro alone: means by standard errors (|z| < 4.5), and
distributions by the test of Kolmogorov and Smirnov (p > 1e-4). Each pair runs in a process of its own. The table goes
to benchmark_output/pyro_examples.md as well; the exit status is 1 if something is wrong, crashes or does not end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyro
import torch

from pyro_examples import amortized, hierarchical, sequential
from pyro_examples.compare import CRASH, REFUSED, RIGHT, WRONG, examine

__all__ = ["main"]

EXAMPLES = {**amortized.EXAMPLES, **hierarchical.EXAMPLES, **sequential.EXAMPLES}
TOOLS = ("draw_particles", "importance_sampling", "from_pyro_svi")
HANG = "no end"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="of Pyro's repository, with its examples")
    parser.add_argument("--select", default="", help="only pairs with these words in their name")
    parser.add_argument("--limit", type=float, default=60, help="seconds for each pair")
    parser.add_argument("--log", type=Path, help="keeps what was found here, one line of JSON for each pair")
    parser.add_argument("--before", type=Path, help="such a log of an earlier commit, for a column of its verdicts")
    parser.add_argument("--output", type=Path, default=Path("benchmark_output"))
    options = parser.parse_args()
    if not (options.checkout / "examples").is_dir():
        parser.error(f"{options.checkout} has no examples. Try a clone of https://github.com/pyro-ppl/pyro.")
    records = {}
    if options.log:
        options.log.write_text("")
    for name in (name for name in EXAMPLES if options.select in name):
        start = time.perf_counter()
        records[name] = record = run(name, options.checkout.resolve(), options.limit)
        record["seconds"] = time.perf_counter() - start
        print(f"{name}: {verdict(record)} ({record['seconds']:.0f} s)", file=sys.stderr, flush=True)
        if options.log:
            with options.log.open("a") as file:
                file.write(json.dumps({"name": name, **record}) + "\n")
    before = {}
    if options.before:
        lines = map(json.loads, options.before.read_text().splitlines())
        before = {line["name"]: verdict(line) for line in lines}
    lines = table(records, before)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "pyro_examples.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(any(verdict(record) not in (RIGHT, REFUSED) for record in records.values()))


def run(name: str, checkout: Path, limit: float) -> dict[str, Any]:
    """What `examine` says of a pair, in a process of its own, which is ended after `limit` seconds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_examine, args=(name, checkout, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            return receiver.recv()
        return {"failed": HANG, "why": f"no end after {limit:.0f} s"}
    except EOFError:
        return {"failed": CRASH, "why": "the process ended"}
    finally:
        process.terminate()
        process.join()


def _examine(name: str, checkout: Path, sender: Any) -> None:
    torch.set_num_threads(1)
    try:
        sender.send(examine(EXAMPLES[name], checkout))
    except Exception as error:  # in the example itself, or in the reference
        import traceback

        sender.send({"failed": "not run", "why": f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"})


def verdict(record: dict[str, Any]) -> str:
    """Of all tools: the worst. Evidence for each point is to be refused where points share latents."""
    if "failed" in record:
        return str(record["failed"])
    found = [record[tool]["verdict"] for tool in TOOLS]
    found += [v for v in [record.get("per point", {}).get("verdict")] if v in (WRONG, CRASH)]
    return next(v for v in (CRASH, WRONG, REFUSED, RIGHT) if v in found)


def reason(record: dict[str, Any]) -> str:
    """Why a pair is not right: the first sentence of the first tool that says so."""
    if "failed" in record:
        return _first(record["why"])
    worst = verdict(record)
    for tool in ("per point", *TOOLS):
        found = record.get(tool)
        if worst != RIGHT and found and found["verdict"] == worst:
            return f"`{tool}`: {_first(found['note'])}"
    return "one trace at a time" if any("one at a time" in text for text in record["warnings"]) else ""


def _first(text: str) -> str:
    sentence = re.split(r"\. |\n", text.strip())[0]
    return re.sub(r"^(ValueError|TypeError|NotImplementedError): ", "", sentence)[:220].replace("|", "\\|")


def table(records: dict[str, dict[str, Any]], before: dict[str, str]) -> list[str]:
    """The table, with a line on how many of each there are."""
    counts = Counter(verdict(record) for record in records.values())
    said = ", ".join(f"{n} {what}" for what, n in counts.most_common())
    lines = [f"{len(records)} pairs: {said}. torch {torch.__version__}, Pyro {pyro.__version__}.", ""]
    if before:
        said = ", ".join(f"{n} {what}" for what, n in Counter(before[n] for n in records if n in before).most_common())
        lines += [f"Before: {said}.", ""]
    head = ["pair", "points", "log w, one at a time", *(f"`{tool}`" for tool in TOOLS)]
    head += [*(["before"] if before else []), "verdict", "why"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, record in records.items():
        cells = [name, *([""] * 5)]
        if "failed" not in record:
            points = "joint" if record["points"] == 1 else str(record["points"])
            cells = [name, points, record["serial"], *(_cell(record[tool]) for tool in TOOLS)]
        cells += [*([before.get(name, "")] if before else []), verdict(record), reason(record)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(found: dict[str, str]) -> str:
    return found["note"].partition(" (plate=None")[0] if found["verdict"] == RIGHT else found["verdict"]
