"""The state of blocks that wait their turn: on disk, one file a block, rewritten in place; or, where blocks work on a
device with memory of its own, in the host's.

Not durable and not meant to be: after a crash a run goes on from its checkpoint. Bytes on disk are counted, because
flash memory wears.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from edgelocal.bundle.spec import TensorSpec
from edgelocal.errors import StorageError
from edgelocal.storage.disk import DISK, storage_errors
from edgelocal.storage.tensors import Array
from edgelocal.storage.whole import make_folders

PREFIX = "state-"


def clear_pages(folder: Path) -> None:
    """Remove page files that nobody removed, as of a start that failed, and the folder if nothing else is in it.

    What the disk refuses stays: a run that ended, well or not, does not end otherwise because of it.
    """
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{PREFIX}*"):
            path.unlink(missing_ok=True)
        if not folder.is_symlink():  # one to another medium is the user's
            folder.rmdir()  # refused if anything is in it


class Page(Protocol):
    """Where a block's state waits. `moved_bytes` went to the disk or came from it so far."""

    moved_bytes: int

    def write(self, tensors: Mapping[str, Array]) -> None:
        """Keep these values in place of those before."""

    def read(self) -> Mapping[str, Array]:
        """All tensors; not to be kept beyond the next `write`."""

    def remove(self) -> None:
        """Give up the place."""


class HostPage:
    """The tensors of `specs` in the host's memory, which `allocate` gives: from such that is pinned CUDA copies faster.
    The way down goes through memory of the runtime's own."""

    def __init__(self, specs: tuple[TensorSpec, ...], allocate: Callable[[tuple[int, ...], str], Array]) -> None:
        self.moved_bytes = 0
        self._arrays = {spec.name: allocate(spec.resolve(1), spec.dtype) for spec in specs}

    def write(self, tensors: Mapping[str, Array]) -> None:
        """Keep these values in place of those before."""
        for name, array in self._arrays.items():
            array[...] = tensors[name]

    def read(self) -> Mapping[str, Array]:
        """All tensors, as they lie there."""
        return self._arrays

    def remove(self) -> None:
        """Forget them."""
        self._arrays = {}


class PageFile:
    """The tensors of `specs`, one after the other, in the file `path`."""

    def __init__(self, path: Path, specs: tuple[TensorSpec, ...]) -> None:
        self.path = path
        self.moved_bytes = 0
        self._specs = specs

    def write(self, tensors: Mapping[str, Array]) -> None:
        """Replace the file's content.

        Raises:
            StorageError: the disk refused; the state in memory is whole.
        """
        with storage_errors(self.path, DISK, "paging a block out"):
            make_folders(self.path.parent, DISK)
            with self.path.open("wb") as file:
                for spec in self._specs:
                    self.moved_bytes += file.write(tensors[spec.name].reshape(-1).view(np.uint8).data)

    def read(self) -> dict[str, Array]:
        """All tensors.

        Raises:
            StorageError: the file is gone or short.
        """
        with storage_errors(self.path, DISK, "paging a block in"), self.path.open("rb") as file:
            found = {}
            for spec in self._specs:
                array = np.empty(spec.resolve(1), dtype=spec.dtype)
                view = array.reshape(-1).view(np.uint8).data
                if file.readinto(view) != len(view):
                    raise StorageError(
                        f"{self.path} ends within {spec.name}; check the medium, then start again: the run goes on "
                        "from its last commit"
                    )
                self.moved_bytes += len(view)
                found[spec.name] = array
        return found

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
