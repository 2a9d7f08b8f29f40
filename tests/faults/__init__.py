"""Sweeps that are killed, cut off and starved; `benchmarks/faults.py` does the same many times over."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # programs, not a package
