"""Samples for training: which format lies at a path, in which order samples come, how a batch is made.

    open_dataset(path) -> Dataset;  batches(...) -> indices;  Dataset.read(indices) -> raw;  prepare(raw) -> float32

Nothing is loaded as a whole unless it is compressed as a whole (see `edgelocal.formats`). Pillow is needed for image
files only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelocal.augment import augment as augment_images
from edgelocal.augment import permutation
from edgelocal.errors import DataError, UsageError
from edgelocal.formats import cifar, idx, images, npy
from edgelocal.formats.base import Dataset, Indices, Labels, Opener, Parts, Samples, Split, visible
from edgelocal.spec import AugmentSpec, InputSpec, TaskSpec

__all__ = ["Dataset", "Indices", "Labels", "Samples", "Split", "batches", "has_split", "open_dataset", "prepare"]

_FINDERS = (cifar.find, idx.find, npy.find, images.find)
_EXPECTED = (
    "class folders of images (or a .zip of them), CIFAR binary files, IDX files, an .npz with x and y, or x.npy and "
    "y.npy; train/ and test/ may hold each split"
)


def open_dataset(
    path: Path,
    split: Split,
    input: InputSpec,  # noqa: A002 - the manifest's word for it
    task: TaskSpec,
) -> Dataset:
    """The samples of a split, in whichever known format they are.

    Data that names no splits is all for training. "test" is what is called test, or else val.

    Raises:
        DataError: missing, of an unknown format, without that split, or not fit for `input` and `task`.
        UsageError: image files, and Pillow is not installed.
    """
    parts = _parts(path)
    if split not in parts:
        raise DataError(f"{path} has no {split} split, found {', '.join(parts)}: {_advice(split)}")
    return parts[split](input, task)


def has_split(path: Path, split: Split) -> bool:
    """Whether the data at `path` names samples for `split`.

    Raises:
        DataError: missing or of an unknown format.
    """
    return split in _parts(path)


def batches(n: int, batch: int, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[Indices]:
    """Indices of each batch of an epoch, from batch number `start` on: (batch,) int64, the last may be shorter.

    The order of the n samples depends on (seed, epoch) only, so a resumed run continues with `start`.

    Raises:
        UsageError: a batch of less than one sample.
    """
    if batch < 1:
        raise UsageError(f"batch is {batch}, expected at least 1")
    order = permutation(n, seed, epoch) if shuffle else np.arange(n, dtype=np.int64)
    return (order[first : first + batch] for first in range(start * batch, n, batch))


def prepare(
    images: Samples,
    indices: Indices,
    *,
    input: InputSpec,  # noqa: A002 - the manifest's word for it
    augment: AugmentSpec | None,
    seed: int,
    epoch: int,
) -> npt.NDArray[np.float32] | npt.NDArray[np.int64]:
    """A batch as the step graph takes it: (k, *input.shape) of the input's dtype, C-contiguous.

    x = (a / 255 - mean) / std for bytes, (a - mean) / std for floats, with a the augmented samples and one mean and std
    per channel (or one for all). Augmentation moves values only, so it is done first, on fewer bytes.

    Args:
        images: as `Dataset.read(indices)` gives them; unchanged.
    """
    if input.dtype == "int64":
        return np.ascontiguousarray(images, dtype=np.int64)
    moved: npt.NDArray[Any] = images
    if augment is not None:
        moved = augment_images(moved, indices, spec=augment, seed=seed, epoch=epoch)
    x = moved.astype(np.float32, order="C")
    if images.dtype == np.uint8:
        x /= np.float32(255)
    per_channel = (-1, *[1] * (len(input.shape) - 1))
    x -= np.asarray(input.mean, dtype=np.float32).reshape(per_channel)
    x /= np.asarray(input.std, dtype=np.float32).reshape(per_channel)
    return x


def _parts(path: Path) -> Parts:
    if not path.exists():
        raise DataError(f"{path} does not exist; expected {_EXPECTED}")
    names = visible(path) if path.is_dir() else []
    folders = images.split_folders([name for name in names if name.endswith("/")])
    if folders:
        return {split: _whole(path / folder) for split, folder in folders.items()}
    parts = _recognise(path)
    if not parts:
        raise DataError(f"{path} is of no known format{_found(names)}; expected {_EXPECTED}")
    return parts


def _recognise(path: Path) -> Parts:
    return next((parts for find in _FINDERS if (parts := find(path))), {})


def _whole(path: Path) -> Opener:
    """Opens all of a folder that holds one split."""

    def open_whole(spec: InputSpec, task: TaskSpec) -> Dataset:
        parts = _recognise(path)
        if len(parts) != 1:
            raise DataError(f"{path} is of no known format{_found(visible(path))}; expected {_EXPECTED}")
        return next(iter(parts.values()))(spec, task)

    return open_whole


def _found(names: list[str]) -> str:
    return f" (it holds {', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""


def _advice(split: Split) -> str:
    return "name other data for validation" if split == "test" else "put training samples into train/"
