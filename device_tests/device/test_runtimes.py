"""The same bundle on whatever ONNX Runtime is installed, against float64 eager PyTorch.

`golden/expected.json` holds the oracle's losses; device_tests/export/test_golden.py computes them anew and compares.
`make test` runs this file on ONNX Runtime 1.17, the current one, and onnxruntime-training-cpu 1.19.2.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from device_tests.device.golden_steps import EXPECTED, losses
from edgelocal.bundle.folder import open_bundle
from edgelocal.runtime.block import Block
from edgelocal.runtime.graphs import GraphPool
from edgelocal.runtime.library import runtime_info

RESIDUAL = Path(__file__).parent / "golden" / "residual"


def test_twenty_steps_agree_with_the_float64_oracle() -> None:
    bundle = open_bundle(RESIDUAL)
    graphs = GraphPool(bundle, 2)
    blocks = [Block(bundle, index, graphs) for index in range(len(bundle.manifest.blocks))]
    expected = np.asarray(json.loads(EXPECTED.read_text())["losses"])
    errors = np.abs(losses(blocks) - expected) / np.abs(expected)
    print(f"onnxruntime {runtime_info().version}: largest relative error of a loss in 20 steps {errors.max():.1e}")
    assert (expected[-1] < 0.7 * expected[0]).all()  # it is a training
    assert errors.max() < 2e-5
