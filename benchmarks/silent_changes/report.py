"""The table of all ways, and what is to be read off it."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import torch

from silent_changes.arguments import ARGUMENTS
from silent_changes.classes import CLASSES
from silent_changes.functions import FUNCTIONS
from silent_changes.holders import ATTRIBUTES, CLOSURES, GLOBALS
from silent_changes.inference import PYRO
from silent_changes.modules import FILES, MODULES, TRICKS
from silent_changes.neural import NEURAL
from silent_changes.run import SETTINGS, Outcome, has_effect
from silent_changes.state import RANDOM, STATE
from silent_changes.way import Way

__all__ = ["GROUPS", "main"]

GROUPS: dict[str, list[Way]] = {
    "state of its own": STATE,
    "other random numbers": RANDOM,
    "globals": GLOBALS,
    "closures": CLOSURES,
    "attributes": ATTRIBUTES,
    "classes": CLASSES,
    "functions": FUNCTIONS,
    "other modules": MODULES,
    "files and process": FILES,
    "tricks": TRICKS,
    "arguments": ARGUMENTS,
    "nn.Module": NEURAL,
    "Pyro": PYRO,
}
BAD = ("SILENT", "error")
KINDS = ("equal", "re-recorded", "plain", "audit", *BAD)


def main() -> int:
    """Runs the ways; 1 if one of them is silent or an error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--way", default="", help="only those whose group or name contains this")
    parser.add_argument("--setting", choices=list(SETTINGS), help="only this one")
    parser.add_argument("--output", type=Path, default=Path("benchmark_output"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    settings = [options.setting] if options.setting else list(SETTINGS)
    rows: list[tuple[str, str, dict[str, Outcome]]] = []
    for group, ways in GROUPS.items():
        for way in ways:
            if options.way in f"{group}: {way.name}":
                rows.append((group, way.name, outcomes(way, settings)))
                print(_row(*rows[-1]), flush=True)
    lines = report(rows, settings)
    lines.append(f"\n{len(rows)} ways in {time.perf_counter() - start:.0f} s.")
    print("\n".join(["", *lines[lines.index(COUNTS) :]]))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "silent_changes.md").write_text("\n".join(lines) + "\n")
    return int(any(o.kind in BAD for *_, found in rows for o in found.values()))


def outcomes(way: Way, settings: list[str]) -> dict[str, Outcome]:
    """What became of a way in each setting."""
    try:
        if not has_effect(way):
            return dict.fromkeys(settings, Outcome("error", "plain Pyro does not notice it"))
    except Exception as error:
        return dict.fromkeys(settings, Outcome("error", f"the way itself: {type(error).__name__}: {error}"[:120]))
    return {name: SETTINGS[name](way) for name in settings}


COUNTS = "Counts:"


def report(rows: list[tuple[str, str, dict[str, Outcome]]], settings: list[str]) -> list[str]:
    """The table and the counts, in Markdown."""
    lines = [
        "Ways in which what a model reads can change between steps, and what compiled runs make of each.",
        "",
        "- equal: every loss is Pyro's to rounding, from one recording.",
        "- re-recorded: the same, from more than one recording.",
        "- plain: the same, as Pyro runs as it is.",
        "- audit: an audit noticed that losses differ; how many wrong steps (or epochs) came before.",
        "- SILENT: a loss or a final number differs, and nothing was said.",
        "- –: does not apply, or plain Pyro refuses it.",
        "",
        f"| group | way | {' | '.join(settings)} |",
        "|---|---|" + "---|" * len(settings),
        *[_row(*row) for row in rows],
        "",
        COUNTS,
        "",
        f"| setting | {' | '.join(KINDS)} |",
        "|---|" + "---:|" * len(KINDS),
    ]
    for name in settings:
        kinds = Counter(found[name].kind for *_, found in rows)
        lines.append(f"| {name} | {' | '.join(str(kinds[kind]) for kind in KINDS)} |")
    total = Counter(o.kind for *_, found in rows for o in found.values())
    at_once = total["equal"] + total["re-recorded"] + total["plain"]
    lines += ["", f"Right in every step: {at_once}. By audit: {total['audit']}. Silent: {total['SILENT']}."]
    for kind in BAD:
        bad = [
            f"{g}: {n} ({', '.join(s for s in settings if f[s].kind == kind)})"
            for g, n, f in rows
            if kind in [o.kind for o in f.values()]
        ]
        if bad:
            lines += ["", f"{kind}:", "", *[f"- {line}" for line in bad]]
    return lines


def _row(group: str, name: str, found: dict[str, Outcome]) -> str:
    return f"| {group} | {name.replace('|', chr(92) + '|')} | {' | '.join(map(str, found.values()))} |"
