"""The only writer: files and folders that appear whole or not at all, generations of checkpoints, one writer a run.

A write goes to a temporary file in the same folder, is flushed to the medium, renamed into place, and the folder is
flushed. Leaving out any of the four loses or tears files when power fails. POSIX only (flock, folder fsync).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from edgelocal.disk import DISK, Disk, reason, storage_error, storage_errors
from edgelocal.errors import CheckpointError, UsageError
from edgelocal.state import DamagedCheckpointError, TrainingState, read_state
from edgelocal.state_file import StateFile
from edgelocal.tensors import Chunks

KEPT_GENERATIONS = 2
_GENERATION = re.compile(r"([0-9]{8,})\.ckpt")
_TEMPORARY = re.compile(r"\..+\.tmp")
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


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was checked; its tensors are read when asked for, inside of `with` only.

    `skipped` lists newer generations that are damaged, each with the reason. Leaving the `with` closes the file.

    Raises:
        CheckpointError: inside of `with`, by a tensor that is asked for: its bytes are not those that were checked.
    """

    state: TrainingState
    path: Path
    skipped: tuple[tuple[Path, str], ...]
    file: StateFile

    def __enter__(self) -> Loaded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if isinstance(error, DamagedCheckpointError):
            raise CheckpointError(
                f"{self.path}: {error}; it was whole when it was checked: check the medium, then start again"
            ) from error


class CheckpointStore:
    """The generations `state/<number>.ckpt` of a run folder; the highest number is the newest.

    A writer holds `lock(folder)` first: opening makes `state` and removes temporaries that a killed process left in
    both folders.
    `writable=False` only reads and may be used beside a running training. `written_bytes` counts what this store
    wrote, for the wear of flash memory.
    """

    def __init__(self, folder: Path, *, writable: bool = True, disk: Disk = DISK) -> None:
        self.folder = folder / "state"
        self.written_bytes = 0
        self._disk = disk
        self._damaged: set[Path] = set()
        if writable:
            make_folders(self.folder, disk)
            for place in (folder, self.folder):
                self._remove_temporaries(place)

    def commit(self, chunks: Iterable[bytes | memoryview]) -> Path:
        """Write the next generation, then remove all but the two newest that are not known to be damaged.

        Raises:
            StorageError: the generations that were there before are whole.
        """
        with storage_errors(self.folder, self._disk, "listing the checkpoints"):
            newest = self._generations()[:1]
        number = int(newest[0].stem) + 1 if newest else 1
        path = self.folder / f"{number:08d}.ckpt"
        self.written_bytes += atomic_write(path, chunks, self._disk)
        self._prune()
        return path

    def load(self, fingerprint: str) -> Loaded | None:
        """The newest generation that is whole, or None when none was ever committed; to be used with `with`.

        Peak memory: the largest tensor.

        Raises:
            CheckpointError: `generations` fails, every generation is damaged, or the newest whole one has another
                fingerprint or a newer format, or cannot be read. Training never starts anew without being asked to.
        """
        skipped: list[tuple[Path, str]] = []
        for path in self.generations():
            try:
                return self._open(path, fingerprint, tuple(skipped))
            except DamagedCheckpointError as error:
                skipped.append((path, str(error)))
                self._damaged.add(path)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from None
        if not skipped:
            return None
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped)
        raise CheckpointError(
            f"{self.folder}: no checkpoint is whole ({reasons}); restore one from a copy, "
            "or start anew with --resume never and a new --out folder"
        )

    def generations(self) -> list[Path]:
        """The checkpoints, newest first, whole or not; none if there is no folder.

        Raises:
            CheckpointError: the folder is none, or cannot be listed.
        """
        try:
            return self._generations()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be listed: {reason(error)}; check permissions, or restore it from a copy"
            ) from error

    def _open(self, path: Path, fingerprint: str, skipped: tuple[tuple[Path, str], ...]) -> Loaded:
        with contextlib.ExitStack() as failing:
            file = StateFile(path, self._disk)
            failing.callback(file.close)
            state = read_state(file.read, file.nbytes, fingerprint)
            failing.pop_all()
        return Loaded(state, path, skipped, file)

    def _generations(self) -> list[Path]:
        names = self._disk.names(self.folder)
        numbered = [(int(match[1]), name) for name in names if (match := _GENERATION.fullmatch(name))]
        return [self.folder / name for _, name in sorted(numbered, reverse=True)]

    def _prune(self) -> None:
        with storage_errors(self.folder, self._disk, "removing old checkpoints"):
            generations = self._generations()
            kept = [path for path in generations if path not in self._damaged][:KEPT_GENERATIONS]
            for path in generations:
                if path not in kept:
                    with contextlib.suppress(IsADirectoryError):  # it is none of ours and stays
                        self._disk.remove(path)

    def _remove_temporaries(self, folder: Path) -> None:
        with storage_errors(folder, self._disk, "removing temporary files"):
            for name in self._disk.names(folder):
                if _TEMPORARY.fullmatch(name):
                    self._disk.remove(folder / name)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the run folder for one writing process; made if missing. The system drops the lock when a process dies.

    Raises:
        UsageError: another process holds it.
        StorageError: the file system cannot lock.
    """
    make_folders(folder)
    path = folder / ".lock"
    with contextlib.ExitStack() as stack:
        with storage_errors(path, DISK, "locking the run"):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise UsageError(
                    f"{folder}: another process (pid {holder}) is training into this run; "
                    "wait for it, stop it, or choose another --out folder"
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield


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
