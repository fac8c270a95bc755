"""Outputs of frozen blocks on disk, so that they need not run again in every epoch.

A memory-mapped array of n samples: the system keeps in memory what it can spare and writes back the rest. Disk space:
n * bytes of one block output, twice while one cache is built from the one before.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgelocal.block import Block
from edgelocal.errors import StorageError
from edgelocal.formats.base import Indices
from edgelocal.session import Tensor
from edgelocal.tensors import Array

Inputs = Callable[[Indices], Tensor]


class OutputCache:
    """Outputs of the first `depth` blocks for every sample, in a file that `close` removes.

    A killed run leaves its files behind; `clear` removes them when the run is resumed.
    """

    def __init__(self, path: Path, rows: Array, depth: int) -> None:
        self.depth = depth
        self._path = path
        self._rows = rows

    def read(self, indices: Indices) -> Tensor:
        """Outputs of samples `indices`, (k, *block output shape)."""
        return Tensor.of(self._rows[indices])

    def close(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove the files of caches that nobody closed."""
        for path in folder.glob("outputs-*.f32"):
            path.unlink()

    @classmethod
    def build(
        cls,
        folder: Path,
        inputs: Inputs,
        blocks: Sequence[Block],
        order: Sequence[Indices],
        after_batch: Callable[[], None] = lambda: None,
    ) -> OutputCache:
        """Run the samples `inputs` gives through `blocks`, consecutive frozen ones, batch by batch in `order`.

        `after_batch` may raise to end it early; no file stays behind then.

        Raises:
            StorageError: not enough space.
        """
        depth = blocks[-1].index + 1
        count = sum(len(indices) for indices in order)
        shape = blocks[-1].spec.forward.outputs[0].resolve(1)[1:]
        path = folder / f"outputs-{depth}.f32"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _reserve(path, count * math.prod(shape) * 4)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise StorageError(
                f"{path}: no room for a cache of {count * math.prod(shape) * 4} bytes ({error.strerror}); "
                "free space or leave --cache out"
            ) from error
        rows = np.memmap(path, dtype=np.float32, mode="r+", shape=(count, *shape))
        cache = cls(path, rows, depth)
        try:
            for indices in order:
                h = inputs(indices)
                for block in blocks:
                    h = block.forward(h)
                rows[indices] = h.array()
                after_batch()
        except BaseException:
            cache.close()
            raise
        return cache


def _reserve(path: Path, size: int) -> None:
    """Allocate the space now: a full disk is an error here, and not a bus error when a mapped page is written."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size))
