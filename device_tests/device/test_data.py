"""Every format read back against what was written, and every kind of bad data refused by name."""

from __future__ import annotations

import gzip
import io
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelocal.augment import augment
from edgelocal.data import batches, has_split, open_dataset, prepare
from edgelocal.errors import DataError, UsageError
from edgelocal.spec import AugmentSpec, InputSpec, TaskSpec

Image = pytest.importorskip("PIL.Image")

RNG = np.random.default_rng(0)
COLOUR = InputSpec((3, 32, 32), (0.5,), (0.25,))
GREY = InputSpec((1, 6, 5), (0.5,), (0.25,))
FLAT = InputSpec((30,), (0.5,), (0.25,))
COLOURS = RNG.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
GREYS = RNG.integers(0, 256, (12, 6, 5), dtype=np.uint8)
IDS = np.arange(12) % 3


def task(classes: int = 3, loss: str = "cross_entropy", names: tuple[str, ...] = ()) -> TaskSpec:
    return TaskSpec(loss, classes, 0.0, names)


def png(array: np.ndarray, kind: str = "png") -> bytes:
    """(C, H, W) or (H, W) uint8 -> the bytes of an image file."""
    stream = io.BytesIO()
    Image.fromarray(array.transpose(1, 2, 0) if array.ndim == 3 else array).save(stream, kind)
    return stream.getvalue()


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def save(root: Path, **arrays: Any) -> Path:
    root.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(root / f"{name}.npy", array)
    return root


def tree(images: np.ndarray = COLOURS, names: str = "abc") -> dict[str, bytes]:
    """Class folders whose sorted order is a stable sort of the images by IDS."""
    return {f"{names[c]}/{i:03}.png": png(image) for i, (image, c) in enumerate(zip(images, IDS, strict=True))}


def check(path: Path, images: np.ndarray, ids: Any, spec: InputSpec, split: Any = "train", **kw: Any) -> None:
    data = open_dataset(path, split, spec, task(**kw))
    order = np.asarray([3, 0, 1, 2, 11, 3])
    assert len(data) == len(images)
    np.testing.assert_array_equal(data.read(order), images.reshape(-1, *spec.shape)[order])
    np.testing.assert_array_equal(data.labels, ids)
    assert data.labels.dtype == np.int64
    assert data.read(order[:0]).shape == (0, *spec.shape)
    with pytest.raises(IndexError, match=r"the dataset has 0\.\.11"):
        data.read(np.asarray([-1]))


def by_class(images: np.ndarray) -> np.ndarray:
    return images[np.argsort(IDS, kind="stable")]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("wrapper", ["", "train/", "set/", "set/train/"])
def test_zip_of_class_folders(tmp_path: Path, method: int, wrapper: str) -> None:
    junk = {"__MACOSX/a/._000.png": b"x", wrapper + "a/.DS_Store": b"x"}
    files = {wrapper + name: data for name, data in tree().items()}
    path = write_zip(tmp_path / "d.zip", files | junk, method)
    check(path, by_class(COLOURS), np.sort(IDS), COLOUR)
    assert not has_split(path, "test")


def test_zip_with_a_64_bit_directory_and_data_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    check(write_zip(tmp_path / "wide.zip", tree()), by_class(COLOURS), np.sort(IDS), COLOUR)
    monkeypatch.undo()
    path = write_zip(tmp_path / "d.zip", tree())
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    check(path, by_class(COLOURS), np.sort(IDS), COLOUR)


def test_zip_where_a_name_comes_twice_gives_the_last(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "d.zip", tree())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/000.png", png(COLOURS[1]))
    expected = by_class(COLOURS).copy()
    expected[0] = COLOURS[1]
    check(path, expected, np.sort(IDS), COLOUR)


def test_folder_of_class_folders_and_splits(tmp_path: Path) -> None:
    junk = {"a/.hidden": b"x", "b/Thumbs.db": b"x", ".git/config": b"x"}
    check(write(tmp_path / "whole", tree() | junk), by_class(COLOURS), np.sort(IDS), COLOUR)
    both = write(tmp_path / "both", {f"{s}/{n}": d for s in ("train", "val") for n, d in tree().items()})
    check(both, by_class(COLOURS), np.sort(IDS), COLOUR, "test")
    assert open_dataset(both, "train", COLOUR, task()).classes == ("a", "b", "c")
    assert has_split(both, "test")
    assert not has_split(tmp_path / "whole", "test")


def test_class_names_of_the_task_order_the_ids(tmp_path: Path) -> None:
    path = write(tmp_path, tree())
    data = open_dataset(path, "train", COLOUR, task(4, names=("c", "x", "b", "a")))
    assert data.classes == ("c", "x", "b", "a")
    assert data.labels.tolist() == [3] * 4 + [2] * 4 + [0] * 4
    one_hot = open_dataset(path, "train", COLOUR, task(loss="mse")).labels
    np.testing.assert_array_equal(one_hot, np.eye(3, dtype=np.float32)[np.sort(IDS)])


def test_images_of_all_modes_become_the_channels_of_the_input(tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS[0].transpose(1, 2, 0))
    for mode in ("1", "L", "P", "LA", "RGBA"):
        (tmp_path / mode).mkdir()
        image.convert(mode).save(tmp_path / mode / "i.png")
    image.convert("CMYK").save(write(tmp_path, {"C/x": b""}) / "C" / "i.jpg")
    (tmp_path / "C" / "x").unlink()
    for shape, mode in (((3, 32, 32), "RGB"), ((1, 32, 32), "L")):
        data = open_dataset(tmp_path, "train", InputSpec(shape, (0.0,), (1.0,)), task(6))
        assert data.classes == ("1", "C", "L", "LA", "P", "RGBA")
        for sample, name in ((0, "1/i.png"), (2, "L/i.png"), (4, "P/i.png"), (5, "RGBA/i.png")):
            expected = np.atleast_3d(np.asarray(Image.open(tmp_path / name).convert("RGB").convert(mode)))
            np.testing.assert_array_equal(data.read(np.asarray([sample]))[0].transpose(1, 2, 0), expected)


def test_cifar_10_and_100(tmp_path: Path) -> None:
    def records(images: np.ndarray, *labels: Any) -> bytes:
        return np.concatenate(
            [*(np.c_[np.uint8(y)] for y in labels), images.reshape(len(images), -1)], axis=1
        ).tobytes()

    files = {"data_batch_2.bin": records(COLOURS[7:], IDS[7:]), "data_batch_1.bin": records(COLOURS[:7], IDS[:7])}
    ten = write(tmp_path / "10", files | {"test_batch.bin": records(COLOURS, IDS), "batches.meta.txt": b"x\ny\nz\n\n"})
    check(ten, COLOURS, IDS, COLOUR)
    check(ten, COLOURS, IDS, COLOUR, "test")
    assert open_dataset(ten, "test", COLOUR, task()).classes == ("x", "y", "z")
    hundred = write(tmp_path / "100", {"train.bin": records(COLOURS, 9 - IDS, IDS)})
    check(hundred, COLOURS, IDS, COLOUR)
    assert not has_split(hundred, "test")
    write(ten, {"test_batch.bin": b"x" * 3072})
    with pytest.raises(DataError, match=r"test_batch.bin has 3072 bytes, expected a positive multiple of 3073"):
        open_dataset(ten, "test", COLOUR, task())


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    end = ".gz" if pack is gzip.compress else ""
    files = {"train-images-idx3-ubyte": idx(GREYS), "train-labels-idx1-ubyte": idx(np.uint8(IDS))}
    files |= {"t10k-images.idx3-ubyte": idx(GREYS), "t10k-labels.idx1-ubyte": idx(np.uint8(IDS))}
    path = write(tmp_path, {name + end: pack(data) for name, data in files.items()})
    check(path, GREYS, IDS, GREY)
    check(path, GREYS, IDS, GREY, "test")
    check(path, GREYS, IDS, FLAT)
    for bad in (idx(GREYS)[:-1], idx(GREYS) + b"x", b"\0\0\x0d" + idx(GREYS)[3:], b"", idx(GREYS[:0])):
        write(path, {f"train-images-idx3-ubyte{end}": pack(bad)})
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*expected"):
            open_dataset(path, "train", GREY, task())
    write(path, {f"train-images-idx3-ubyte{end}": pack(idx(GREYS))[:-20]})
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        open_dataset(path, "train", GREY, task())


@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels"), ("x_train", "y_train"), ("train_x", "train_y")])
@pytest.mark.parametrize("dtype", ["u1", "<f2", "<f4", ">f8"])
def test_npy_and_npz(tmp_path: Path, names: tuple[str, str], dtype: str) -> None:
    x = GREYS.astype(dtype)
    arrays = {names[0]: x, names[1]: IDS}
    np.savez(tmp_path / "stored.npz", **arrays)
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    read_as = np.uint8 if dtype == "u1" else np.float32
    for path in (tmp_path / "stored.npz", tmp_path / "packed.npz", save(tmp_path / "plain", **arrays)):
        check(path, x, IDS, GREY)
        check(path, x, IDS, FLAT)
        assert open_dataset(path, "train", GREY, task()).read(np.arange(2)).dtype == read_as
        assert not has_split(path, "test")


def test_npz_splits_and_channel_orders(tmp_path: Path) -> None:
    last = np.moveaxis(COLOURS, 1, -1)
    np.savez(tmp_path / "d.npz", train_images=last, train_labels=IDS[:, None], val_images=COLOURS, val_labels=IDS)
    check(tmp_path / "d.npz", COLOURS, IDS, COLOUR)
    check(tmp_path / "d.npz", COLOURS, IDS, COLOUR, "test")
    cube = RNG.random((12, 3, 3, 3), dtype=np.float32)  # both orders fit: channels first
    check(save(tmp_path / "cube", x=cube, y=IDS), cube, IDS, InputSpec((3, 3, 3), (0.0,), (1.0,)))


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


@pytest.mark.parametrize(("loss", "y"), [("bce", np.eye(3)[IDS] > 0), ("mse", RNG.normal(size=(12, 3)))])
def test_targets_of_bce_and_mse_are_float32(tmp_path: Path, loss: str, y: np.ndarray) -> None:
    labels = open_dataset(save(tmp_path, x=GREYS, y=y), "train", GREY, task(loss=loss)).labels
    assert labels.dtype == np.float32
    np.testing.assert_array_equal(labels, y.astype(np.float32))


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


SIXTEEN = io.BytesIO()
Image.fromarray(np.zeros((32, 32), dtype=np.uint16)).save(SIXTEEN, "png")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(COLOURS[0])[:-800], "is no readable image"),
        (b"", "is no readable image"),
        (b"GIF89a", "is no readable image"),
        (png(COLOURS[0][:, :16]), r"is 32x16 pixels \(width x height\), the bundle takes 32x32: resize"),
        (SIXTEEN.getvalue(), "has more than 8 bits a channel"),
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
    with pytest.raises(UsageError, match=r"pip install edgelocal\[image\]"):
        open_dataset(path, "train", COLOUR, task())


@pytest.mark.parametrize("kind", ["stored.zip", "deflated.zip", "stored.npz", "packed.npz"])
def test_any_damaged_archive_gives_data_error_or_the_right_samples(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind.endswith("npz"):
        (np.savez if kind == "stored.npz" else np.savez_compressed)(path, x=GREYS, y=IDS)
    else:
        write_zip(path, tree(), zipfile.ZIP_STORED if kind == "stored.zip" else zipfile.ZIP_DEFLATED)
    spec = GREY if kind.endswith("npz") else COLOUR
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(150):
        bad = bytearray(whole)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        path.write_bytes(bad[: rng.integers(len(bad))] if rng.random() < 0.3 else bad)
        try:
            open_dataset(path, "train", spec, task()).read(np.arange(12))
        except DataError:
            refused += 1
    assert refused > 20


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_batches_hold_every_sample_once(n: int, batch: int, seed: int, epoch: int, shuffle: bool) -> None:
    found = list(batches(n, batch, seed, epoch, shuffle))
    assert [len(b) for b in found] == [batch] * (n // batch) + [n % batch] * (n % batch > 0)
    joined = np.concatenate(found)
    assert joined.dtype == np.int64
    assert sorted(joined) == list(range(n))
    assert shuffle or joined.tolist() == list(range(n))
    for start in range(len(found) + 1):
        resumed = list(batches(n, batch, seed, epoch, shuffle, start))
        assert [b.tolist() for b in resumed] == [b.tolist() for b in found[start:]]


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="batch is 0, expected at least 1"):
        batches(5, 0, 0, 0, True)


@pytest.mark.parametrize("spec", [None, AugmentSpec(3, "zero", True)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_prepare_scales_augments_and_normalises(spec: AugmentSpec | None, dtype: type) -> None:
    shape = InputSpec((3, 32, 32), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    raw = COLOURS.astype(dtype)
    before = raw.copy()
    x = prepare(raw, np.arange(12), input=shape, augment=spec, seed=1, epoch=2)
    scaled = raw.astype(np.float64) / (255 if dtype is np.uint8 else 1)
    if spec is not None:
        scaled = augment(scaled, np.arange(12), spec=spec, seed=1, epoch=2)
    expected = np.stack([(scaled[:, c] - shape.mean[c]) / shape.std[c] for c in range(3)], axis=1)
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(raw, before)
    assert x.dtype == np.float32
    assert x.flags.c_contiguous


def test_prepare_features_with_one_mean_each() -> None:
    spec = InputSpec((3,), (1.0, 2.0, 3.0), (1.0, 2.0, 4.0))
    raw = np.asarray([[2.0, 4.0, 7.0]], dtype=np.float32)
    assert prepare(raw, np.arange(1), input=spec, augment=None, seed=0, epoch=0).tolist() == [[1.0, 1.0, 1.0]]
