"""Every estimator of log p(x) against models whose log p(x) is known: closed forms, quadrature, enumeration.

    python benchmarks/evidence_truths.py

Each model has a guide that is off on purpose: displaced, or a plain regression, and too wide. Of each 8 data points are
simulated, and each is estimated with 200 seeds. The table says, over the estimates that `Evidence` does not call
doubtful: the mean error with its standard error, the largest error in standard errors, and how often the 95 % interval
covers the truth; upper bounds start at the exact draw that the data were simulated from. It goes to
benchmark_output/evidence_truths.md, too.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae import (
    Evidence,
    adaptive_importance_sampling,
    annealed_importance_sampling,
    importance_sampling,
    prior_sampling,
    simulate,
)

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from truths.battery import TRUTHS, Truth, linear_gaussian

ESTIMATORS: dict[str, Callable[..., Evidence]] = {
    "prior": lambda *a, **k: prior_sampling(*a, num_particles=1000, **k),
    "importance": lambda *a, **k: importance_sampling(*a, num_particles=1000, **k),
    "importance, smoothed": lambda *a, **k: importance_sampling(*a, num_particles=1000, smooth=True, **k),
    "importance, defensive": lambda *a, **k: importance_sampling(*a, num_particles=1000, defensive=0.2, **k),
    "importance, delta": lambda *a, **k: importance_sampling(*a, num_particles=1000, correction="delta", **k),
    "importance, jackknife": lambda *a, **k: importance_sampling(*a, num_particles=1000, correction="jackknife", **k),
    "adaptive": lambda *a, **k: adaptive_importance_sampling(*a, **k),
    "annealed": lambda *a, **k: annealed_importance_sampling(*a, num_particles=100, num_temperatures=50, **k),
}
UPPER = ("importance", "adaptive", "annealed")
CONTINUOUS = ("importance, defensive", "adaptive", "annealed")  # not for models of discrete latents alone


@dataclass
class Cell:
    """What one estimator gave on one truth, over seeds and data points."""

    error: Tensor  # estimate − truth, (estimates,)
    evidence: Evidence

    @property
    def trusted(self) -> Tensor:
        return ~self.evidence.doubtful

    @property
    def bias(self) -> tuple[float, float]:
        """Mean error and its standard error."""
        return self.error.mean().item(), self.error.std().item() / math.sqrt(len(self.error))

    @property
    def largest(self) -> float:
        """Largest |error| in standard errors; weights that are all equal have an error of rounding."""
        return (self.error.abs() / (self.evidence.standard_error + 1e-5))[self.trusted].max().item()

    @property
    def coverage(self) -> float:
        inside = self.error.abs() <= 1.96 * self.evidence.standard_error + 1e-5
        return inside[self.trusted].double().mean().item()


def run(
    truth: Truth, estimator: Callable[..., Evidence], *, num_points: int, num_seeds: int, upper: bool = False
) -> Cell:
    """Estimates on `num_points` simulated data points, each repeated `num_seeds` times with draws of its own."""
    pyro.set_rng_seed(0)
    repeats = 1 if upper else num_seeds  # an upper bound needs a new exact draw, so new data, each time
    simulation = simulate(truth.model, truth.guide, torch.zeros(num_points * num_seeds // repeats, *truth.shape))
    x = simulation.args[0].repeat_interleave(repeats, 0)
    options: dict[str, Any] = {"exact_draw": simulation.latents} if upper else {}
    evidence = estimator(truth.model, truth.guide, x, progress=False, **options)
    exact = truth.log_evidence(simulation.args[0]).repeat_interleave(repeats, 0)
    return Cell(evidence.log_evidence - exact, evidence)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-points", type=int, default=8)
    parser.add_argument("--num-seeds", type=int, default=200)
    parser.add_argument("--truth", default="", help="only those whose name contains this")
    parser.add_argument("--output", type=Path, default=Path("benchmark_output"))
    options = parser.parse_args()
    table = [
        "| truth | estimator | mean error (nats) | largest error (SE) | 95 % covers | trusted |",
        "|---|---|---|---|---|---|",
    ]
    cells: dict[str, list[Cell]] = {}
    for name, make in TRUTHS.items():
        discrete = name.startswith("Bernoulli mixture")
        for estimator, upper in [(e, False) for e in ESTIMATORS] + [(e, True) for e in UPPER]:
            if options.truth not in name or (discrete and (estimator in CONTINUOUS or upper)):
                continue
            sizes = {"num_points": options.num_points, "num_seeds": options.num_seeds}
            cell = run(make(), ESTIMATORS[estimator], upper=upper, **sizes)
            label = estimator + ", upper bound" * upper
            cells.setdefault(label, []).append(cell)
            table.append(f"| {name} | {label} | {_row(cell, upper)} |")
            print(table[-1], flush=True)
    lines = [*summary(cells), "", *three_guides(), "", "Each truth:", "", *table]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "evidence_truths.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[: -len(table) - 2]))


def _row(cell: Cell, upper: bool) -> str:
    mean, error = cell.bias
    share = cell.trusted.double().mean()
    claims = f"{cell.largest:.1f} | {cell.coverage:.1%}" if share > 0 and not upper else " | "
    return f"{mean:+.4f} ± {error:.4f} | {claims} | {share:.0%}"


def summary(cells: dict[str, list[Cell]]) -> list[str]:
    """Over all truths; an estimator claims nothing where it calls all estimates doubtful."""
    lines = [
        "| estimator | truths | largest error (SE) | 95 % covers at least | mean error furthest beyond bound (nats) |",
        "|---|---|---|---|---|",
    ]
    for label, row in cells.items():
        upper = label.endswith("upper bound")
        claims = [c for c in row if c.trusted.any() and not upper]
        worst = max(row, key=lambda c: (-1 if upper else 1) * c.bias[0] / (c.bias[1] + 1e-6))
        largest = f"{max(c.largest for c in claims):.1f}" if claims else ""
        cover = f"{min(c.coverage for c in claims):.1%}" if claims else ""
        lines.append(f"| {label} | {len(row)} | {largest} | {cover} | {worst.bias[0]:+.4f} ± {worst.bias[1]:.4f} |")
    return lines


def three_guides() -> list[str]:
    """The exact posterior, one twice as wide and one 0.4 times as wide, on 100 points of a linear-Gaussian model."""
    lines = [
        "| guide | mean error (nats) | median standard error | median ESS of 5000 | median k-hat | not to trust |",
        "|---|---|---|---|---|---|",
    ]
    for name, widen in (("exact", 1.0), ("twice as wide", 2.0), ("0.4 times as wide", 0.4)):
        truth = linear_gaussian(3, 5, displace=0.0, widen=widen)
        pyro.set_rng_seed(0)
        x = simulate(truth.model, truth.guide, torch.zeros(100, 5)).args[0]
        e = importance_sampling(truth.model, truth.guide, x, num_particles=5000, progress=False)
        error = (e.log_evidence - truth.log_evidence(x)).mean()
        medians = [v.median().item() for v in (e.standard_error, e.effective_sample_size, e.pareto_khat)]
        lines.append(
            f"| {name} | {error:+.4f} | {medians[0]:.4f} | {medians[1]:.0f} | {medians[2]:.2f} "
            f"| {int(e.doubtful.sum())} of {len(x)} |"
        )
    return lines


if __name__ == "__main__":
    main()
