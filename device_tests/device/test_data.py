"""Every format read back against what was written; the order of samples; the making of a batch."""

from __future__ import annotations

import gzip
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import COLOUR, COLOURS, FLAT, GREY, GREYS, IDS, RNG, Image, idx, png, save, task, tree, write, write_zip
from hypothesis import given
from hypothesis import strategies as st

from edgelocal.bundle.spec import AugmentSpec, InputSpec
from edgelocal.data.augment import augment
from edgelocal.data.pipeline import batches, has_split, holds_images, open_dataset, prepare
from edgelocal.errors import DataError, UsageError


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


def test_image_files_are_known_before_anything_is_opened(tmp_path: Path) -> None:
    images = {f"{c}/0.png": png(COLOURS[i]) for i, c in enumerate("abc")}
    folder = write(tmp_path / "f", images)
    split = write(tmp_path / "s", {f"train/{name}": data for name, data in images.items()})
    packed = write_zip(tmp_path / "z.zip", images)
    arrays = save(tmp_path / "n", x=COLOURS, y=IDS)
    found = [holds_images(path) for path in (folder, split, packed, arrays)]
    assert found == [True, True, True, False]
    with pytest.raises(DataError, match="does not exist"):
        holds_images(tmp_path / "missing")


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


@pytest.mark.parametrize(("loss", "y"), [("bce", np.eye(3)[IDS] > 0), ("mse", RNG.normal(size=(12, 3)))])
def test_targets_of_bce_and_mse_are_float32(tmp_path: Path, loss: str, y: np.ndarray) -> None:
    labels = open_dataset(save(tmp_path, x=GREYS, y=y), "train", GREY, task(loss=loss)).labels
    assert labels.dtype == np.float32
    np.testing.assert_array_equal(labels, y.astype(np.float32))


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


def test_memory_is_the_rows_asked_for(tmp_path: Path) -> None:
    """Of 12 MiB in a file, 16 rows of 3 KiB take 48 KiB and what Python needs."""
    x = np.zeros((4096, 3, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", x=x, y=np.zeros(4096, dtype=np.int64))
    path = save(tmp_path / "plain", x=x, y=np.zeros(4096, dtype=np.int64))
    for place in (tmp_path / "d.npz", path):
        tracemalloc.start()
        open_dataset(place, "train", COLOUR, task()).read(np.arange(16))
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 400_000
