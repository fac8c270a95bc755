"""Pairs of NumPy arrays: `.npy` files in a folder, or the members of an `.npz` archive.

Names: `x` and `y`, or `images` and `labels`, alone (all of it is for training) or with the split before or after, as in
`x_train`, `train_images`, `y_test`, `val_labels`. Samples in `.npy` files and in stored members (`np.savez`) are read
from the file by row; members that are compressed (`np.savez_compressed`), as the module `packed` says. The
checksum of a stored member is not checked: that would take reading all of it. Pickled objects are refused unread.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from edgelocal.bundle.spec import InputSpec, TaskSpec
from edgelocal.data.formats.base import Dataset, Parts, Split, reading, visible
from edgelocal.data.formats.labels import array_labels
from edgelocal.data.formats.packed import Packed, packed_rows
from edgelocal.data.formats.rows import FileRows, Rows, all_rows, array_dataset
from edgelocal.errors import DataError

RowsOf: TypeAlias = Callable[[str, Path | None], Rows]  # of a name; where to unpack
_TAGS: dict[Split, tuple[str, ...]] = {"train": ("train", ""), "test": ("test", "val")}
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, RuntimeError, ValueError)
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature ... length of the name, length of the extra field


def find(path: Path) -> Parts:
    """The pairs of arrays at `path`, an .npz file or a folder of .npy files."""
    if path.suffix.lower() == ".npz" and path.is_file():
        return _parts(
            {n.removesuffix(".npy") for n in _members(path) if n.endswith(".npy")}, partial(_npz_rows, path), str(path)
        )
    if path.is_dir():
        names = {n.removesuffix(".npy") for n in visible(path) if n.endswith(".npy")}
        return _parts(names, partial(_file_rows, path), str(path))
    return {}


def _parts(names: set[str], rows_of: RowsOf, source: str) -> Parts:
    parts: Parts = {}
    for split, tags in _TAGS.items():
        for x, y in [pair for tag in tags for pair in _pairs(tag)]:
            if {x, y} <= names and split not in parts:
                parts[split] = partial(_open, rows_of, x, y, source)
    return parts


def _pairs(tag: str) -> list[tuple[str, str]]:
    words = (("x", "y"), ("images", "labels"))
    if not tag:
        return list(words)
    return [(f"{x}_{tag}", f"{y}_{tag}") for x, y in words] + [(f"{tag}_{x}", f"{tag}_{y}") for x, y in words]


def _open(
    rows_of: RowsOf, x: str, y: str, source: str, spec: InputSpec, task: TaskSpec, scratch: Path | None
) -> Dataset:
    samples = rows_of(x, scratch)
    targets = array_labels(all_rows(rows_of(y, scratch)), samples.count, task, f"{source}: {y}")
    return array_dataset(samples, targets, spec, f"{source}: {x}")


def _file_rows(folder: Path, name: str, _: Path | None) -> Rows:
    path = folder / f"{name}.npy"
    with reading(path) as file:
        return _plain_rows(path, file, path.stat().st_size, str(path))


def _npz_rows(path: Path, name: str, scratch: Path | None) -> Rows:
    where = f"{path}: {name}.npy"
    with reading(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                info = archive.getinfo(f"{name}.npy")
        except _DAMAGE as error:
            raise _damaged(where, error) from error
        if info.compress_type == zipfile.ZIP_STORED:
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
                raise _damaged(where, "no member where the directory says")
            file.seek(sum(_LOCAL_HEADER.unpack(header)[1:]), 1)
            return _plain_rows(path, file, file.tell() + info.file_size, where)
    if info.compress_type != zipfile.ZIP_DEFLATED:
        raise _damaged(where, f"packed by method {info.compress_type}, expected stored or deflated")
    return packed_rows(partial(_inflated, path, name), path, scratch)


@contextmanager
def _inflated(path: Path, name: str) -> Iterator[Packed]:
    """The array in a compressed member."""
    where = f"{path}: {name}.npy"
    with reading(path) as file:
        try:
            with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as member:
                yield Packed(member, *_header(member, where), where)
        except _DAMAGE as error:
            raise _damaged(where, error) from error


def _plain_rows(path: Path, file: io.BufferedReader, end: int, where: str) -> Rows:
    """Rows of the array that starts at the position of `file` and may reach to byte `end`."""
    shape, dtype = _header(file, where)
    offset, row = file.tell(), math.prod(shape[1:]) * dtype.itemsize
    if offset + shape[0] * row > min(end, path.stat().st_size):
        raise _damaged(where, f"it ends before the last of {shape[0]} rows of {row} bytes")
    return FileRows(path, offset, row, shape[0], shape[1:], dtype)


def _header(file: Any, where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of the array; leaves `file` at its first byte."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"npy version {version}, expected 1.0 or 2.0")
        shape, fortran, dtype = readers[version](file)
    except Exception as error:  # numpy parses the header as Python source: damaged, it may raise anything
        raise _damaged(where, error) from error
    if dtype.kind not in "biuf":
        found = "pickled Python objects" if dtype.hasobject else f"values of type {dtype}"
        raise DataError(f"{where} holds {found}, expected numbers: save it with a numeric dtype")
    if any(size < 0 for size in shape):
        raise _damaged(where, f"its shape is {shape}")
    if not shape or (fortran and len(shape) > 1):
        found = "column-major order" if shape else "a single value"
        raise DataError(f"{where} holds {found}, expected rows of samples: save np.ascontiguousarray(array)")
    return shape, dtype


def _members(path: Path) -> list[str]:
    with reading(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return archive.namelist()
        except _DAMAGE as error:
            raise _damaged(str(path), error) from error


def _damaged(where: str, why: object) -> DataError:
    return DataError(f"{where} is damaged or no NumPy array ({why}); save it again with np.save or np.savez")
