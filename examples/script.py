"""What the example scripts share: their options, and the place for their pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import pyro

matplotlib.use("Agg")  # files only, no display
from matplotlib import pyplot as plt

plt.rcParams.update({"figure.constrained_layout.use": True, "savefig.bbox": "tight", "savefig.dpi": 130})


def parse_options(doc: str) -> argparse.Namespace:
    """Reads --output, --seed and --quick, and sets the seed."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("examples_output"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same results")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(options.seed)
    return options


def save(figure: plt.Figure, options: argparse.Namespace, name: str) -> None:
    """Writes a picture, and prints its path."""
    path = options.output / f"{name}.png"
    figure.savefig(path)
    plt.close(figure)
    print(f"picture: {path}")
