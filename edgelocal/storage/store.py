"""Checkpoints on disk: generations of them, each whole, and one writer a run (flock, so POSIX only)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from edgelocal.errors import CheckpointError, UsageError
from edgelocal.storage.disk import DISK, Disk, reason, storage_errors
from edgelocal.storage.state import DamagedCheckpointError, TrainingState, read_state
from edgelocal.storage.state_file import StateFile
from edgelocal.storage.whole import atomic_write, make_folders

KEPT_GENERATIONS = 2
_GENERATION = re.compile(r"([0-9]{8,})\.ckpt")
_TEMPORARY = re.compile(r"\..+\.tmp")


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
