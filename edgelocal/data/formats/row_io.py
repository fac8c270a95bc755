"""Rows of an open file, read and written by their place in it; neighbouring rows in one call.

Plain reads and writes, no mapping: mapped pages count as memory of the process and would push it over its budget, and a
file cut short meanwhile would kill it instead of raising an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelocal.data.formats.base import Indices


def reserve(descriptor: int, size: int) -> None:
    """Allocate the space of a new file now, so that a full disk is met before half of it is written; OSError."""
    os.posix_fallocate(descriptor, 0, max(1, size))


def read_rows(
    descriptor: int, rows: npt.NDArray[np.uint8], indices: Indices, offset: int = 0, stride: int | None = None
) -> int | None:
    """Fill `rows`, (k, bytes of a row), with the rows `indices` that lie at `offset + i * stride`; rows touch if None.

    Returns:
        None, or the first of `indices` that the file does not hold as a whole.

    Raises:
        OSError: as the system does.
    """
    step = rows.shape[1] if stride is None else stride
    for start, stop in _runs(indices, step == rows.shape[1]):
        done = _fill(descriptor, rows[start:stop].reshape(-1), offset + int(indices[start]) * step)
        if done < (stop - start) * rows.shape[1]:
            return int(indices[start + done // rows.shape[1]])
    return None


def write_rows(descriptor: int, rows: npt.NDArray[Any], indices: Indices) -> None:
    """Write `rows`, (k, ...) and C-contiguous, as rows `indices` of a file in which rows touch; OSError."""
    flat = rows.reshape(len(indices), -1).view(np.uint8)
    for start, stop in _runs(indices, True):
        write_whole(descriptor, flat[start:stop].reshape(-1).data, int(indices[start]) * flat.shape[1])


def write_whole(descriptor: int, data: memoryview, at: int) -> None:
    """Write all of `data`, flat bytes, at byte `at`; OSError."""
    while data:
        done = os.pwrite(descriptor, data, at)
        data, at = data[done:], at + done


def _fill(descriptor: int, buffer: npt.NDArray[np.uint8], at: int) -> int:
    """Bytes read from byte `at` on; fewer than asked for only where the file ends."""
    done = 0
    while done < len(buffer) and (count := os.preadv(descriptor, [buffer[done:].data], at + done)):
        done += count
    return done


def _runs(indices: Indices, touching: bool) -> Iterator[tuple[int, int]]:
    """Ranges of `indices` that lie side by side in the file; each alone where rows do not touch."""
    if not touching:
        return ((k, k + 1) for k in range(len(indices)))
    bounds = [0, *(np.flatnonzero(np.diff(indices) != 1) + 1).tolist(), len(indices)]
    return pairwise(bounds) if len(indices) else iter(())
