"""The writer under failing disks, power cuts, damage and company."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgelocal.errors import CheckpointError, StorageError, UsageError
from edgelocal.storage.disk import Disk
from edgelocal.storage.state import TrainingState, encode_state
from edgelocal.storage.store import CheckpointStore, Loaded, lock
from edgelocal.storage.whole import atomic_write, make_folders, staging

OLD, NEW = b"old" * 100, b"new!" * 300


def checkpoint(number: int) -> list[bytes | memoryview]:
    return encode_state(TrainingState({"n": number}, {"w": np.full(300, number, np.float32)}), "abc")


def number_of(loaded: Loaded | None) -> int:
    """The number a loaded checkpoint was made with, from both its halves; 0 for none."""
    if loaded is None:
        return 0
    with loaded:
        np.testing.assert_array_equal(loaded.state.tensors["w"], np.full(300, loaded.state.progress["n"], np.float32))
    return int(loaded.state.progress["n"])


def store_with(folder: Path, commits: int) -> CheckpointStore:
    store = CheckpointStore(folder)
    for number in range(1, commits + 1):
        store.commit(checkpoint(number))
    return store


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


class FailingDisk(Disk):
    """Works on the real disk, but operation number `at` fails: once, or together with all that follow."""

    def __init__(self, at: int, forever: bool, error: int = errno.ENOSPC) -> None:
        self.at, self.forever, self.error, self.count = at, forever, error, 0

    def _step(self) -> None:
        self.count += 1
        if self.count == self.at or (self.forever and self.count > self.at):
            raise OSError(self.error, os.strerror(self.error))

    @property
    def failed(self) -> bool:
        return self.count >= self.at

    def create(self, path: Path) -> int:
        self._step()
        return super().create(path)

    def open(self, path: Path) -> int:
        self._step()
        return super().open(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        self._step()
        return super().write(descriptor, data[:500])

    def sync(self, descriptor: int) -> None:
        self._step()
        super().sync(descriptor)

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        self._step()

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        self._step()
        super().remove(path)

    def make_folder(self, path: Path) -> None:
        self._step()
        super().make_folder(path)

    def names(self, folder: Path) -> list[str]:
        self._step()
        return super().names(folder)

    def free_bytes(self, folder: Path) -> int:
        self._step()
        return super().free_bytes(folder)


def storage_error_of(action: Callable[[FailingDisk], None], disk: FailingDisk) -> StorageError | None:
    try:
        action(disk)
    except StorageError as error:
        return error
    return None


def every_failure(action: Callable[[FailingDisk], None]) -> Iterator[bool]:
    """Runs `action` with every operation failing, until it runs untouched; yields whether the failure was for ever."""
    for forever, error in itertools.product((False, True), (errno.ENOSPC, errno.EIO, errno.EROFS)):
        for at in itertools.count(1):
            disk = FailingDisk(at, forever, error)
            failure = storage_error_of(action, disk)
            assert disk.failed == (failure is not None), "a failed operation must be told"
            if failure is not None:
                assert os.strerror(error) in str(failure)
                assert "free" in str(failure)
                yield forever
            if not disk.failed:
                assert at > 5
                break


def test_atomic_write_leaves_old_or_new_when_any_operation_fails(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(OLD)

    def write(disk: FailingDisk) -> None:
        atomic_write(path, [NEW], disk)

    for forever in every_failure(write):
        assert path.read_bytes() in (OLD, NEW)
        assert forever or names(tmp_path) == ["report.json"]
        for leftover in tmp_path.glob(".*"):
            leftover.unlink()
        path.write_bytes(OLD)


def test_a_commit_leaves_the_old_state_whole_when_any_operation_fails(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    store_with(run, 2)
    number = 2

    def commit(disk: FailingDisk) -> None:
        CheckpointStore(run, disk=disk).commit(checkpoint(number + 1))

    for _ in every_failure(commit):
        reopened = CheckpointStore(run)
        found = number_of(reopened.load("abc"))
        assert found in (number, number + 1)
        assert not list((run / "state").glob(".*"))
        number = found


def test_a_file_size_limit_at_every_256th_byte_leaves_the_old_state(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    size = sum(memoryview(chunk).nbytes for chunk in checkpoint(2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(0, size, 256):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(StorageError, match=f"File too large .{size} bytes needed"):
                store.commit(checkpoint(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(tmp_path / "state") == ["00000001.ckpt"]
    assert number_of(store.load("abc")) == 1


def test_a_disk_that_takes_no_bytes_is_an_error(tmp_path: Path) -> None:
    class Stuck(Disk):
        def write(self, descriptor: int, data: memoryview) -> int:
            return 0

    with pytest.raises(StorageError, match="took no bytes"):
        atomic_write(tmp_path / "a", [NEW], Stuck())


def test_atomic_write_takes_any_chunks_and_does_not_follow_links(tmp_path: Path) -> None:
    path = tmp_path / "a"
    view = np.arange(4, dtype=np.int32).data
    chunks: list[bytes | memoryview] = [b"", b"ab", view, np.empty(0).data]
    assert atomic_write(path, iter(chunks)) == 18
    assert path.read_bytes() == b"ab" + view.tobytes()
    (tmp_path / "b").symlink_to(path)
    atomic_write(tmp_path / "b", [b"new"])
    assert path.stat().st_size == 18


def test_an_interrupted_write_leaves_no_temporary(tmp_path: Path) -> None:
    class Interrupted(Disk):
        def sync(self, descriptor: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a", [NEW], Interrupted())
    assert names(tmp_path) == []


def test_two_generations_are_kept_and_numbers_never_return(tmp_path: Path) -> None:
    store = store_with(tmp_path, 12)
    assert names(store.folder) == ["00000011.ckpt", "00000012.ckpt"]
    assert CheckpointStore(tmp_path).commit(checkpoint(13)).name == "00000013.ckpt"
    assert store.written_bytes == 12 * sum(memoryview(chunk).nbytes for chunk in checkpoint(1))


def test_opening_removes_temporaries_unless_it_only_reads(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    (store.folder / ".00000002.ckpt.77.tmp").write_bytes(b"half")
    (store.folder / "notes.txt").write_text("kept")
    assert number_of(CheckpointStore(tmp_path, writable=False).load("abc")) == 1
    assert len(names(store.folder)) == 3
    CheckpointStore(tmp_path)
    assert names(store.folder) == ["00000001.ckpt", "notes.txt"]


def test_nothing_committed_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "new", writable=False).load("abc") is None
    assert not (tmp_path / "new").exists()
    assert CheckpointStore(tmp_path / "new").load("abc") is None


def test_any_damaged_byte_of_the_newest_falls_back_and_says_so(tmp_path: Path) -> None:
    store = store_with(tmp_path, 2)
    newest = store.folder / "00000002.ckpt"
    data = newest.read_bytes()
    for place in range(0, len(data), 7):
        newest.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        loaded = CheckpointStore(tmp_path).load("abc")
        assert number_of(loaded) == 1
        assert loaded is not None
        assert [path for path, _ in loaded.skipped] == [newest]


def test_a_damaged_generation_does_not_count_as_one_of_the_two_kept(tmp_path: Path) -> None:
    store = store_with(tmp_path, 2)
    (store.folder / "00000002.ckpt").write_bytes(b"damaged")
    assert number_of(store.load("abc")) == 1
    store.commit(checkpoint(3))
    assert names(store.folder) == ["00000001.ckpt", "00000003.ckpt"]


def test_all_damaged_is_refused_never_a_silent_restart(tmp_path: Path) -> None:
    store = store_with(tmp_path, 2)
    for name in names(store.folder):
        (store.folder / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole \(00000002.ckpt: .*00000001.ckpt: .*restore"):
        store.load("abc")


@pytest.mark.parametrize("kind", ["fifo", "zeros", "link to the older", "dangling link", "folder"])
def test_what_is_no_file_counts_as_damaged_and_never_hangs(tmp_path: Path, kind: str) -> None:
    store = store_with(tmp_path, 2)
    newest = store.folder / "00000002.ckpt"
    newest.unlink()
    if kind == "folder":
        newest.mkdir()
    elif kind == "fifo":
        os.mkfifo(newest)
    else:
        newest.symlink_to({"zeros": "/dev/zero", "link to the older": "00000001.ckpt"}.get(kind, "nowhere"))
    loaded = store.load("abc")
    assert number_of(loaded) == 1
    assert loaded is not None
    assert [path for path, _ in loaded.skipped] == [newest]
    store.commit(checkpoint(3))
    kept = ["00000001.ckpt", "00000003.ckpt"]
    assert names(store.folder) == (kept if kind != "folder" else sorted([*kept, newest.name]))


def test_a_file_that_claims_a_huge_size_is_damaged_by_its_end_alone(tmp_path: Path) -> None:
    store = store_with(tmp_path, 2)
    os.truncate(store.folder / "00000002.ckpt", 1 << 40)  # all but its beginning are holes
    loaded = store.load("abc")
    assert number_of(loaded) == 1
    assert loaded is not None
    assert "does not end in its seal" in loaded.skipped[0][1]


@pytest.mark.parametrize("name", ["999999999999999999.ckpt", "9" * 100 + ".ckpt"])
def test_numbers_go_on_behind_any_number(tmp_path: Path, name: str) -> None:
    store = store_with(tmp_path, 1)
    (store.folder / "00000001.ckpt").rename(store.folder / name)
    store.commit(checkpoint(2))
    store.commit(checkpoint(3))
    assert number_of(store.load("abc")) == 3
    assert len(names(store.folder)) == 2


def test_a_state_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    store = CheckpointStore(tmp_path, writable=False)
    with pytest.raises(CheckpointError, match="state cannot be listed: Not a directory; check permissions, or restore"):
        store.load("abc")
    with pytest.raises(StorageError, match=r"File exists .making the folder, .*: move away what is there"):
        CheckpointStore(tmp_path)


def test_another_fingerprint_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"00000002.ckpt: the checkpoint belongs to another bundle"):
        store_with(tmp_path, 2).load("xyz")


class UnreadableDisk(Disk):
    """Reads half a MiB at most; from read number `at` on, those of the newest of two checkpoints fail."""

    def __init__(self, at: int, error: int) -> None:
        self.at, self.error, self.reads, self.newest = at, error, 0, -1
        self.opened: set[int] = set()

    def _step(self) -> None:
        self.reads += 1
        if self.reads >= self.at:
            raise OSError(self.error, os.strerror(self.error))

    def open_regular(self, path: Path) -> int:
        if path.name != "00000002.ckpt":
            return super().open_regular(path)
        self._step()
        self.newest = super().open_regular(path)
        self.opened.add(self.newest)
        return self.newest

    def read_at(self, descriptor: int, offset: int, size: int) -> bytes:
        if descriptor == self.newest:
            self._step()
        return super().read_at(descriptor, offset, min(size, 1 << 19))

    def close(self, descriptor: int) -> None:
        self.opened.discard(descriptor)
        self.newest = -1 if descriptor == self.newest else self.newest
        super().close(descriptor)


LARGE = {f"t{i}": np.arange(i, i + 400_000, dtype=np.float32) for i in range(4)}  # 1.6 MB each: pieces are of 1 MiB


def commit_large(store: CheckpointStore) -> None:
    store.commit(encode_state(TrainingState({}, LARGE), "abc"))


def reads_of_a_load(folder: Path) -> int:
    """Operations of checking the large checkpoint behind a small one."""
    store = store_with(folder, 1)
    commit_large(store)
    disk = UnreadableDisk(1 << 40, errno.EIO)
    loaded = CheckpointStore(folder, disk=disk).load("abc")
    assert loaded is not None
    loaded.file.close()
    assert disk.reads > 2 * sum(tensor.nbytes for tensor in LARGE.values()) >> 19, "hashed, and looked at"
    return disk.reads


def test_a_medium_that_fails_at_any_read_is_damage(tmp_path: Path) -> None:
    for at in range(1, reads_of_a_load(tmp_path) + 1):
        disk = UnreadableDisk(at, errno.EIO)
        loaded = CheckpointStore(tmp_path, disk=disk).load("abc")
        assert not disk.opened
        assert number_of(loaded) == 1
        assert loaded is not None
        assert "the medium cannot read it: Input/output error" in loaded.skipped[0][1]


def test_a_system_that_refuses_any_read_is_no_damage(tmp_path: Path) -> None:
    for at in range(1, reads_of_a_load(tmp_path) + 1):
        disk = UnreadableDisk(at, errno.EACCES)
        with pytest.raises(CheckpointError, match=r"02\.ckpt: cannot be read: Permission denied; check permissions"):
            CheckpointStore(tmp_path, disk=disk).load("abc")
        assert not disk.opened


def store_of_large(folder: Path) -> CheckpointStore:
    store = CheckpointStore(folder)
    commit_large(store)
    return store


def read_large(loaded: Loaded) -> None:
    """Every tensor is read, and is what was committed."""
    with loaded:
        for name, tensor in LARGE.items():
            np.testing.assert_array_equal(loaded.state.tensors[name], tensor)


def test_tensors_across_pieces_are_read_in_any_order(tmp_path: Path) -> None:
    loaded = store_of_large(tmp_path).load("abc")
    assert loaded is not None
    with loaded:
        for name in (*LARGE, *reversed(LARGE), "t2"):
            found = loaded.state.tensors[name]
            np.testing.assert_array_equal(found, LARGE[name], strict=True)
            assert not found.flags.writeable


def test_reading_a_checkpoint_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """By tracemalloc, which numpy reports to: one tensor, a piece or two of the file, and small things."""
    store = store_of_large(tmp_path)
    largest = max(tensor.nbytes for tensor in LARGE.values())
    tracemalloc.start()
    try:
        loaded = store.load("abc")
        assert loaded is not None
        with loaded:
            for name in loaded.state.tensors:
                assert loaded.state.tensors[name].any()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest < peak < largest + (5 << 19)


@pytest.mark.parametrize("place", [0, 100, 1 << 20, 2_500_000, -1])
def test_a_byte_that_changes_after_the_check_is_an_error_not_another_weight(tmp_path: Path, place: int) -> None:
    store = store_of_large(tmp_path)
    loaded = store.load("abc")
    assert loaded is not None
    with loaded.path.open("r+b") as file:
        file.seek(*((place, 0) if place >= 0 else (-41, 2)))  # -1: the last byte before the seal
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CheckpointError, match=r"01.ckpt: it changed while it was read, .*check the medium"):
        read_large(loaded)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, 6_000_000])
def test_a_file_that_shrinks_after_the_check_is_an_error(tmp_path: Path, size: int) -> None:
    loaded = store_of_large(tmp_path).load("abc")
    assert loaded is not None
    os.truncate(loaded.path, size)
    with pytest.raises(CheckpointError, match=rf"01.ckpt: it was cut short while .* ends at {size}; it was whole"):
        read_large(loaded)


def test_a_generation_that_is_removed_beside_a_reader_is_read_to_its_end(tmp_path: Path) -> None:
    store = store_of_large(tmp_path)
    loaded = CheckpointStore(tmp_path, writable=False).load("abc")
    assert loaded is not None
    for number in (2, 3):
        store.commit(checkpoint(number))
    assert not loaded.path.exists()
    read_large(loaded)
    with pytest.raises(CheckpointError, match="cannot be read: Bad file descriptor"):
        loaded.state.tensors["t0"]


def test_a_file_in_the_way_of_a_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match=r"run: File exists"):
        make_folders(tmp_path / "run" / "state")


HOLD = """
import sys; from pathlib import Path; from edgelocal.storage.store import lock; from edgelocal.errors import UsageError
try:
    with lock(Path(sys.argv[1])):
        print("held", flush=True); sys.stdin.read()
except UsageError as error:
    print("refused", error, flush=True); sys.stdin.read()
"""


def test_one_of_many_concurrent_starts_trains(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    starts = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    answers = [start.stdout.readline() if start.stdout else "" for start in starts]
    assert sorted(answer.split()[0] for answer in answers) == ["held"] + ["refused"] * 5
    holder = next(start for start, answer in zip(starts, answers, strict=True) if answer == "held\n")
    with pytest.raises(UsageError, match=rf"\(pid {holder.pid}\) is training into this run"), lock(tmp_path / "run"):
        pass
    holder.kill()  # the system drops the lock of a killed process
    holder.wait()
    with lock(tmp_path / "run"):
        pass
    for start in starts:
        start.communicate()


def test_a_file_system_that_cannot_lock_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(StorageError, match="locking the run"), lock(tmp_path):
        pass


def test_staging_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "a" / "bundle"
    with staging(out) as folder:
        (folder / "blocks").mkdir()
        (folder / "blocks" / "x").write_text("x")
        assert not out.exists()
    assert (out / "blocks" / "x").read_text() == "x"
    assert names(out.parent) == ["bundle"]
    with pytest.raises(UsageError, match="exists already; choose another name or remove it"), staging(out):
        pass


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("x"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (FileNotFoundError(errno.ENOENT, "x"), FileNotFoundError),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError),
    ],
)
def test_staging_leaves_nothing_when_the_body_fails(
    tmp_path: Path, error: BaseException, expected: type[BaseException]
) -> None:
    def fill() -> None:
        with staging(tmp_path / "out") as folder:
            (folder / "x").write_text("x")
            raise error

    with pytest.raises(expected):
        fill()
    assert names(tmp_path) == []


def test_staging_leaves_nothing_or_all_when_any_operation_fails(tmp_path: Path) -> None:
    runs = (tmp_path / str(number) for number in itertools.count())
    used: list[Path] = []

    def fill(disk: FailingDisk) -> None:
        used.append(next(runs))
        used[-1].mkdir()
        with staging(used[-1] / "out", disk) as folder:
            (folder / "x").write_bytes(NEW)

    for _ in every_failure(fill):
        assert names(used[-1]) in ([], ["out"])
        assert all((used[-1] / name / "x").read_bytes() == NEW for name in names(used[-1]))


class PowerCutDisk(Disk):
    """A folder in memory that remembers what is on the medium and what is only promised.

    Weak on purpose: after a power cut any subset of the unsynced changes of the folder may have happened, and an
    unsynced file may hold nothing, a half or all of what was written. `check` sees every such state after each step.
    """

    def __init__(self, check: Callable[[PowerCutDisk], None] | None = None) -> None:
        self.contents: list[bytes] = []  # by file, as written
        self.durable: list[bytes] = []  # by file, as on the medium
        self.entries: dict[str, int] = {}
        self.durable_entries: dict[str, int] = {}
        self.pending: list[tuple[str | None, str | None, int]] = []  # name gone, name come, file
        self.check = check

    def _step(self) -> None:
        for state in self.power_cuts() if self.check else ():
            assert self.check is not None
            self.check(state)

    def _change(self, gone: str | None, come: str | None, file: int) -> None:
        self.pending.append((gone, come, file))
        _apply(self.entries, self.pending[-1:])
        self._step()

    def power_cuts(self) -> Iterator[PowerCutDisk]:
        for happened in itertools.product((False, True), repeat=len(self.pending)):
            entries = dict(self.durable_entries)
            _apply(entries, list(itertools.compress(self.pending, happened)))
            files = sorted(set(entries.values()))
            torn = [{self.durable[f], self.contents[f][: len(self.contents[f]) // 2], self.contents[f]} for f in files]
            kept = [
                t if self.durable[f] != self.contents[f] else {self.durable[f]}
                for f, t in zip(files, torn, strict=True)
            ]
            for choice in itertools.product(*kept):
                state = PowerCutDisk()
                state.contents = list(choice)
                state.entries = {name: files.index(file) for name, file in entries.items()}
                yield state

    def create(self, path: Path) -> int:
        self.contents.append(b"")
        self.durable.append(b"")
        self._change(None, path.name, len(self.contents) - 1)
        return len(self.contents) - 1

    def open(self, path: Path) -> int:
        return -1  # only the folder is ever opened

    def write(self, descriptor: int, data: memoryview) -> int:
        self.contents[descriptor] += bytes(data)
        self._step()
        return data.nbytes

    def sync(self, descriptor: int) -> None:
        if descriptor >= 0:
            self.durable[descriptor] = self.contents[descriptor]
        else:
            self.durable_entries, self.pending = dict(self.entries), []
        self._step()

    def close(self, descriptor: int) -> None:
        pass

    def rename(self, source: Path, target: Path) -> None:
        self._change(source.name, target.name, self.entries[source.name])

    def remove(self, path: Path) -> None:
        self._change(path.name, None, self.entries[path.name])

    def is_folder(self, path: Path) -> bool:
        return True

    def names(self, folder: Path) -> list[str]:
        return list(self.entries)

    def open_regular(self, path: Path) -> int:
        return self.entries[path.name]

    def size(self, descriptor: int) -> int:
        return len(self.contents[descriptor])

    def read_at(self, descriptor: int, offset: int, size: int) -> bytes:
        return self.contents[descriptor][offset : offset + size]


def _apply(entries: dict[str, int], changes: list[tuple[str | None, str | None, int]]) -> None:
    for gone, come, file in changes:
        if gone is not None:
            entries.pop(gone, None)
        if come is not None:
            entries[come] = file


class WithoutFileSync(PowerCutDisk):
    def sync(self, descriptor: int) -> None:
        if descriptor < 0:
            super().sync(descriptor)


class WithoutFolderSync(PowerCutDisk):
    def sync(self, descriptor: int) -> None:
        if descriptor >= 0:
            super().sync(descriptor)


class InPlace(PowerCutDisk):
    def create(self, path: Path) -> int:
        return super().create(path.with_name(path.name[1:].split(".")[0] + ".ckpt"))

    def rename(self, source: Path, target: Path) -> None:
        pass


class DeleteThenRename(PowerCutDisk):
    def rename(self, source: Path, target: Path) -> None:
        for name in [name for name in self.entries if name.endswith(".ckpt")]:
            self.remove(Path(name))
        super().rename(source, target)


def cut_power_everywhere(kind: type[PowerCutDisk], commits: int = 12) -> tuple[int, int]:
    """States seen, and those in which an acknowledged checkpoint is lost or a torn one is in its place."""
    states = bad = acknowledged = 0

    def check(state: PowerCutDisk) -> None:
        nonlocal states, bad
        states += 1
        try:
            loaded = CheckpointStore(Path("/run"), writable=False, disk=state).load("abc")
            torn = loaded is not None and bool(loaded.skipped)
            bad += torn or number_of(loaded) not in (acknowledged, acknowledged + 1)
        except CheckpointError:
            bad += 1

    store = CheckpointStore(Path("/run"), disk=kind(check))
    for number in range(1, commits + 1):
        store.commit(checkpoint(number))
        acknowledged = number
    return states, bad


def test_a_power_cut_at_any_instant_loses_nothing() -> None:
    states, bad = cut_power_everywhere(PowerCutDisk)
    assert states > 300
    assert bad == 0


@pytest.mark.parametrize("kind", [WithoutFileSync, WithoutFolderSync, InPlace, DeleteThenRename])
def test_the_same_check_finds_each_broken_protocol(kind: type[PowerCutDisk]) -> None:
    assert cut_power_everywhere(kind, commits=3)[1] > 0
