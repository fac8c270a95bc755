"""IDX files as used by MNIST (LeCun et al. 1998) and its kin: `train-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`.

A file is: two zero bytes, a type code (8: uint8), the rank, the dimensions as big-endian 32-bit integers, then the
values in row-major order. Plain image files are read by row. Files ending in .gz are held decompressed: n times H times
W bytes for as long as the dataset lives.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from edgelocal.errors import DataError
from edgelocal.formats.base import Dataset, Parts, Readable, Split, read_whole, reading, visible
from edgelocal.formats.labels import class_labels
from edgelocal.formats.rows import FileRows, MemoryRows, Rows, array_dataset
from edgelocal.spec import InputSpec, TaskSpec

_NAME = re.compile(r"(?:.*-)?(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(?:\.gz)?")
_SPLITS: dict[str, Split] = {"train": "train", "t10k": "test", "test": "test"}
_UBYTE = 8


def find(path: Path) -> Parts:
    """The pairs of IDX files in the folder `path`; a plain file is preferred to its .gz."""
    files: dict[tuple[Split, str], Path] = {}
    for name in visible(path) if path.is_dir() else []:
        match = _NAME.fullmatch(name)
        if match:
            files.setdefault((_SPLITS[match[1]], match[2]), path / name)
    return {
        split: partial(_open, images, files[split, "labels"])
        for (split, kind), images in files.items()
        if kind == "images" and (split, "labels") in files
    }


def _open(images: Path, labels: Path, spec: InputSpec, task: TaskSpec) -> Dataset:
    rows, ids = _rows(images, 3), _rows(labels, 1)
    return array_dataset(rows, class_labels(ids.read(np.arange(ids.count)), task, str(labels)), spec, str(images))


def _rows(path: Path, rank: int) -> Rows:
    with reading(path) as file:
        if path.suffix != ".gz":
            shape = _header(file, rank, path)
            _check_length(path, shape, path.stat().st_size - file.tell())
            return FileRows(path, file.tell(), math.prod(shape[1:]), shape[0], shape[1:], np.dtype(np.uint8))
        try:
            with gzip.open(file) as plain:
                return _loaded(plain, rank, path)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is damaged ({error}); download it again") from error


def _loaded(plain: Readable, rank: int, path: Path) -> Rows:
    shape = _header(plain, rank, path)
    data = read_whole(plain, math.prod(shape))
    _check_length(path, shape, len(data))
    return MemoryRows(data.reshape(shape))


def _header(file: Readable, rank: int, path: Path) -> tuple[int, ...]:
    head = file.read(4 + 4 * rank)
    if len(head) < 4 + 4 * rank or head[:4] != bytes((0, 0, _UBYTE, rank)):
        raise DataError(
            f"{path} starts with {head[:4].hex() or 'nothing'}, expected {bytes((0, 0, _UBYTE, rank)).hex()} "
            f"(an IDX file of uint8, rank {rank}): download it again"
        )
    return struct.unpack(f">{rank}I", head[4:])


def _check_length(path: Path, shape: tuple[int, ...], found: int) -> None:
    if found != math.prod(shape):
        raise DataError(
            f"{path} holds {found} bytes or more after its header, expected {math.prod(shape)}: download it again"
        )
