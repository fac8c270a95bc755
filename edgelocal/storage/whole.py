"""The only writer of what must last: files and folders that appear whole or not at all.

A write goes to a temporary file in the same folder, is flushed to the medium, renamed into place, and the folder is
flushed. Leaving out any of the four loses or tears files when power fails. POSIX only (folder fsync).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from edgelocal.errors import UsageError
from edgelocal.storage.disk import DISK, Disk, storage_error, storage_errors
from edgelocal.storage.tensors import Chunks

_DISK_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


def atomic_write(path: Path, chunks: Iterable[bytes | memoryview], disk: Disk = DISK) -> int:
    """Write a file so that after any failure `path` holds its old or its new content, whole; returns its bytes.

    When this returns the file survives a power cut. Peak memory: the chunks; of `Chunks` one at a time.

    Raises:
        StorageError: the system refused an operation; the message gives path, reason, bytes needed and free.
    """
    if not isinstance(chunks, Chunks):
        chunks = list(chunks)
    size = chunks.nbytes if isinstance(chunks, Chunks) else sum(memoryview(chunk).nbytes for chunk in chunks)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path, disk, f"{size} bytes needed"):
        try:
            _write_file(temporary, chunks, disk)
            disk.rename(temporary, path)
        except BaseException:
            # The first error is the one to report; a temporary that stays is removed when the store is next opened.
            with contextlib.suppress(OSError):
                disk.remove(temporary)
            raise
        _sync(path.parent, disk)
    return size


@contextlib.contextmanager
def staging(out: Path, disk: Disk = DISK) -> Iterator[Path]:
    """A folder beside `out` to fill; it becomes `out` when the body ends, and is removed when the body fails.

    A killed process leaves the folder `.<name>.<pid>.staging`, which may be deleted.

    Raises:
        UsageError: `out` exists already.
        StorageError: the disk refused an operation, here or in the body.
    """
    _refuse_existing(out)
    make_folders(out.parent, disk)
    folder = out.with_name(f".{out.name}.{os.getpid()}.staging")
    try:
        with storage_errors(out, disk, "preparing the folder"):
            shutil.rmtree(folder, ignore_errors=True)
            disk.make_folder(folder)
        yield folder
        _refuse_existing(out)
        with storage_errors(out, disk, f"{_tree_bytes(folder)} bytes needed"):
            _sync_tree(folder, disk)
            disk.rename(folder, out)
            _sync(out.parent, disk)
    except OSError as error:
        if error.errno in _DISK_REFUSED:
            raise storage_error(out, disk, "writing the folder", error) from error
        raise
    finally:
        # Nothing is there after success; after a failure that failure is the one to report.
        shutil.rmtree(folder, ignore_errors=True)


def make_folders(folder: Path, disk: Disk = DISK) -> None:
    """Make `folder` and its missing parents so that they survive a power cut.

    Raises:
        StorageError: the system refused, or a file is in the way.
    """
    missing = []
    with storage_errors(folder, disk, "looking for the folder"):
        while not disk.is_folder(folder):
            missing.append(folder)
            folder = folder.parent
    for path in reversed(missing):
        with storage_errors(path, disk, "making the folder"):
            try:
                disk.make_folder(path)
            except FileExistsError:
                if not disk.is_folder(path):  # otherwise another process was faster
                    raise
            _sync(path.parent, disk)


def _write_file(path: Path, chunks: Sequence[bytes | memoryview], disk: Disk) -> None:
    descriptor = disk.create(path)
    try:
        for index in range(len(chunks)):  # by index, so that no name holds a chunk while the next is made
            _write_all(descriptor, chunks[index], disk)
        disk.sync(descriptor)
    finally:
        disk.close(descriptor)


def _write_all(descriptor: int, chunk: bytes | memoryview, disk: Disk) -> None:
    view = memoryview(chunk).cast("B") if len(chunk) else memoryview(b"")
    while view.nbytes:
        taken = disk.write(descriptor, view)
        if taken <= 0:
            raise OSError(errno.EIO, "the system took no bytes")
        view = view[taken:]


def _sync(path: Path, disk: Disk) -> None:
    descriptor = disk.open(path)
    try:
        disk.sync(descriptor)
    finally:
        disk.close(descriptor)


def _sync_tree(folder: Path, disk: Disk) -> None:
    for path in folder.rglob("*"):
        _sync(path, disk)
    _sync(folder, disk)


def _tree_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already; choose another name or remove it first")
