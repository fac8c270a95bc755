"""parity.py is a benchmark and a test; a script finds its neighbours by itself, a test has to be told."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
torch.set_num_threads(1)
