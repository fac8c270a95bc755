"""What the writer asks of the system, one operation each, and what a user is told when the system refuses one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from edgelocal.errors import StorageError
from edgelocal.machine.budget import format_size

_ROOM = "make room or choose another folder"
_ADVICE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "allow larger files (ulimit -f) or choose another folder",
    errno.EIO: "check the medium or choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "check who may write there or choose another folder",
    errno.EPERM: "check who may write there or choose another folder",
    errno.EEXIST: "move away what is there or choose another folder",
    errno.ENOTDIR: "move away what is there or choose another folder",
    errno.EISDIR: "move away what is there or choose another folder",
    errno.ELOOP: "remove the link or choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class NotRegularError(OSError):
    """A link, a pipe, a device or a folder where a file was expected."""


class Disk:
    """Every operation the writer asks of the system, one method each, so that a test can fail or record any of them.

    Each raises OSError as the system does.
    """

    def create(self, path: Path) -> int:
        """Descriptor of a new or emptied file, never through a symbolic link."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    def open(self, path: Path) -> int:
        """Descriptor of an existing file or folder, to flush it."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Bytes of `data` that were taken; may be fewer than all."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Returns once the file or folder is on the medium."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Release the descriptor."""
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Replaces a file at `target` in one step."""
        source.replace(target)

    def remove(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def is_folder(self, path: Path) -> bool:
        """Whether a folder is at `path`."""
        return path.is_dir()

    def make_folder(self, path: Path) -> None:
        """Make one folder; FileExistsError when there is anything at `path`."""
        path.mkdir()

    def names(self, folder: Path) -> list[str]:
        """Names in `folder`, in no order."""
        return [entry.name for entry in folder.iterdir()]

    def open_regular(self, path: Path) -> int:
        """Descriptor of a regular file, to read it; NotRegularError for anything else."""
        return open_regular(path)

    def size(self, descriptor: int) -> int:
        """Bytes of the file."""
        return os.fstat(descriptor).st_size

    def read_at(self, descriptor: int, offset: int, size: int) -> bytes:
        """`size` bytes of the file from `offset` on; may be fewer, none only at its end."""
        return os.pread(descriptor, size, offset)

    def free_bytes(self, folder: Path) -> int:
        """Bytes this user may still write below `folder`."""
        return shutil.disk_usage(folder).free


DISK = Disk()


def is_there(path: Path) -> bool:
    """Whether anything is at `path`, a link that leads nowhere too; OSError where the system does not tell."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def open_regular(path: Path) -> int:
    """Descriptor of a regular file, to read it; never through a link, and never waiting for the writer of a pipe.

    Raises:
        NotRegularError: something else is there.
        OSError: as the system does.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        what = {errno.ELOOP: "it is a link", errno.ENXIO: "it is a socket"}.get(error.errno or 0)
        if what is not None:
            raise NotRegularError(error.errno, what) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegularError(errno.EINVAL, "it is not a regular file")
    return descriptor


def read_regular(path: Path, limit: int = -1) -> bytes:
    """All bytes of a regular file, or the first `limit`; errors as of `open_regular`."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(limit)


@contextlib.contextmanager
def storage_errors(path: Path, disk: Disk, what: str) -> Iterator[None]:
    """OSError -> StorageError that names `path` and `what` was being done."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, disk, what, error) from error


def storage_error(path: Path, disk: Disk, what: str, error: OSError) -> StorageError:
    """The error with the space that is free, and advice that fits its reason."""
    try:
        free = format_size(disk.free_bytes(path.parent))
    except OSError:
        free = "an unknown amount"
    advice = _ADVICE.get(error.errno or 0, "choose another folder")
    return StorageError(
        f"{path}: {reason(error)} ({what}, {free} free); what was there before is whole: {advice}, then start again"
    )


def reason(error: OSError) -> str:
    """What the system says, without number and path."""
    return error.strerror or type(error).__name__
