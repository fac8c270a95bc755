"""Every kind of bad data is refused with a message that names it, wherever it lies."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import COLOUR, COLOURS, FLAT, GREY, GREYS, IDS, idx, png, save, task, tree, write, write_zip

from edgelocal.data.formats.images import MAX_IMAGE_BYTES
from edgelocal.data.pipeline import has_split, open_dataset
from edgelocal.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("y", "loss", "message"),
    [
        (IDS[:-1], "cross_entropy", "11 labels for 12 samples; expected one label a sample"),
        (np.where(np.arange(12) < 7, IDS, 3), "cross_entropy", r"sample 7 has label 3, expected 0 to 2 \(5 labels"),
        (IDS - 1, "cross_entropy", "sample 0 has label -1, expected 0 to 2"),
        (IDS.astype(np.float32), "cross_entropy", "labels are float32, expected integers"),
        (np.eye(3)[IDS], "cross_entropy", r"labels of shape \(12, 3\) for loss cross_entropy, expected \(12, 1\)"),
        (IDS, "mse", r"labels of shape \(12,\) for loss mse, expected \(12, 3\)"),
        (np.where(np.eye(12, 3) > 0, np.nan, 0), "mse", r"label of sample 0 is \[nan, 0.0, 0.0\], expected a finite"),
        (np.eye(12, 3) * 2, "bce", r"label of sample 0 is \[2.0, 0.0, 0.0\], expected a number in 0\.\.1"),
        (np.asarray(["a"] * 12), "cross_entropy", "holds values of type <U1, expected numbers"),
        (np.asarray([None] * 12), "cross_entropy", "holds pickled Python objects, expected numbers"),
        (np.asarray(1), "cross_entropy", "holds a single value, expected rows"),
    ],
)
def test_bad_labels_are_refused(tmp_path: Path, y: np.ndarray, loss: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(save(tmp_path, x=GREYS, y=y), "train", GREY, task(loss=loss))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (GREYS[:, :5], r"samples have shape \(5, 5\), the bundle takes \(1, 6, 5\)"),
        (GREYS.astype(np.int32), "samples are int32, expected uint8"),
        (GREYS[:0], "holds no samples|12 labels"),
        (np.asfortranarray(GREYS), "column-major order, expected rows"),
    ],
)
def test_bad_samples_are_refused_at_open(tmp_path: Path, x: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(save(tmp_path, x=x, y=IDS[: len(x)]), "train", GREY, task())


@pytest.mark.parametrize("at", [0, 6, 11])
@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300])
def test_samples_that_are_not_finite_are_refused_when_read(tmp_path: Path, at: int, value: float) -> None:
    x = GREYS.astype(np.float64)
    x[at, 5, 4] = value
    data = open_dataset(save(tmp_path, x=x, y=IDS), "train", GREY, task())
    assert np.isfinite(data.read(np.delete(np.arange(12), at))).all()
    with pytest.raises(DataError, match=f"x: sample {at} holds NaN, Inf"):
        data.read(np.arange(12)[::-1])


def test_files_cut_short_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "plain", x=GREYS, y=IDS)
    data = open_dataset(path, "train", GREY, task())
    (path / "x.npy").write_bytes((path / "x.npy").read_bytes()[:-1])
    assert data.read(np.arange(11)).shape == (11, 1, 6, 5)
    with pytest.raises(DataError, match=r"x.npy ends before sample 11"):
        data.read(np.asarray([11]))
    with pytest.raises(DataError, match=r"x.npy is damaged .* ends before the last of 12 rows of 30 bytes"):
        open_dataset(path, "train", GREY, task())
    (path / "x.npy").unlink()
    with pytest.raises(DataError, match=r"x.npy cannot be read \(No such file"):
        data.read(np.asarray([0]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(COLOURS[0])[:-800], "is no readable image"),
        (b"", "is no readable image"),
        (b"GIF89a", "is no readable image"),
        (png(COLOURS[0][:, :16]), r"is 32x16 pixels \(width x height\), the bundle takes 32x32: resize"),
        (png(np.zeros((32, 32), dtype=np.uint16)), "has more than 8 bits a channel"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("bad", ["a/000.png", "b/004.png", "c/011.png"])
def test_bad_images_are_refused_by_name(tmp_path: Path, data: bytes, message: str, zipped: bool, bad: str) -> None:
    files = tree() | {bad: data}
    path = write_zip(tmp_path / "d.zip", files) if zipped else write(tmp_path / "d", files)
    with pytest.raises(DataError, match=f"{bad} {message}"):
        open_dataset(path, "train", COLOUR, task()).read(np.arange(12))


@pytest.mark.parametrize(
    ("files", "kw", "message"),
    [
        (tree() | {"d/.DS_Store": b""}, {"classes": 4}, "class folder 'd' holds no images"),
        (tree() | {"a/notes.txt": b""}, {}, "found 'a/notes.txt', expected only <class>/<image>"),
        (tree() | {"labels.csv": b""}, {}, "found 'labels.csv', expected only"),
        (tree() | {"a/deep/1.png": b""}, {}, "found 'a/deep/.*expected only"),
        (tree(), {"classes": 5}, "3 class folders, the bundle has 5 classes: .* --classes 3"),
        (tree(), {"names": ("a", "b", "z")}, r"class folder 'c' is not among the classes of the bundle \(a, b, z\)"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_bad_class_folders_are_refused(tmp_path: Path, files: Any, kw: Any, message: str, zipped: bool) -> None:
    path = write_zip(tmp_path / "d.zip", files) if zipped else write(tmp_path / "d", files)
    if zipped and "d/.DS_Store" in files:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("d/", b"")
    with pytest.raises(DataError, match=message):
        open_dataset(path, "train", COLOUR, task(**kw))


def test_data_of_no_known_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing does not exist; expected class folders"):
        has_split(tmp_path / "missing", "train")
    with pytest.raises(DataError, match="is of no known format; expected class folders"):
        has_split(write(tmp_path, {"d.csv": b"1,2"}) / "d.csv", "train")
    with pytest.raises(DataError, match=r"no known format \(it holds d.csv\)"):
        has_split(tmp_path, "train")
    with pytest.raises(DataError, match=r"train is of no known format \(it holds 1.png\)"):
        open_dataset(write(tmp_path / "s", {"train/1.png": b""}), "train", COLOUR, task())
    with pytest.raises(DataError, match=r"has no test split, found train: name other data"):
        open_dataset(save(tmp_path / "n", x=GREYS, y=IDS), "test", GREY, task())
    with pytest.raises(DataError, match=r"holds images, but the bundle takes \(30,\)"):
        open_dataset(write(tmp_path / "t", tree()), "train", FLAT, task())
    with pytest.raises(DataError, match=r"e.zip holds no files"):
        has_split(write_zip(tmp_path / "e.zip", {}), "train")


def test_images_without_pillow_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, tree())
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match=r"pip install pillow"):
        open_dataset(path, "train", COLOUR, task())


@pytest.mark.parametrize("kind", ["stored.zip", "deflated.zip", "stored.npz", "packed.npz"])
def test_a_damaged_archive_gives_data_error_or_the_right_samples(tmp_path: Path, kind: str) -> None:
    """Only stored arrays are read without a checksum: their values may change, but nothing else is raised."""
    path = tmp_path / kind
    if kind.endswith("npz"):
        (np.savez if kind == "stored.npz" else np.savez_compressed)(path, x=GREYS, y=IDS)
    else:
        write_zip(path, tree(), zipfile.ZIP_STORED if kind == "stored.zip" else zipfile.ZIP_DEFLATED)
    spec = GREY if kind.endswith("npz") else COLOUR
    expected = open_dataset(path, "train", spec, task()).read(np.arange(12))
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(150):
        bad = bytearray(whole)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        path.write_bytes(bad[: rng.integers(len(bad))] if rng.random() < 0.3 else bad)
        try:
            data = open_dataset(path, "train", spec, task())
            samples = data.read(np.arange(len(data)))
        except DataError:
            refused += 1
        else:
            assert kind == "stored.npz" or np.array_equal(samples, expected)
    assert refused > 20


def test_a_zip_whose_directory_names_another_class_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "d.zip", tree())
    before, _, directory = path.read_bytes().partition(b"PK\x01\x02")
    path.write_bytes(before + b"PK\x01\x02" + directory.replace(b"a/000.png", b"b/000.png"))
    data = open_dataset(path, "train", COLOUR, task())
    with pytest.raises(DataError, match=r"b/000.png is damaged \(not the name"):
        data.read(np.arange(12))


def test_an_encrypted_or_strangely_packed_zip_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "d.zip", tree(), zipfile.ZIP_BZIP2)
    with pytest.raises(DataError, match=r"a/000.png is packed by method 12, expected stored or deflated"):
        open_dataset(path, "train", COLOUR, task()).read(np.arange(12))
    at = path.read_bytes().index(b"PK\x01\x02") + 8
    path.write_bytes(path.read_bytes()[:at] + b"\x01" + path.read_bytes()[at + 1 :])
    with pytest.raises(DataError, match=r"is damaged or no zip archive \(it is encrypted\)"):
        open_dataset(path, "train", COLOUR, task())


def test_a_file_too_large_for_an_image_is_refused_before_it_is_read(tmp_path: Path) -> None:
    files = {"a/0.png": bytes(MAX_IMAGE_BYTES + 1)}
    for path in (write_zip(tmp_path / "d.zip", files, zipfile.ZIP_DEFLATED), write(tmp_path / "d", files)):
        with pytest.raises(DataError, match=r"a/0.png has .* bytes, .*remove or shrink it"):
            open_dataset(path, "train", COLOUR, task(1)).read(np.arange(1))


def test_idx_labels_of_another_number_are_refused(tmp_path: Path) -> None:
    files = {"train-images-idx3-ubyte": idx(GREYS), "train-labels-idx1-ubyte": idx(np.uint8(IDS[1:]))}
    with pytest.raises(DataError, match="11 labels for 12 samples"):
        open_dataset(write(tmp_path, files), "train", GREY, task())


def test_arrays_with_an_impossible_header_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, x=GREYS, y=IDS)
    whole = (path / "x.npy").read_bytes()
    negative, misspelt = whole.replace(b"(12,", b"(-2,"), whole.replace(b"'shape'", b"'shapo'")
    for bad in (negative, misspelt, whole[:6] + b"\x03" + whole[7:]):
        write(path, {"x.npy": bad})
        with pytest.raises(DataError, match=r"x.npy is damaged or no NumPy array"):
            open_dataset(path, "train", GREY, task())


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, x=GREYS, y=IDS)
    data = open_dataset(path, "train", GREY, task())
    (path / "x.npy").unlink()
    (path / "x.npy").mkdir()
    with pytest.raises(DataError, match=r"x.npy cannot be read \(Is a directory\)"):
        data.read(np.arange(1))
