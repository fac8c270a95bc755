"""Twenty steps of the golden bundle `residual` on data that every machine computes alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from edgelocal.data.augment import uniform
from edgelocal.runtime.block import Block
from edgelocal.storage.tensors import Array

EXPECTED = Path(__file__).parent / "golden" / "expected.json"
STEPS, BATCH, LR = 20, 16, 0.02


def batches() -> Iterator[tuple[Array, Array]]:
    """(x (16, 1, 8, 8) float32, y (16,) int64) of every step: noise, and a brighter quarter for each class."""
    for step in range(STEPS):
        draws = uniform(7, step, np.arange(BATCH * 64, dtype=np.uint64), stream=99)
        x = (draws.reshape(BATCH, 1, 8, 8) - 0.5).astype(np.float32)
        y = np.arange(BATCH, dtype=np.int64) % 4
        for image, c in zip(x[:, 0], y, strict=True):
            image[4 * (c // 2) : 4 * (c // 2) + 4, 4 * (c % 2) : 4 * (c % 2) + 4] += 1
        yield x, y


def losses(blocks: Sequence[Block]) -> Array:
    """Train `blocks` on all batches, where they are; the losses of every block (columns) in every step (rows)."""
    hyper = {"lr": LR, **blocks[0].bundle.manifest.optimizer.hyper}
    found = []
    for number, (x, y) in enumerate(batches()):
        h, labels = blocks[0].place.of(x), blocks[0].place.of(y)
        row = []
        for block in blocks:
            result = block.step(h, labels, hyper, 0, number)
            h = result.h
            row.append(result.loss)
        found.append(row)
    return np.asarray(found)
