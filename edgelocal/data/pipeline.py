"""Samples for training: which format lies at a path, in which order samples come, how a batch is made.

    open_dataset(path) -> Dataset;  batches(...) -> indices;  Dataset.read(indices) -> raw;  prepare(raw) -> float32

Only labels, names and the samples of a batch are in memory; `pipeline_bytes` says how much that is. What is compressed
as a whole is unpacked into a file first (see `edgelocal.data.formats.packed`). Pillow is needed for image files only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgelocal.bundle.spec import AugmentSpec, InputSpec, TaskSpec
from edgelocal.data.augment import augment as augment_images
from edgelocal.data.augment import permutation
from edgelocal.data.formats import cifar, idx, images, npy
from edgelocal.data.formats.base import Dataset, Indices, Labels, Opener, Parts, Samples, Split, visible
from edgelocal.errors import DataError, UsageError
from edgelocal.memory.needs import PipelineBytes

__all__ = [
    "Dataset",
    "Indices",
    "Labels",
    "Samples",
    "Split",
    "batches",
    "has_split",
    "holds_images",
    "open_dataset",
    "pipeline_bytes",
    "prepare",
]

_ORDER_BYTES = 8  # of a sample's place in the order of an epoch
_SHUFFLE_BYTES = 40  # of a sample while that order is made, see `permutation`
_SAMPLE_OVERHEAD = 256  # random numbers, masks and places of a sample while its batch is made
_OVERHEAD = 512 << 10  # small objects of Python, and what decoders keep
_FINDERS = (cifar.find, idx.find, npy.find, images.find)
_EXPECTED = (
    "class folders of images (or a .zip of them), CIFAR binary files, IDX files, an .npz with x and y, or x.npy and "
    "y.npy; train/ and test/ may hold each split"
)


class Sizes(Protocol):
    """What `pipeline_bytes` asks of a dataset: any `Dataset`, or one that is only assumed."""

    @property
    def resident_bytes(self) -> int:
        """As `Dataset.resident_bytes`."""

    @property
    def sample_bytes(self) -> int:
        """As `Dataset.sample_bytes`."""

    @property
    def labels(self) -> Labels:
        """As `Dataset.labels`."""

    def __len__(self) -> int:
        """Number of samples."""

    def reading_bytes(self, k: int) -> int:
        """As `Dataset.reading_bytes`."""


def open_dataset(
    path: Path,
    split: Split,
    input: InputSpec,  # noqa: A002 - the manifest's word for it
    task: TaskSpec,
    scratch: Path | None = None,
) -> Dataset:
    """The samples of a split, in whichever known format they are. Use it in a `with`, which removes what it unpacked.

    Data that names no splits is all for training. "test" is what is called test, or else val. Samples of more than
    1 MiB that are compressed as a whole are unpacked into a nameless file in `scratch`, an existing folder (None: the
    system's folder of temporary files), when the `with` begins, or at the first `read` without one. Nothing is
    written before.

    Raises:
        DataError: missing, of an unknown format, without that split, or not fit for `input` and `task`.
        UsageError: image files, and Pillow is not installed.
    """
    parts = _parts(path)
    if split not in parts:
        raise DataError(f"{path} has no {split} split, found {', '.join(parts)}: {_advice(split)}")
    return parts[split](input, task, scratch)


def has_split(path: Path, split: Split) -> bool:
    """Whether the data at `path` names samples for `split`.

    Raises:
        DataError: missing or of an unknown format.
    """
    return split in _parts(path)


def holds_images(path: Path) -> bool:
    """Whether samples at `path` are image files, which are decoded as they are read.

    Raises:
        DataError: missing.
    """
    folders = _split_folders(path)
    return any(_finder(place) is images.find for place in ([path / f for f in folders.values()] or [path]))


def batches(n: int, batch: int, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[Indices]:
    """Indices of each batch of an epoch, from batch number `start` on: (batch,) int64, the last may be shorter.

    The order of the n samples depends on (seed, epoch) only, so a resumed run continues with `start`.

    Raises:
        UsageError: a batch of less than one sample.
    """
    if batch < 1:
        raise UsageError(f"batch is {batch}, expected at least 1")
    starts = range(start * batch, n, batch)
    if not shuffle:
        return (np.arange(first, min(first + batch, n), dtype=np.int64) for first in starts)
    order = permutation(n, seed, epoch)
    return (order[first : first + batch] for first in starts)


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


def pipeline_bytes(
    datasets: Sequence[Sizes],
    batch: int,
    input: InputSpec,  # noqa: A002 - the manifest's word for it
    augment: AugmentSpec | None,
) -> PipelineBytes:
    """Upper bound of what the data takes in memory: all `datasets` are open, the first is trained on, and one of them
    gives batches of `batch`.

    That is labels and names; the order of an epoch; and for one batch what is read, augmented and prepared. The batch
    that `prepare` gave counts until the next is asked for. Opening a dataset takes more, for a moment, before any
    block is loaded.
    """
    working = [
        max(_SHUFFLE_BYTES * len(data), _ORDER_BYTES * len(data) + _batch_bytes(data, batch, input, augment))
        for data in datasets
    ]
    order = _ORDER_BYTES * len(datasets[0])
    resident = sum(data.resident_bytes for data in datasets) + order
    return PipelineBytes(resident, max(working) + _OVERHEAD - order)


def _batch_bytes(data: Sizes, batch: int, spec: InputSpec, augment: AugmentSpec | None) -> int:
    """Peak while a batch is made; the last term of the first is the batch before, which the caller may still hold."""
    k = min(batch, len(data))
    raw = k * data.sample_bytes
    reading = data.reading_bytes(k) + raw
    moving, moved = _augment_bytes(raw, spec.shape, augment)
    floats = 0 if spec.dtype == "int64" else 4 * k * math.prod(spec.shape)
    labels = k * data.labels.nbytes // len(data)
    return max(reading, raw + moving, raw + moved + floats) + labels + _SAMPLE_OVERHEAD * k


def _augment_bytes(raw: int, shape: tuple[int, ...], augment: AugmentSpec | None) -> tuple[int, int]:
    """For `raw` bytes of samples: what augmenting them takes beside them at its peak, and what is left of it."""
    if augment is None or not (augment.pad or augment.flip) or len(shape) != 3:  # `augment` refuses what is no image
        return 0, 0
    _, height, width = shape
    padded = raw * (height + 2 * augment.pad) * (width + 2 * augment.pad) // (height * width) if augment.pad else 0
    return raw + max(padded, raw if augment.flip else 0), raw


def _parts(path: Path) -> Parts:
    folders = _split_folders(path)
    if folders:
        return {split: _whole(path / folder) for split, folder in folders.items()}
    parts = _recognise(path)
    if not parts:
        names = visible(path) if path.is_dir() else []
        raise DataError(f"{path} is of no known format{_found(names)}; expected {_EXPECTED}")
    return parts


def _split_folders(path: Path) -> dict[Split, str]:
    """The folder of each split, where `path` has such."""
    if not path.exists():
        raise DataError(f"{path} does not exist; expected {_EXPECTED}")
    names = visible(path) if path.is_dir() else []
    return images.split_folders([name for name in names if name.endswith("/")])


def _finder(path: Path) -> Callable[[Path], Parts] | None:
    """The format that knows what is at `path`."""
    return next((find for find in _FINDERS if find(path)), None)


def _recognise(path: Path) -> Parts:
    find = _finder(path)
    return {} if find is None else find(path)


def _whole(path: Path) -> Opener:
    """Opens all of a folder that holds one split."""

    def open_whole(spec: InputSpec, task: TaskSpec, scratch: Path | None) -> Dataset:
        parts = _recognise(path)
        if len(parts) != 1:
            raise DataError(f"{path} is of no known format{_found(visible(path))}; expected {_EXPECTED}")
        return next(iter(parts.values()))(spec, task, scratch)

    return open_whole


def _found(names: list[str]) -> str:
    return f" (it holds {', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""


def _advice(split: Split) -> str:
    return "name other data for validation" if split == "test" else "put training samples into train/"
