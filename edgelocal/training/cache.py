"""Outputs of frozen blocks on disk, so that they need not run again in every epoch.

A file of rows, written and read by their place, so memory is the rows of one batch. Disk space: n times the bytes of
one block output (half of them as float16), twice while one cache is built from the one before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from edgelocal.bundle.spec import Manifest
from edgelocal.data.formats.base import Indices
from edgelocal.data.formats.row_io import read_rows, reserve, write_rows
from edgelocal.errors import StorageError, UsageError
from edgelocal.runtime.block import Block
from edgelocal.runtime.tensor import HOST, Place, Tensor
from edgelocal.storage.disk import DISK, storage_errors
from edgelocal.storage.tensors import Array

Inputs = Callable[[Indices], Tensor]
DTYPES = ("float32", "float16")
_LARGEST_HALF = float(np.finfo(np.float16).max)


class OutputCache:
    """Outputs of the first `depth` blocks for every sample, in a file that `close` removes.

    A killed run leaves its files behind; `clear` removes them when the run is resumed. `written_bytes` and `read_bytes`
    count what went to the file and came from it.
    """

    def __init__(
        self, file: FileIO, depth: int, shape: tuple[int, ...], dtype: np.dtype[Any], place: Place = HOST
    ) -> None:
        self._place = place
        self.depth = depth
        self.written_bytes = 0
        self.read_bytes = 0
        self._file = file
        self._path = Path(file.name)
        self._shape = shape
        self._dtype = dtype

    def read(self, indices: Indices) -> Tensor:
        """Outputs of samples `indices`, (k, *block output shape), float32.

        Raises:
            StorageError: the file cannot be read, or ends too early.
        """
        row_bytes = math.prod(self._shape) * self._dtype.itemsize
        rows = np.empty((len(indices), row_bytes), dtype=np.uint8)
        with storage_errors(self._path, DISK, "reading the cache"):
            missing = read_rows(self._file.fileno(), rows, indices)
        if missing is not None:
            raise StorageError(
                f"{self._path} ends before sample {missing}; check the medium, then start again: the run goes on from "
                "its last commit"
            )
        self.read_bytes += rows.nbytes
        values = rows.view(self._dtype).reshape(len(indices), *self._shape)
        self._place.turn()
        return self._place.of(values.astype(np.float32, copy=False))

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove the files of caches that nobody closed."""
        for path in folder.glob("outputs-*"):
            path.unlink()

    @classmethod
    def build(
        cls,
        folder: Path,
        inputs: Inputs,
        blocks: Sequence[Block],
        order: Sequence[Indices],
        after_batch: Callable[[], None] = lambda: None,
        dtype: str = "float32",
        place: Place = HOST,
    ) -> OutputCache:
        """Run the samples `inputs` gives through `blocks`, consecutive frozen ones, batch by batch in `order`.

        Rows of `dtype` "float16" take half the space; `read` gives float32 either way, in `place`. `after_batch` may
        raise to end it early; no file stays behind then.

        Raises:
            StorageError: not enough space, or the disk refused.
            UsageError: another dtype, or an output that float16 cannot hold.
        """
        if dtype not in DTYPES:
            raise UsageError(f"a cache of {dtype} was asked for, expected one of {', '.join(DTYPES)}")
        depth = blocks[-1].index + 1
        shape = blocks[-1].spec.forward.outputs[0].resolve(1)[1:]
        path = folder / f"outputs-{depth}"
        size = sum(len(indices) for indices in order) * math.prod(shape) * np.dtype(dtype).itemsize
        cache = cls(_create(path, size), depth, shape, np.dtype(dtype), place)
        try:
            for indices in order:
                cache._write(indices, _through(blocks, inputs(indices)))
                after_batch()
        except BaseException:
            cache.close()
            raise
        return cache

    def _write(self, indices: Indices, outputs: Tensor) -> None:
        values = outputs.array()  # may be a view, so `outputs` must live until it is written
        rows = np.ascontiguousarray(values if self._dtype == values.dtype else _halves(values, self._path))
        with storage_errors(self._path, DISK, "writing the cache"):
            write_rows(self._file.fileno(), rows, indices)
        self.written_bytes += rows.nbytes


def cache_precision(manifest: Manifest, samples: int, free_bytes: int) -> str:
    """The precision in which the outputs of any block, two of them at a time, take at most half of the free disk."""
    largest = max(math.prod(block.forward.outputs[0].resolve(1)) for block in manifest.blocks)
    for dtype in DTYPES:
        if 2 * samples * largest * np.dtype(dtype).itemsize <= free_bytes // 2:
            return dtype
    return "off"


def _through(blocks: Sequence[Block], h: Tensor) -> Tensor:
    for block in blocks:
        h = block.forward(h)
    return h


def _halves(values: Array, path: Path) -> Array:
    """As float16; NaN and Inf stay what they are, for the step to find."""
    with np.errstate(invalid="ignore", over="ignore"):
        largest, halves = max(float(values.max()), -float(values.min())), values.astype(np.float16)
    if _LARGEST_HALF < largest < math.inf:
        raise UsageError(
            f"{path}: a block puts out {largest:.4g}, float16 holds at most {_LARGEST_HALF:.0f}; keep the cache in "
            "float32"
        )
    return halves


def _create(path: Path, size: int) -> FileIO:
    """A new file of `size` bytes that has its space."""
    file: FileIO | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w+b", buffering=0)
        reserve(file.fileno(), size)
    except OSError as error:
        if file is not None:
            file.close()
            path.unlink()
        raise StorageError(
            f"{path}: no room for a cache of {size} bytes ({error.strerror}); free space or leave --cache out"
        ) from error
    return file
