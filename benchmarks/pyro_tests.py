"""Pyro's own tests, with `CompiledELBO` compared to each objective that they use and put in place of the jitted ones.

    git clone https://github.com/pyro-ppl/pyro && python benchmarks/pyro_tests.py pyro

Runs pytest in the checkout, once as it is and once with `pyro_tests_plugin.py`, which makes each call of an objective
again through `CompiledELBO` (backend "eager") under the same seed, four times, and compares loss, gradients, the
parameters that were used and the state of the random generators. The same plugin replaces `JitTrace_ELBO` and its
siblings by `CompiledELBO`. The tables go to benchmark_output/pyro_tests.md as well. The exit status is 1 if a call
differs or fails, or if a test fails, or does not run in the time, that passes without the plugin.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

FILES = {  # in tests/infer, and which of their tests
    "test_jit.py": "",
    "test_gradient.py": "",
    "test_enum.py": "elbo",
    "test_valid_models.py": "",
    "test_multi_sample_elbos.py": "",
    "test_elbo_mapdata.py": "",
}
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="of Pyro's repository, with its tests")
    parser.add_argument("--files", nargs="*", default=list(FILES), help="in tests/infer")
    parser.add_argument("--select", help="expression of pytest's -k, for all files")
    parser.add_argument("--every", type=int, default=1, help="runs one test out of so many")
    parser.add_argument("--limit", type=int, default=3600, help="seconds for each run")
    parser.add_argument("--logs", type=Path, help="keeps what was found here; runs that are there are not made again")
    parser.add_argument("--output", type=Path, default=Path("benchmark_output"))
    options = parser.parse_args()
    if not (options.checkout / "tests" / "infer").is_dir():
        parser.error(f"{options.checkout} has no tests/infer. Try a clone of https://github.com/pyro-ppl/pyro.")
    plain, ours = {}, {}
    for file in options.files:
        select = FILES.get(file, "") if options.select is None else options.select
        plain[file] = run(options, file, select, plain=True)
        ours[file] = run(options, file, select, plain=False)
        print(f"{file}: {len(ours[file])} entries", file=sys.stderr, flush=True)
    lines, good = report(plain, ours)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "pyro_tests.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(not good)


def run(options: Any, file: str, select: str, *, plain: bool) -> Rows:
    """Runs a file of tests and returns what the plugin wrote down."""
    with tempfile.TemporaryDirectory() as folder:
        log = (options.logs or Path(folder)).resolve() / f"{'plain_' if plain else ''}{Path(file).stem}.jsonl"
        if log.exists():
            return [json.loads(line) for line in log.read_text().splitlines()]
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        paths = [str(Path(__file__).parent.resolve()), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONDONTWRITEBYTECODE": "1"}
        env |= {"PYRO_TESTS_LOG": str(log), "PYRO_TESTS_PLAIN": "1" if plain else ""}
        env["PYRO_TESTS_EVERY"] = str(options.every)
        env.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pyro_tests_plugin"]
        command += ["--assert=plain"]  # pytest rewrites the assertions of models as well
        command += [f"tests/infer/{file}", *(["-k", select] if select else [])]
        try:
            done = subprocess.run(
                command, cwd=options.checkout, env=env, capture_output=True, text=True, timeout=options.limit
            )
            if done.returncode not in (0, 1):
                raise SystemExit(f"pytest failed on {file}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        except subprocess.TimeoutExpired:
            print(f"{file}: stopped after {options.limit} s", file=sys.stderr)
        return [json.loads(line) for line in log.read_text().splitlines()]


def report(plain: dict[str, Rows], ours: dict[str, Rows]) -> tuple[list[str], bool]:
    """The tables, and whether all is well."""
    lines = [
        "| file | tests passed, failed | with ours | compared calls | replayed, equal | the same floats "
        "| refused | left to Pyro, silently | different | errors | not repeatable |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    bad: list[str] = []
    for file, rows in ours.items():
        calls = [row for row in rows if row["kind"] == "call" and row["method"] != "loss"]
        losses = [row for row in rows if row["kind"] == "call" and row["method"] == "loss"]
        same, how = Counter(row["same"] for row in calls), Counter(row["how"] for row in calls)
        replayed = [row for row in calls if row["how"] == "replayed" and row["same"] == "equal"]
        exact = sum(row["exact"] for row in replayed)
        same += Counter(row["same"] for row in losses if row["same"] != "equal")
        lines.append(
            f"| {file} | {outcomes(plain[file])} | {outcomes(rows)} | {len(calls)} | {len(replayed)} | {exact} "
            f"| {how['refused']} | {how['plain']} | {same['different']} | {same['error']} | {same['not repeatable']} |"
        )
        for row in (*calls, *losses):
            if row["same"] in ("different", "error"):
                bad.append(f"- {name(row)}, {row['elbo']}.{row['method']}, {row['same']}: {row['note']}")
        missing = ran(plain[file]) - ran(rows)
        if missing:
            bad.append(f"- {file}: {len(missing)} of {len(ran(plain[file]))} tests did not run with ours in the time")
        bad += [f"- {t}: fails with ours only: {why}" for t, why in new_failures(plain[file], rows)]
    lines += ["", *replaced(ours), "", *refusals(ours)]
    return [*lines, "", "Different, errors, or not run:", "", *(bad or ["none"])], not bad


def ran(rows: Rows) -> set[str]:
    return {row["id"] for row in rows if row["kind"] == "outcome"}


def outcomes(rows: Rows) -> str:
    found = Counter(row["outcome"] for row in rows if row["kind"] == "outcome")
    return ", ".join(f"{n} {what}" for what, n in sorted(found.items(), key=lambda item: -item[1]))


def new_failures(plain: Rows, ours: Rows) -> list[tuple[str, str]]:
    passed = {row["id"] for row in plain if row["kind"] == "outcome" and row["outcome"] != "failed"}
    failed = [row for row in ours if row["kind"] == "outcome" and row["outcome"] == "failed" and row["id"] in passed]
    return [(row["id"].rpartition("::")[2], row["message"].strip().rpartition("\n")[2][:200]) for row in failed]


def replaced(ours: dict[str, Rows]) -> list[str]:
    """What became of the tests of Pyro's jitted objectives."""
    rows = [row for rows in ours.values() for row in rows if row["kind"] == "jit"]
    refused = Counter(cause(row["why"]) for row in rows if row["why"])
    calls, replays = (sum(row.get(what, 0) for row in rows) for what in ("calls", "replayed"))
    xpassed = [row for rows in ours.values() for row in rows if row.get("outcome") == "xpassed"]
    lines = [
        f"{len(rows)} tests of Pyro's jitted objectives ran with ours in their place: {calls} calls, {replays} "
        f"replayed; {sum(refused.values())} tests refused, {len(xpassed)} passed that Pyro's own are expected to fail."
    ]
    return lines + [f"- {n} × {why}" for why, n in refused.most_common()]


def refusals(ours: dict[str, Rows]) -> list[str]:
    """Why calls were left to Pyro, by what reads a value and where."""
    found: dict[tuple[str, str], Rows] = defaultdict(list)
    for row in (row for rows in ours.values() for row in rows if row["kind"] == "call" and row["method"] != "loss"):
        if row["how"] in ("refused", "plain"):
            found[row["how"], cause(row["why"])].append(row)
    lines = ["| | left to Pyro because of | calls | tests | objectives | Pyro's JIT there | for example |"]
    lines.append("|---|---|---|---|---|---|---|")
    for (how, why), rows in sorted(found.items(), key=lambda item: -len(item[1])):
        jits = Counter(jit(row["jit"]) for row in rows if "jit" in row)
        elbos = ", ".join(sorted({row["elbo"] for row in rows}))
        tests = sorted({name(row) for row in rows})
        said = ", ".join(f"{n} {what}" for what, n in jits.most_common())
        kind = "refused" if how == "refused" else "silent"
        lines.append(f"| {kind} | {why} | {len(rows)} | {len(tests)} | {elbos} | {said} | {tests[0]} |")
    return lines


def cause(why: Any) -> str:
    """A reason without what is particular to one test."""
    if isinstance(why, str):
        return why
    first = why[0]
    text = re.sub(r"/\S+/|\w+\.py:\d+: |objectives\.", "", first["message"])
    text = re.sub(r"Pyro runs as it is, not compiled: |Trace\w*_ELBO|raise Untraceable.* \(Untraceable: ", "", text)
    reads = "read here" in text or "Untraceable" in str(first.get("error"))
    lines = [line for line in first.get("lines", []) if not line.startswith((":", "pyro_vae"))]
    if reads and lines:
        where = re.sub(r"^tests\.(\S+?):\d+: ", r"tests.\1: ", lines[-1])
        return f"`{first['function']}` at `{where}`".replace("|", "\\|")
    if lines and first.get("error"):
        return f"`{first['error'].strip().partition(chr(10))[0][:120]}` at `{lines[-1]}`".replace("|", "\\|")
    return text.replace("|", "\\|")


def jit(said: str) -> str:
    if said.startswith("other numbers: random state"):
        return "other draws"
    return "other numbers" if said.startswith("other numbers") else said.partition(":")[0]


def name(row: dict[str, Any]) -> str:
    return str(row["test"].rpartition("::")[2])


if __name__ == "__main__":
    main()
