"""Run as `python benchmarks/pyro_examples CHECKOUT`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: each pair runs in a fork
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pyro_examples.report import main

if __name__ == "__main__":
    sys.exit(main())
