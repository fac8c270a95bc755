"""Arrays that are compressed as a whole: unpacked once, piece by piece, into a file, and read from there by row.

Unpacked arrays of up to 1 MiB stay in memory. The file has no name: it is gone when the dataset is closed, and also
when the process is killed. Its space is reserved before the first byte is written.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgelocal.data.formats.base import Indices, Readable
from edgelocal.data.formats.row_io import read_rows, reserve, write_whole
from edgelocal.errors import DataError, StorageError
from edgelocal.storage.disk import DISK, storage_errors

IN_MEMORY_BYTES = 1 << 20
PIECE_BYTES = 1 << 18
_NAME = "unpacked data"  # in messages: the file has none
_MAX_RATIO = 1032  # no deflate stream expands more, see zlib's technical details


@dataclass(frozen=True)
class Packed:
    """A compressed array: its stream, which stands at the first value, and what its header says."""

    stream: Readable
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    where: str

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


Opened: TypeAlias = Callable[[], AbstractContextManager[Packed]]


@dataclass(frozen=True, eq=False)
class MemoryRows:
    """Rows of an array in memory."""

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

    @property
    def resident_bytes(self) -> int:
        """Bytes kept in memory."""
        return self.array.nbytes

    def reading_bytes(self, k: int) -> int:
        """Peak of reading k rows, what is returned included."""
        return k * math.prod(self.shape) * self.dtype.itemsize

    def read(self, indices: Indices) -> npt.NDArray[Any]:
        """Rows `indices`: (k, *shape), a fresh array."""
        return np.asarray(self.array[indices])


class PackedRows:
    """Rows of a compressed array. `unpack` makes the file they are read from, the first `read` at the latest.

    Args:
        opened: opens the array; what is damaged is a DataError.
        head: what it gave when opened before; its stream is not used.
        scratch: folder on whose disk the file is made; None for the system's folder of temporary files.
    """

    resident_bytes = 0

    def __init__(self, opened: Opened, head: Packed, scratch: Path | None) -> None:
        self.count = head.shape[0]
        self.shape = head.shape[1:]
        self.dtype = head.dtype
        self._where = head.where
        self._size = head.size
        self._opened = opened
        self._scratch = scratch
        self._file: io.FileIO | None = None

    def reading_bytes(self, k: int) -> int:
        """Peak of reading k rows, what is returned included."""
        return k * math.prod(self.shape) * self.dtype.itemsize

    def unpack(self) -> io.FileIO:
        """The file of the values, made now if it is not there.

        Raises:
            DataError: the compressed data is damaged.
            StorageError: no space for the file, or the disk refused.
        """
        if self._file is None:
            with self._opened() as packed:
                self._file = _unpacked(packed.stream, self._size, self._where, self._folder())
        return self._file

    def read(self, indices: Indices) -> npt.NDArray[Any]:
        """Rows `indices`: (k, *shape), a fresh array."""
        data = np.empty((len(indices), self.reading_bytes(1)), dtype=np.uint8)
        descriptor = self.unpack().fileno()
        place = self._folder() / _NAME
        with storage_errors(place, DISK, f"reading what {self._where} was unpacked to"):
            missing = read_rows(descriptor, data, indices)
        if missing is not None:
            raise StorageError(
                f"{place}: what {self._where} was unpacked to ends before sample {missing}; check the medium, then "
                "start again"
            )
        return data.view(self.dtype).reshape(len(indices), *self.shape)

    def whole(self) -> npt.NDArray[Any]:
        """All rows, without the file: (count, *shape). For labels, which are kept in memory anyway."""
        with self._opened() as packed:
            return _loaded(packed.stream, self._size, self._where).view(self.dtype).reshape(self.count, *self.shape)

    def close(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _folder(self) -> Path:
        return self._scratch or _temporary()


def packed_rows(opened: Opened, path: Path, scratch: Path | None) -> MemoryRows | PackedRows:
    """The rows of a compressed array in the file `path`, in memory if they are few.

    Raises:
        DataError: damaged.
    """
    with opened() as packed:
        if packed.size > _MAX_RATIO * path.stat().st_size:
            raise DataError(
                f"{packed.where} claims {packed.size} bytes, more than its {path.stat().st_size} compressed bytes can "
                "hold: it is damaged; make or copy it again"
            )
        rows = PackedRows(opened, packed, scratch)
    return MemoryRows(rows.whole()) if packed.size <= IN_MEMORY_BYTES else rows


def _loaded(stream: Readable, size: int, where: str) -> npt.NDArray[np.uint8]:
    data = np.empty(size, dtype=np.uint8)
    at = 0
    for piece in _pieces(stream, size, where):
        data[at : at + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
        at += len(piece)
    return data


def _unpacked(stream: Readable, size: int, where: str, folder: Path) -> io.FileIO:
    """A nameless file in `folder` with the next `size` bytes of a stream, which must be all of it."""
    place, what = folder / _NAME, f"unpacking {where}, {size} bytes needed"
    with storage_errors(place, DISK, what):
        file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115 - closed by PackedRows.close
    try:
        with storage_errors(place, DISK, what):
            reserve(file.fileno(), size)
        at = 0
        for piece in _pieces(stream, size, where):
            with storage_errors(place, DISK, what):
                write_whole(file.fileno(), memoryview(piece), at)
            at += len(piece)
    except BaseException:
        file.close()
        raise
    return file


def _pieces(stream: Readable, size: int, where: str) -> Iterator[bytes]:
    """The next `size` bytes of a stream. It is read to its end, where the checksum is compared."""
    left = size
    while left and (piece := stream.read(min(PIECE_BYTES, left))):
        left -= len(piece)
        yield piece
    if left or stream.read(1):
        found = f"{size - left} bytes" if left else f"more than {size} bytes"
        raise DataError(f"{where} holds {found} after its header, expected {size}: make or copy it again")


def _temporary() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise StorageError(f"{error.strerror}; set TMPDIR to a folder that can be written") from error
