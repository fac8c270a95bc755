"""The values the device suite compares with, computed anew by eager PyTorch in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from device_tests.device.golden_steps import EXPECTED, LR, STEPS, batches
from edgelocal.bundle.folder import open_bundle
from edgelocal.exporters.optimizers import sgd
from edgelocal.exporters.oracle import Oracle
from edgelocal.exporters.rules import build_blocks
from edgelocal.exporters.units import load_network

GOLDEN = Path(__file__).parents[1] / "device" / "golden"


def oracle_losses() -> list[list[float]]:
    """Losses of every block (columns) in every step (rows), float64, from the weights of the golden bundle."""
    bundle = open_bundle(GOLDEN / "residual")
    manifest = bundle.manifest
    network = load_network(f"{GOLDEN / 'networks.py'}:residual", manifest.input.shape, manifest.task.classes, 0)
    first = 0
    spans = []
    for block in manifest.blocks:
        spans.append(range(first, first + len(block.units)))
        first += len(block.units)
    blocks = build_blocks(network, manifest.rule, tuple(spans), 0)
    for block, spec in zip(blocks, manifest.blocks, strict=True):
        weights = {name.partition("/")[2]: array for name, array in bundle.weights(spec).items()}
        block.load_state_dict({k: torch.from_numpy(weights[n].copy()) for k, n in block.tensor_names().items()})
    hyper = manifest.optimizer.hyper
    oracle = Oracle(blocks, manifest.task, sgd(hyper["momentum"], hyper["weight_decay"]).reference, torch.float64)
    steps = (oracle.step(torch.from_numpy(x), torch.from_numpy(y), LR) for x, y in batches())
    return [[float(loss) for loss, _ in results] for results in steps]


def test_the_committed_values_are_the_oracles() -> None:
    committed = json.loads(EXPECTED.read_text())["losses"]
    assert len(committed) == STEPS
    np.testing.assert_allclose(committed, oracle_losses(), rtol=1e-9)


if __name__ == "__main__":
    EXPECTED.write_text(json.dumps({"losses": oracle_losses()}) + "\n")
