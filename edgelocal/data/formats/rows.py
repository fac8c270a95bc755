"""Arrays of samples that are read by row, and the dataset made of them.

Rows are read by their place in the file, see the module `row_io`. Memory is the rows asked for, nothing more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgelocal.bundle.spec import InputSpec
from edgelocal.data.formats.base import Indices, Labels, Samples, reading
from edgelocal.data.formats.packed import PackedRows
from edgelocal.data.formats.row_io import read_rows
from edgelocal.errors import DataError


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

    @property
    def resident_bytes(self) -> int:
        """Bytes kept in memory."""

    def reading_bytes(self, k: int) -> int:
        """Peak of reading k rows, what is returned included."""

    def read(self, indices: Indices) -> npt.NDArray[Any]:
        """Rows `indices`: (k, *shape), a fresh array."""


def all_rows(rows: Rows) -> npt.NDArray[Any]:
    """All rows, for labels: what is packed is not unpacked into a file for them."""
    return rows.whole() if isinstance(rows, PackedRows) else rows.read(np.arange(rows.count))


@dataclass(frozen=True)
class FileRows:
    """Rows at `offset + i * stride` bytes of a file, each in row-major order."""

    path: Path
    offset: int
    stride: int
    count: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    resident_bytes = 0

    def reading_bytes(self, k: int) -> int:
        """Peak of reading k rows, what is returned included."""
        return k * math.prod(self.shape) * self.dtype.itemsize

    def read(self, indices: Indices) -> npt.NDArray[Any]:
        """Rows `indices`: (k, *shape), a fresh array."""
        data = np.empty((len(indices), self.reading_bytes(1)), dtype=np.uint8)
        with reading(self.path) as file:
            missing = read_rows(file.fileno(), data, indices, self.offset, self.stride)
        if missing is not None:
            raise DataError(f"{self.path} ends before sample {missing}; copy the file again")
        return data.view(self.dtype).reshape(len(indices), *self.shape)


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

    @property
    def resident_bytes(self) -> int:
        """Bytes kept in memory."""
        return sum(part.resident_bytes for part in self.parts)

    def reading_bytes(self, k: int) -> int:
        """Peak of reading k rows, what is returned included: all may lie in one part."""
        return 2 * k * math.prod(self.shape) * self.dtype.itemsize

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

    def __enter__(self) -> ArrayDataset:
        """As `Dataset.__enter__`."""
        if isinstance(self.rows, PackedRows):
            self.rows.unpack()
        return self

    def __exit__(self, *_: object) -> None:
        """As `Dataset.__exit__`."""
        if isinstance(self.rows, PackedRows):
            self.rows.close()

    @property
    def resident_bytes(self) -> int:
        """As `Dataset.resident_bytes`."""
        return self.labels.nbytes + self.rows.resident_bytes

    @property
    def sample_bytes(self) -> int:
        """As `Dataset.sample_bytes`."""
        return math.prod(self.shape) * self._dtype.itemsize

    @property
    def _dtype(self) -> np.dtype[Any]:
        if self.tokens:
            return np.dtype(np.int64)
        return self.rows.dtype if self.rows.dtype == np.uint8 else np.dtype(np.float32)

    def reading_bytes(self, k: int) -> int:
        """As `Dataset.reading_bytes`: the rows, and the samples where these are a copy."""
        copied = self.channels_last or self.rows.dtype != self._dtype
        return self.rows.reading_bytes(k) + copied * k * self.sample_bytes

    def read(self, indices: Indices) -> Samples:
        """As `Dataset.read`."""
        check_indices(indices, len(self))
        rows = self.rows.read(indices)
        if self.channels_last:
            rows = np.moveaxis(rows, -1, 1)
        with np.errstate(over="ignore"):  # what overflows float32 becomes Inf and is refused below
            samples = np.ascontiguousarray(rows, dtype=self._dtype).reshape(len(indices), *self.shape)
        if samples.dtype == np.float32:
            self._check_finite(samples, indices)
        return samples

    def _check_finite(self, samples: npt.NDArray[np.float32], indices: Indices) -> None:
        """By the extremes of each sample: NaN is passed on to both, and no mask of all values is made."""
        axes = tuple(range(1, samples.ndim))
        with np.errstate(invalid="ignore"):
            bad = np.flatnonzero(~(np.isfinite(samples.max(axis=axes)) & np.isfinite(samples.min(axis=axes))))
        if len(bad):
            raise DataError(
                f"{self.source}: sample {indices[bad[0]]} holds NaN, Inf or a value beyond float32, expected finite "
                "numbers: correct or remove the sample"
            )


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
