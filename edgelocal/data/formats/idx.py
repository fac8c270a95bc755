"""IDX files as used by MNIST (LeCun et al. 1998) and its kin: `train-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`.

A file is: two zero bytes, a type code (8: uint8), the rank, the dimensions as big-endian 32-bit integers, then the
values in row-major order. Plain image files are read by row, files ending in .gz as the module `packed` says.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from edgelocal.bundle.spec import InputSpec, TaskSpec
from edgelocal.data.formats.base import Dataset, Parts, Readable, Split, reading, visible
from edgelocal.data.formats.labels import class_labels
from edgelocal.data.formats.packed import Packed, packed_rows
from edgelocal.data.formats.rows import FileRows, Rows, all_rows, array_dataset
from edgelocal.errors import DataError

_NAME = re.compile(r"(?:.*-)?(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(?:\.gz)?")
_SPLITS: dict[str, Split] = {"train": "train", "t10k": "test", "test": "test"}
_TYPE = 8
_UBYTE = np.dtype(np.uint8)


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


def _open(images: Path, labels: Path, spec: InputSpec, task: TaskSpec, scratch: Path | None) -> Dataset:
    rows, ids = _rows(images, 3, scratch), _rows(labels, 1, scratch)
    return array_dataset(rows, class_labels(all_rows(ids), task, str(labels)), spec, str(images))


def _rows(path: Path, rank: int, scratch: Path | None) -> Rows:
    if path.suffix == ".gz":
        return packed_rows(partial(_unzipped, path, rank), path, scratch)
    with reading(path) as file:
        shape = _header(file, rank, path)
        found, size = path.stat().st_size - file.tell(), math.prod(shape)
        if found != size:
            raise DataError(f"{path} holds {found} bytes after its header, expected {size}: download it again")
        return FileRows(path, file.tell(), math.prod(shape[1:]), shape[0], shape[1:], _UBYTE)


@contextmanager
def _unzipped(path: Path, rank: int) -> Iterator[Packed]:
    """The array in a .gz file."""
    with reading(path) as file:
        try:
            with gzip.open(file) as plain:
                yield Packed(plain, _header(plain, rank, path), _UBYTE, str(path))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is damaged ({error}); download it again") from error


def _header(file: Readable, rank: int, path: Path) -> tuple[int, ...]:
    head = file.read(4 + 4 * rank)
    if len(head) < 4 + 4 * rank or head[:4] != bytes((0, 0, _TYPE, rank)):
        raise DataError(
            f"{path} starts with {head[:4].hex() or 'nothing'}, expected {bytes((0, 0, _TYPE, rank)).hex()} "
            f"(an IDX file of uint8, rank {rank}): download it again"
        )
    return struct.unpack(f">{rank}I", head[4:])
