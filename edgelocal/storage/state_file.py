"""The file of a checkpoint, opened once and read a part at a time, whenever one is wanted.

What is read late must be what was checked early. So every piece of the file has to be as it was when it was first read;
checking the seal reads them all.
"""

from __future__ import annotations

import contextlib
import errno
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgelocal.errors import CheckpointError
from edgelocal.storage.disk import DISK, Disk, NotRegularError, reason
from edgelocal.storage.state import PIECE_BYTES, DamagedCheckpointError


class StateFile:
    """`nbytes` bytes of a regular file.

    Raises:
        DamagedCheckpointError: no regular file.
        CheckpointError: it cannot be opened.
    """

    def __init__(self, path: Path, disk: Disk = DISK) -> None:
        self._disk = disk
        self._sums: dict[int, int] = {}  # piece -> CRC-32, when it was first read
        self._last: tuple[int, bytes] = (-1, b"")  # small tensors lie side by side in a piece
        with _refused():
            self._descriptor = disk.open_regular(path)
            self.nbytes = disk.size(self._descriptor)

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes begin .. end - 1, read-only; memory for these and one piece.

        Raises:
            DamagedCheckpointError: the medium cannot read them, or they are not what they were, or gone.
            CheckpointError: the system refuses.
        """
        found = np.empty(end - begin, np.uint8).data
        for number in range(begin // PIECE_BYTES, -(-end // PIECE_BYTES)):
            start = number * PIECE_BYTES
            low, high = max(begin, start), min(end, start + PIECE_BYTES)
            found[low - begin : high - begin] = memoryview(self._piece(number))[low - start : high - start]
        return found.toreadonly()

    def close(self) -> None:
        """Release the file: nothing can be read any more."""
        descriptor, self._descriptor, self._last = self._descriptor, -1, (-1, b"")
        self._disk.close(descriptor)

    def _piece(self, number: int) -> bytes:
        if self._last[0] != number:
            start = number * PIECE_BYTES
            data = self._bytes(start, min(PIECE_BYTES, self.nbytes - start))
            found = zlib.crc32(data)
            if self._sums.setdefault(number, found) != found:
                raise DamagedCheckpointError(
                    f"it changed while it was read, between bytes {start} and {start + len(data)}"
                )
            self._last = number, data
        return self._last[1]

    def _bytes(self, offset: int, size: int) -> bytes:
        parts: list[bytes] = []
        with _refused():
            while size:
                parts.append(self._disk.read_at(self._descriptor, offset, size))
                if not parts[-1]:
                    raise DamagedCheckpointError(
                        f"it was cut short while it was read: it had {self.nbytes} bytes, and ends at {offset}"
                    )
                offset, size = offset + len(parts[-1]), size - len(parts[-1])
        return b"".join(parts)


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except NotRegularError as error:
        raise DamagedCheckpointError(reason(error)) from error
    except OSError as error:
        if error.errno == errno.EIO:  # a medium that cannot give the bytes back has damaged them
            raise DamagedCheckpointError(f"the medium cannot read it: {reason(error)}") from error
        raise CheckpointError(f"cannot be read: {reason(error)}; check permissions, then start again") from error
