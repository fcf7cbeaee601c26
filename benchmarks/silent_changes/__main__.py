"""Run as `python benchmarks/silent_changes`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from silent_changes.report import main

if __name__ == "__main__":
    sys.exit(main())
