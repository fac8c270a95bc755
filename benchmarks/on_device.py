"""What benchmarks run step graphs on."""

from __future__ import annotations

import json
from functools import cache

import numpy as np

from device_tests.device.golden_steps import EXPECTED, losses
from edgelocal.bundle.folder import open_bundle
from edgelocal.runtime.block import Block
from edgelocal.runtime.cuda import open_cuda
from edgelocal.runtime.graphs import GraphPool
from edgelocal.runtime.provider import CPU, Provider

DEVICES = ("cpu", "cuda")


@cache  # its arena is that of the process
def make_provider(device: str, *, tf32: bool = False) -> Provider:
    """The provider of a device; on CUDA no node may run on the CPU.

    Raises:
        RuntimeMissingError: there is none.
    """
    return open_cuda(tf32=tf32).provider(None, None) if device == "cuda" else CPU


def golden_error(provider: Provider) -> float:
    """Largest relative error of a loss against float64, in 20 steps of the golden bundle."""
    bundle = open_bundle(EXPECTED.parent / "residual")
    graphs = GraphPool(bundle, 1, provider=provider)
    found = losses([Block(bundle, index, graphs) for index in range(len(bundle.manifest.blocks))])
    expected = np.asarray(json.loads(EXPECTED.read_text())["losses"])
    return float((np.abs(found - expected) / expected).max())
