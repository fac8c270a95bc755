"""Memory of the data pipeline against its bound, and the files that compressed arrays are unpacked into."""

from __future__ import annotations

import gzip
import os
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from data_files import idx, png, save, task, write, write_zip

from device_tests.device.runs import RESIDUAL, answer, write_data
from device_tests.device.test_cache import file_limit
from device_tests.device.test_limits import limited
from edgelocal.bundle.spec import AugmentSpec, InputSpec
from edgelocal.data.pipeline import Dataset, batches, open_dataset, pipeline_bytes, prepare
from edgelocal.errors import DataError, StorageError
from edgelocal.machine.budget import PeakMeter

MIB = 1 << 20
RNG = np.random.default_rng(3)
BYTES = RNG.integers(0, 256, (1500, 3, 32, 32), dtype=np.uint8)  # 4.4 MiB
IDS = np.arange(len(BYTES)) % 3
COLOUR = InputSpec((3, 32, 32), (0.5,), (0.25,))
TOKENS = InputSpec((3 * 32 * 32,), (0.0,), (1.0,), "int64")
CROP = AugmentSpec(4, "reflect", True)


def records() -> bytes:
    return np.concatenate([np.uint8(IDS)[:, None], BYTES.reshape(len(BYTES), -1)], axis=1).tobytes()


def tree(count: int) -> dict[str, bytes]:
    return {f"{'abc'[i % 3]}/{i:05}.png": png(BYTES[i]) for i in range(count)}


def packed(path: Path, x: np.ndarray) -> Path:
    np.savez_compressed(path, x=x, y=IDS[: len(x)])
    return path


def zipped_idx(folder: Path, pack: Callable[[bytes], bytes]) -> Path:
    end = ".gz" if pack is gzip.compress else ""
    grey = idx(BYTES.reshape(-1, 32, 32)), idx(np.uint8(np.arange(3 * len(BYTES)) % 3))
    return write(
        folder, {f"train-images-idx3-ubyte{end}": pack(grey[0]), f"train-labels-idx1-ubyte{end}": pack(grey[1])}
    )


GREY = InputSpec((1, 32, 32), (0.5,), (0.25,))
FORMATS: dict[str, tuple[Callable[[Path], Path], InputSpec, AugmentSpec | None]] = {
    "npy": (lambda f: save(f / "d", x=BYTES, y=IDS), COLOUR, None),
    "npy, augmented": (lambda f: save(f / "d", x=BYTES, y=IDS), COLOUR, CROP),
    "npy, flipped": (lambda f: save(f / "d", x=BYTES, y=IDS), COLOUR, AugmentSpec(0, "zero", True)),
    "npy, channels last": (lambda f: save(f / "d", x=np.moveaxis(BYTES, 1, -1).copy(), y=IDS), COLOUR, CROP),
    "npy, float32": (lambda f: save(f / "d", x=np.float32(BYTES), y=IDS), COLOUR, CROP),
    "npy, float64": (lambda f: save(f / "d", x=np.float64(BYTES[:800]), y=IDS[:800]), COLOUR, None),
    "npy, tokens": (lambda f: save(f / "d", x=np.int32(BYTES).reshape(1500, -1), y=IDS), TOKENS, None),
    "npz, compressed": (lambda f: packed(f / "d.npz", BYTES), COLOUR, CROP),
    "npz, compressed and small": (lambda f: packed(f / "d.npz", BYTES[:300]), COLOUR, CROP),
    "cifar": (lambda f: write(f / "d", {"data_batch_1.bin": records()}), COLOUR, CROP),
    "idx": (lambda f: zipped_idx(f / "d", bytes), GREY, CROP),
    "idx, gz": (lambda f: zipped_idx(f / "d", gzip.compress), GREY, CROP),
    "images": (lambda f: write(f / "d", tree(600)), COLOUR, CROP),
    "images, zip": (lambda f: write_zip(f / "d.zip", tree(600)), COLOUR, CROP),
}


def one_batch(data: Dataset, spec: InputSpec, augment: AugmentSpec | None, batch: int) -> None:
    """The second batch of an epoch, as the evaluation asks for it: with the samples of the first still held."""
    for number, indices in enumerate(batches(len(data), batch, 1, 0, True)):
        samples = data.read(indices)
        prepare(samples, indices, input=spec, augment=augment, seed=1, epoch=0)
        if number == 1:
            return


@pytest.mark.parametrize("batch", [16, 256])
@pytest.mark.parametrize("name", FORMATS)
def test_the_bound_holds_and_is_near(tmp_path: Path, name: str, batch: int) -> None:
    """Against what numpy and Python say they allocated; what Pillow takes itself is measured below."""
    make, spec, augment = FORMATS[name]
    path = make(tmp_path)
    with open_dataset(path, "train", spec, task(), tmp_path) as data:
        one_batch(data, spec, augment, 1)  # what is imported and cached once is no matter of the data
    kept = measured = 1 << 62
    for _ in range(3):  # the least: what other threads of the test runner allocate meanwhile is counted too
        tracemalloc.start()
        try:
            with open_dataset(path, "train", spec, task(), tmp_path) as data:
                kept = min(kept, tracemalloc.get_traced_memory()[0])
                tracemalloc.reset_peak()
                one_batch(data, spec, augment, batch)
                measured = min(measured, tracemalloc.get_traced_memory()[1])
                resident = data.resident_bytes
                predicted = pipeline_bytes([data], batch, spec, augment).total
        finally:
            tracemalloc.stop()
    print(f"{name}, batch {batch}: predicted {predicted}, measured {measured}; kept {kept}")
    assert kept <= resident + 16384
    assert measured <= predicted <= 1.5 * measured + MIB


def test_the_bound_holds_for_very_many_small_samples(tmp_path: Path) -> None:
    """Here the order of an epoch is what counts."""
    n = 300_000
    path = save(tmp_path / "d", x=np.zeros((n, 2), np.float32), y=np.zeros(n, np.int64))
    spec = InputSpec((2,), (0.0,), (1.0,))
    tracemalloc.start()
    try:
        data = open_dataset(path, "train", spec, task())
        tracemalloc.reset_peak()
        one_batch(data, spec, None, 64)
        measured = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    predicted = pipeline_bytes([data], 64, spec, None).total
    assert measured <= predicted <= 1.5 * measured + MIB


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp"])
def test_the_bound_holds_for_the_memory_of_the_process_while_images_are_decoded(tmp_path: Path, kind: str) -> None:
    side = 512
    images = RNG.integers(0, 256, (8, 3, side, side), dtype=np.uint8)
    path = write(tmp_path / "d", {f"{'ab'[i % 2]}/{i}.{kind}": png(image, kind) for i, image in enumerate(images)})
    spec = InputSpec((3, side, side), (0.5,), (0.25,))
    data = open_dataset(path, "train", spec, task(2))
    one_batch(data, spec, None, 1)
    with PeakMeter() as meter:
        one_batch(data, spec, None, 4)
    predicted = pipeline_bytes([data], 4, spec, None).total
    # Half a MiB: what the system's allocator keeps of freed pieces depends on what the process did before.
    assert meter.growth_bytes <= predicted + MIB // 2
    assert predicted <= 4 * (3 + 12) * side**2 * 1.5 + 24 * side**2 + 2 * data_largest(path) + MIB


def data_largest(path: Path) -> int:
    return max(file.stat().st_size for file in path.rglob("*.*"))


def test_two_datasets_are_kept_and_one_of_them_is_read(tmp_path: Path) -> None:
    train = open_dataset(save(tmp_path / "a", x=BYTES, y=IDS), "train", COLOUR, task())
    test = open_dataset(save(tmp_path / "b", x=BYTES[:100], y=IDS[:100]), "train", COLOUR, task())
    both, alone = (pipeline_bytes(sets, 64, COLOUR, CROP).total for sets in ([train, test], [train]))
    assert both == alone + test.resident_bytes == alone + 100 * 8


@contextmanager
def descriptors() -> Iterator[None]:
    """As many files are open afterwards as before."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - Path.iterdir would hold it open itself
    yield
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize("name", ["npz, compressed", "idx, gz"])
def test_what_is_unpacked_leaves_no_name_and_no_descriptor(tmp_path: Path, name: str) -> None:
    make, spec, _ = FORMATS[name]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    expected = BYTES.reshape(-1, *spec.shape)
    order = RNG.permutation(len(expected))[:50]
    with descriptors():
        data = open_dataset(make(tmp_path), "train", spec, task(), scratch)
        with descriptors():  # nothing is written before it is asked for
            assert data.labels.tolist() == (np.arange(len(expected)) % 3).tolist()
        with data:
            np.testing.assert_array_equal(data.read(order), expected[order])
            assert list(scratch.iterdir()) == []
        np.testing.assert_array_equal(data.read(order), expected[order])  # unpacked anew
        data.__exit__()


def test_unpacking_and_reading_hold_pieces_only(tmp_path: Path) -> None:
    """64 MiB of samples and 2 MiB of labels: the process grows by the labels, twice while they are read."""
    n = 1 << 18
    x = np.repeat(RNG.integers(0, 256, (n, 16), dtype=np.uint8), 16, axis=1)
    np.savez_compressed(tmp_path / "d.npz", x=x, y=np.zeros(n, np.int64))
    del x
    spec = InputSpec((256,), (0.5,), (0.25,))
    with PeakMeter() as meter, open_dataset(tmp_path / "d.npz", "train", spec, task(), tmp_path) as data:
        assert data.read(np.arange(0, n, n // 64)).shape == (64, 256)
    assert meter.exact
    assert meter.growth_bytes < 12 * MIB


def test_no_space_is_an_error_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_dataset(packed(tmp_path / "d.npz", BYTES), "train", COLOUR, task(), tmp_path)
    written: list[int] = []
    monkeypatch.setattr("edgelocal.data.formats.packed.write_whole", lambda *a: written.append(1))
    with descriptors():
        with file_limit(2 * MIB), pytest.raises(StorageError) as caught:
            data.__enter__()
        assert f"File too large (unpacking {tmp_path / 'd.npz'}: x.npy, {BYTES.nbytes} bytes needed" in str(
            caught.value
        )
    assert written == []
    data = open_dataset(tmp_path / "d.npz", "train", COLOUR, task(), tmp_path / "missing")
    with pytest.raises(StorageError, match="No such file or directory"):
        data.__enter__()


def test_an_unpacked_file_cut_short_is_an_error(tmp_path: Path) -> None:
    with open_dataset(packed(tmp_path / "d.npz", BYTES), "train", COLOUR, task(), tmp_path) as data:
        os.truncate(data.rows.unpack().fileno(), 5 * COLOUR_BYTES + 7)  # type: ignore[attr-defined]
        assert data.read(np.arange(5)).shape == (5, 3, 32, 32)
        with pytest.raises(StorageError, match="ends before sample 5; check the medium"):
            data.read(np.arange(4, 9))


COLOUR_BYTES = 3 * 32 * 32


@pytest.mark.parametrize("damage", ["cut", "short", "long", "checksum"])
@pytest.mark.parametrize("name", ["npz, compressed", "idx, gz"])
def test_damage_in_what_is_unpacked_is_found_when_the_with_begins(tmp_path: Path, name: str, damage: str) -> None:
    make, spec, _ = FORMATS[name]
    path = make(tmp_path)
    if name == "idx, gz":
        whole = idx(BYTES.reshape(-1, 32, 32))
        data = gzip.compress({"short": whole[:-1], "long": whole + b"x"}.get(damage, whole))
        data = {"cut": data[: len(data) // 2], "checksum": data[:-8] + bytes(4) + data[-4:]}.get(damage, data)
        write(path, {"train-images-idx3-ubyte.gz": data})
    else:
        with zipfile.ZipFile(path) as archive:
            x, y = archive.read("x.npy"), archive.read("y.npy")
        write_zip(path, {"x.npy": {"short": x[:-1], "long": x + b"x"}.get(damage, x), "y.npy": y}, zipfile.ZIP_DEFLATED)
        data = path.read_bytes()
        crc = struct.pack("<I", zlib.crc32(x))
        middle = data[:MIB] + bytes(64) + data[MIB + 64 :]
        path.write_bytes({"cut": middle, "checksum": data.replace(crc, bytes(4))}.get(damage, data))
    with descriptors(), pytest.raises(DataError, match=r"d(\.npz: x\.npy|/train-images-idx3-ubyte\.gz) "):
        open_dataset(path, "train", spec, task(), tmp_path).__enter__()


def test_a_header_that_claims_more_than_the_file_can_hold_is_refused_at_once(tmp_path: Path) -> None:
    path = zipped_idx(tmp_path / "d", gzip.compress)
    images = gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", 1 << 31, 32, 32) + BYTES[0].tobytes())
    write(path, {"train-images-idx3-ubyte.gz": images})
    with pytest.raises(DataError, match=r"claims 2199023255552 bytes, more than its \d+ compressed bytes can hold"):
        open_dataset(path, "train", GREY, task())


def test_a_run_on_compressed_data_is_the_run_on_plain_data(tmp_path: Path) -> None:
    write_data(tmp_path / "plain.npz", RESIDUAL, samples=20_000, test=17_000)  # 1.2 and 1.04 MiB of pixels
    with np.load(tmp_path / "plain.npz") as arrays:
        np.savez_compressed(tmp_path / "packed.npz", **arrays)
    reports = []
    options = ["--epochs", 1, "--lr-schedule", "constant", "--batch", 4000, "--no-augment"]
    for name in ("plain", "packed"):
        run = tmp_path / name
        given = ["train", RESIDUAL, "--data", tmp_path / f"{name}.npz", "--out", run, *options]
        if name == "packed":
            code, result = limited(1_100_000, *given)  # more than a checkpoint, less than the training samples
            assert (code, result["kind"]) == (8, "StorageError")
            assert "x_train.npy, 1280000 bytes needed" in result["error"]
            assert {p.name for p in run.iterdir()} <= {".lock"}
        reports.append(answer(*given))
        assert not {p.name for p in run.iterdir()} - {".lock", "run.json", "state", "metrics.jsonl", "report.json"}
        found = answer("eval", run, "--data", tmp_path / f"{name}.npz")
        assert found["loss"] == pytest.approx(reports[-1]["validation"]["loss"], rel=1e-6)
    assert reports[0]["validation"] == reports[1]["validation"]
    assert [block["training"] for block in reports[0]["blocks"]] == [
        block["training"] for block in reports[1]["blocks"]
    ]
