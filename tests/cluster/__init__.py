"""Clusters on one machine: not part of the plain `pytest`, `make cluster-test` runs them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # programs, not a package
