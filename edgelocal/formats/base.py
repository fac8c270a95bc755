"""What all formats share: the Dataset protocol and the reading of files with typed errors."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edgelocal.errors import DataError
from edgelocal.spec import InputSpec, TaskSpec

Split: TypeAlias = Literal["train", "test"]
Indices: TypeAlias = npt.NDArray[np.int64]
Samples: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.float32] | npt.NDArray[np.int64]
Labels: TypeAlias = npt.NDArray[np.int64] | npt.NDArray[np.float32]


class Dataset(Protocol):
    """Samples by number, with their labels."""

    @property
    def source(self) -> str:
        """Where the samples come from, for messages."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by id; () if unknown."""

    @property
    def labels(self) -> Labels:
        """Class ids, (n,) int64, for cross_entropy; targets, (n, classes) float32, for bce and mse."""

    def __len__(self) -> int:
        """Number of samples."""

    def read(self, indices: Indices) -> Samples:
        """Samples `indices`, each in 0..n-1: (k, *input shape), channels first.

        The values are uint8 in 0..255, finite float32, or int64 token ids.

        Raises:
            DataError: a sample cannot be read, has another size or is not finite; the message names it.
        """


Opener: TypeAlias = Callable[[InputSpec, TaskSpec], Dataset]
Parts: TypeAlias = dict[Split, Opener]


class Readable(Protocol):
    """A stream of bytes, decompressed or not."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""


@contextmanager
def reading(path: Path) -> Iterator[io.BufferedReader]:
    """The file open for reading; whatever the system refuses meanwhile is a DataError that names the file."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the file and its rights") from error


def is_junk(name: str) -> bool:
    """Hidden files and what file managers leave behind."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini", "__macosx")


def visible(folder: Path) -> list[str]:
    """Sorted names in a folder, without junk; names of folders end in "/"."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name + "/" * entry.is_dir() for entry in entries if not is_junk(entry.name))
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror or error}); check its rights") from error


def read_whole(stream: Readable, size: int) -> npt.NDArray[np.uint8]:
    """The next `size` bytes of a stream, fewer where it ends, one more where it goes on.

    Read in pieces: what a header claims is believed only as far as there are bytes.
    """
    data = io.BytesIO()
    while data.tell() <= size and (piece := stream.read(min(1 << 20, size + 1 - data.tell()))):
        data.write(piece)
    return np.frombuffer(data.getbuffer(), dtype=np.uint8)
