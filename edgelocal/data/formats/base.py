"""What all formats share: the Dataset protocol and the reading of files with typed errors."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edgelocal.bundle.spec import InputSpec, TaskSpec
from edgelocal.errors import DataError

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
    def resident_bytes(self) -> int:
        """Upper bound of what it keeps in memory: labels, names, places of files, small arrays."""

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample as `read` gives it."""

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
            StorageError: no space to unpack the samples.
        """

    def reading_bytes(self, k: int) -> int:
        """Upper bound of what `read` of k samples holds at its peak, the samples themselves included."""

    def __enter__(self) -> Dataset:
        """Unpack now what is compressed as a whole; the first `read` does so otherwise. Errors as of `read`."""

    def __exit__(self, *_: object) -> None:
        """Remove what was unpacked."""


Opener: TypeAlias = Callable[[InputSpec, TaskSpec, Path | None], Dataset]  # the folder is where to unpack
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
    with _listing(folder) as entries:
        return sorted(entry.name + "/" * entry.is_dir() for entry in entries if not is_junk(entry.name))


def largest_file(folder: Path) -> int:
    """Bytes of the largest file in a folder, 0 without files."""
    with _listing(folder) as entries:
        return max((entry.stat().st_size for entry in entries if entry.is_file()), default=0)


def names_bytes(names: Sequence[str]) -> int:
    """Memory of a tuple of names: the allocator rounds every one up, to 16 bytes at most."""
    return sys.getsizeof(()) + sum(sys.getsizeof(name) + 8 + 15 for name in names)


@contextmanager
def _listing(folder: Path) -> Iterator[Iterator[os.DirEntry[str]]]:
    try:
        with os.scandir(folder) as entries:
            yield entries
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror or error}); check its rights") from error
