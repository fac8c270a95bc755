"""Arrays of samples that are read by row, and the dataset made of them.

Rows in plain files are read by position into the batch, not memory-mapped: mapped pages count as memory of the process
and would push it over its budget, and a file cut short meanwhile would kill it instead of raising an error. Memory is
the rows asked for, nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgelocal.errors import DataError
from edgelocal.formats.base import Indices, Labels, Samples, reading
from edgelocal.spec import InputSpec


class Rows(Protocol):
    """`count` rows of one shape and dtype."""

    @property
    def count(self) -> int:
        """Number of rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""

    def read(self, indices: Indices) -> npt.NDArray[Any]:
        """Rows `indices`: (k, *shape), a fresh array."""


@dataclass(frozen=True)
class FileRows:
    """Rows at `offset + i * stride` bytes of a file, each in row-major order."""

    path: Path
    offset: int
    stride: int
    count: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, indices: Indices) -> npt.NDArray[Any]:
        """Rows `indices`: (k, *shape), a fresh array."""
        data = np.empty((len(indices), self.row_bytes), dtype=np.uint8)
        with reading(self.path) as file:
            for start, stop in self._runs(indices):
                file.seek(self.offset + int(indices[start]) * self.stride)
                if file.readinto(data[start:stop].reshape(-1).data) != (stop - start) * self.row_bytes:
                    raise DataError(f"{self.path} ends before sample {indices[stop - 1]}; copy the file again")
        return data.view(self.dtype).reshape(len(indices), *self.shape)

    def _runs(self, indices: Indices) -> Iterator[tuple[int, int]]:
        """Ranges of `indices` that lie side by side in the file, so that labels are read in one go."""
        joined = (
            np.diff(indices) == 1 if self.stride == self.row_bytes else np.zeros(max(len(indices) - 1, 0), np.bool_)
        )
        bounds = [0, *(np.flatnonzero(~joined) + 1).tolist(), len(indices)]
        return pairwise(bounds) if len(indices) else iter(())


@dataclass(frozen=True, eq=False)
class MemoryRows:
    """Rows of an array in memory, for what had to be decompressed as a whole."""

    array: npt.NDArray[Any]

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.array)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.array.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""
        return self.array.dtype

    def read(self, indices: Indices) -> npt.NDArray[Any]:
        """Rows `indices`: (k, *shape), a fresh array."""
        return np.asarray(self.array[indices])


@dataclass(frozen=True)
class JoinedRows:
    """Parts of equal shape and dtype, one after the other."""

    parts: tuple[Rows, ...]

    @property
    def count(self) -> int:
        """Number of rows."""
        return sum(part.count for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.parts[0].shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""
        return self.parts[0].dtype

    def read(self, indices: Indices) -> npt.NDArray[Any]:
        """Rows `indices`: (k, *shape), a fresh array."""
        rows = np.empty((len(indices), *self.shape), dtype=self.dtype)
        first = 0
        for part in self.parts:
            here = (indices >= first) & (indices < first + part.count)
            if here.any():
                rows[here] = part.read(indices[here] - first)
            first += part.count
        return rows


@dataclass(frozen=True, eq=False)
class ArrayDataset:
    """A Dataset of rows. Made by `array_dataset`, which checks that the rows suit the input."""

    source: str
    classes: tuple[str, ...]
    labels: Labels
    rows: Rows
    shape: tuple[int, ...]
    channels_last: bool
    tokens: bool = False

    def __len__(self) -> int:
        return self.rows.count

    def read(self, indices: Indices) -> Samples:
        """As `Dataset.read`."""
        check_indices(indices, len(self))
        rows = self.rows.read(indices)
        if self.channels_last:
            rows = np.moveaxis(rows, -1, 1)
        samples = rows.reshape(len(indices), *self.shape)
        if self.tokens:
            return samples.astype(np.int64, copy=False)
        return samples if samples.dtype == np.uint8 else self._finite(samples, indices)

    def _finite(self, samples: npt.NDArray[Any], indices: Indices) -> npt.NDArray[np.float32]:
        with np.errstate(over="ignore"):  # what overflows float32 becomes Inf and is refused below
            floats = samples.astype(np.float32, copy=False)
        bad = np.flatnonzero(~np.isfinite(floats).all(axis=tuple(range(1, floats.ndim))))
        if len(bad):
            raise DataError(
                f"{self.source}: sample {indices[bad[0]]} holds NaN, Inf or a value beyond float32, expected finite "
                "numbers: correct or remove the sample"
            )
        return floats


def array_dataset(
    rows: Rows, labels: Labels, spec: InputSpec, source: str, classes: tuple[str, ...] = ()
) -> ArrayDataset:
    """Rows and their labels as a dataset for the input `spec`.

    Rows may be uint8 or float (integers for an input of token ids), shaped as the input; (H, W) for an input
    (1, H, W) or (H*W,); or (H, W, C) with C of 1 or 3 for an input (C, H, W). Where both orders of the axes fit,
    channels come first.

    Raises:
        DataError: no samples, another count of labels, another shape or dtype.
    """
    if rows.count == 0:
        raise DataError(f"{source} holds no samples; expected at least one")
    if len(labels) != rows.count:
        raise DataError(f"{source}: {len(labels)} labels for {rows.count} samples; expected one label a sample")
    tokens = spec.dtype == "int64"
    if tokens and rows.dtype.kind not in "iu":
        raise DataError(f"{source}: samples are {rows.dtype}, expected integers (token ids): convert them with astype")
    if not tokens and rows.dtype != np.uint8 and rows.dtype.kind != "f":
        raise DataError(
            f"{source}: samples are {rows.dtype}, expected uint8 (0..255) or float: convert them with numpy's astype"
        )
    channels_last = _is_channels_last(rows.shape, spec.shape, source)
    return ArrayDataset(source, classes, labels, rows, spec.shape, channels_last, tokens)


def check_indices(indices: Indices, count: int) -> None:
    """Refuse numbers outside 0..count-1, which would read from the wrong end or from another part of the file.

    Raises:
        IndexError: a fault of the caller, not of the data.
    """
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < count:
        raise IndexError(f"sample numbers {indices.min()}..{indices.max()} asked for, the dataset has 0..{count - 1}")


def _is_channels_last(found: tuple[int, ...], expected: tuple[int, ...], source: str) -> bool:
    grey = len(found) == 2 and expected in ((1, *found), (math.prod(found),))
    if found == expected or grey:
        return False
    if len(found) == 3 and found[2] in (1, 3) and expected == (found[2], *found[:2]):
        return True
    raise DataError(
        f"{source}: samples have shape {found}, the bundle takes {expected}: resize or reshape the samples, or export "
        f"the network with --input {'x'.join(map(str, found)) or '...'}"
    )
