"""The binary version of CIFAR-10 and CIFAR-100 (Krizhevsky 2009): records of label bytes and 3 x 32 x 32 planes.

CIFAR-10: `data_batch_*.bin` and `test_batch.bin`, one label byte. CIFAR-100: `train.bin` and `test.bin`, a coarse and a
fine label byte, of which the fine one is used. Images are read from the files by record.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from edgelocal.bundle.spec import InputSpec, TaskSpec
from edgelocal.data.formats.base import Dataset, Parts, reading, visible
from edgelocal.data.formats.labels import class_labels
from edgelocal.data.formats.rows import FileRows, JoinedRows, all_rows, array_dataset
from edgelocal.errors import DataError

SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_BYTE = np.dtype(np.uint8)


@dataclass(frozen=True)
class Variant:
    """`label_bytes` stand before the pixels, the last of them is the label; `names` is the file of class names."""

    train: str
    test: str
    label_bytes: int
    names: str


VARIANTS = (
    Variant("data_batch_*.bin", "test_batch.bin", 1, "batches.meta.txt"),
    Variant("train.bin", "test.bin", 2, "fine_label_names.txt"),
)


def find(path: Path) -> Parts:
    """The CIFAR files in the folder `path`."""
    parts: Parts = {}
    if not path.is_dir():
        return parts
    for variant in VARIANTS:
        train = sorted(path.glob(variant.train), key=lambda p: (len(p.name), p.name))
        test = sorted(path.glob(variant.test))
        if train:
            parts["train"] = partial(_open, path, train, variant)
        if test:
            parts["test"] = partial(_open, path, test, variant)
        if parts:
            break
    return parts


def _open(
    folder: Path, files: list[Path], variant: Variant, spec: InputSpec, task: TaskSpec, _: Path | None
) -> Dataset:
    counts = [_records(file, variant.label_bytes + _PIXELS) for file in files]
    whole = list(zip(files, counts, strict=True))
    images = tuple(_field(file, count, variant, variant.label_bytes, SHAPE) for file, count in whole)
    labels = JoinedRows(tuple(_field(file, count, variant, variant.label_bytes - 1, ()) for file, count in whole))
    source = str(files[0]) if len(files) == 1 else str(folder)
    ids = class_labels(all_rows(labels), task, source)
    return array_dataset(JoinedRows(images), ids, spec, source, _names(folder, variant, task.classes))


def _field(file: Path, count: int, variant: Variant, offset: int, shape: tuple[int, ...]) -> FileRows:
    return FileRows(file, offset, variant.label_bytes + _PIXELS, count, shape, _BYTE)


def _records(file: Path, size: int) -> int:
    with reading(file):
        count, rest = divmod(file.stat().st_size, size)
    if rest or not count:
        raise DataError(
            f"{file} has {count * size + rest} bytes, expected a positive multiple of {size} (one record): "
            "download the binary version of CIFAR again"
        )
    return count


def _names(folder: Path, variant: Variant, classes: int) -> tuple[str, ...]:
    """Class names from the archive's own list, () where it is missing or of another length."""
    if variant.names not in visible(folder):
        return ()
    with reading(folder / variant.names) as file:
        names = tuple(file.read(1 << 16).decode("utf-8", "replace").split())
    return names if len(names) == classes else ()
