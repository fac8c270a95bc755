"""Images in one folder for each class, in a folder or a .zip: `[train/ or test/]<class>/<image>`.

Names are listed at open (about 100 bytes an image); images are decoded when they are read. Sizes are never changed and
the orientation tag of cameras is not applied: what is stored is what is learned.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgelocal.bundle.spec import InputSpec, TaskSpec
from edgelocal.data.formats.base import (
    Dataset,
    Indices,
    Labels,
    Parts,
    Split,
    largest_file,
    names_bytes,
    reading,
    visible,
)
from edgelocal.data.formats.labels import class_labels
from edgelocal.data.formats.rows import check_indices
from edgelocal.data.formats.zips import ZipTree
from edgelocal.errors import DataError, UsageError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".webp")
MAX_IMAGE_BYTES = 64 << 20
_CODECS = ("BMP", "JPEG", "PNG", "PPM", "WEBP")
# A codec, and how to write an image so that reading it runs most of its decoder.
_WARMING: tuple[tuple[str, dict[str, bool]], ...] = (
    *(("BMP", {}), ("JPEG", {"progressive": True}), ("JPEG", {}), ("PNG", {}), ("PPM", {})),
    *(("WEBP", {"lossless": True}), ("WEBP", {})),
)
_FILE_COPIES = 2  # packed and unpacked in a .zip, or the file and the decoder's own copy of it
_PIXEL_BYTES = 24  # Pillow takes 4 for each of: image, RGBA, result; then 6 for the array, 6 for progressive JPEG
_DECODER_BYTES = 1 << 18  # windows and line buffers of the decoders
_MODES = {1: "L", 3: "RGB"}
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L")  # converting them to bytes would clip without a word


class Tree(Protocol):
    """Files by name, without junk: "<class>/<file>", and "<class>/" for a folder itself."""

    @property
    def source(self) -> str:
        """Where the files are, for messages."""

    @property
    def names(self) -> Sequence[str]:
        """Name of each file."""

    @property
    def resident_bytes(self) -> int:
        """What it keeps in memory."""

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest file, as stored or as unpacked, when the tree was opened."""

    def read(self, positions: Sequence[int], limit: int) -> Iterator[bytes]:
        """The files at these positions of `names`, each refused if larger than `limit` bytes."""


@dataclass(frozen=True)
class FolderTree:
    """A Tree in the file system."""

    path: Path
    names: tuple[str, ...]
    largest_bytes: int

    @classmethod
    def open(cls, path: Path) -> FolderTree:
        """The folders in `path` and what lies in them."""
        names: list[str] = []
        largest = 0
        for name in visible(path):
            names.append(name)
            if name.endswith("/"):
                names += [name + inner for inner in visible(path / name)]
                largest = max(largest, largest_file(path / name))
        return cls(path, tuple(names), largest)

    @property
    def source(self) -> str:
        """The folder."""
        return str(self.path)

    @property
    def resident_bytes(self) -> int:
        """As `Tree.resident_bytes`."""
        return names_bytes(self.names)

    def read(self, positions: Sequence[int], limit: int) -> Iterator[bytes]:
        """As `Tree.read`."""
        for position in positions:
            path = self.path / self.names[position]
            with reading(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size > limit:
                    raise DataError(f"{path} has {size} bytes, expected at most {limit}: remove or shrink it")
                yield file.read(size)


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A Dataset of image files; sample i is the file `tree.names[positions[i]]`."""

    source: str
    classes: tuple[str, ...]
    labels: Labels
    tree: Tree
    positions: npt.NDArray[np.int64]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.positions)

    def __enter__(self) -> ImageDataset:
        """As `Dataset.__enter__`: every image is unpacked when it is read."""
        return self

    def __exit__(self, *_: object) -> None:
        """As `Dataset.__exit__`: there is nothing to remove."""

    @property
    def resident_bytes(self) -> int:
        """As `Dataset.resident_bytes`."""
        return self.labels.nbytes + self.positions.nbytes + self.tree.resident_bytes

    @property
    def sample_bytes(self) -> int:
        """As `Dataset.sample_bytes`."""
        return math.prod(self.shape)

    def reading_bytes(self, k: int) -> int:
        """As `Dataset.reading_bytes`: the samples, and what decoding one image takes."""
        file = _FILE_COPIES * min(self.tree.largest_bytes, MAX_IMAGE_BYTES)
        return k * self.sample_bytes + file + _PIXEL_BYTES * self.shape[1] * self.shape[2] + _DECODER_BYTES

    def read(self, indices: Indices) -> npt.NDArray[np.uint8]:
        """As `Dataset.read`, always uint8."""
        check_indices(indices, len(self))
        samples = np.empty((len(indices), *self.shape), dtype=np.uint8)
        positions: list[int] = self.positions[indices].tolist()
        for k, data in enumerate(self.tree.read(positions, MAX_IMAGE_BYTES)):
            samples[k] = decode(data, self.shape, f"{self.source}/{self.tree.names[positions[k]]}")
        return samples


def warm_up() -> None:
    """Load Pillow and decode an image of each format, so that code and tables of the decoders are in memory from now
    on: they are part of the idle process, and no image that is read later adds to it. Names do not tell formats.

    Raises:
        UsageError: Pillow is not installed.
    """
    pillow = _pillow()
    pillow.preinit()
    side = 64
    pixels = (np.arange(3 * side * side, dtype=np.uint32) * 2654435761 >> 24).astype(np.uint8)
    image = pillow.frombytes("RGB", (side, side), pixels.tobytes())
    for codec, options in _WARMING:
        if codec in pillow.SAVE:  # Pillow can be built without
            file = io.BytesIO()
            image.save(file, codec, **options)
            decode(file.getvalue(), (3, side, side), codec)


def find(path: Path) -> Parts:
    """The class folders at `path`, a folder or a .zip file (there also below train/ and test/)."""
    if path.is_dir():
        folders = [name for name in visible(path) if name.endswith("/")]
        return {"train": partial(_open_folder, path)} if folders else {}
    if path.suffix.lower() != ".zip":
        return {}
    tree = ZipTree.open(path)
    if not tree.names:
        raise DataError(f"{path} holds no files; expected <class>/<image>")
    splits = split_folders(sorted({name.partition("/")[0] + "/" for name in tree.names if "/" in name}))
    if splits:
        return {split: partial(_open_tree, tree.under(folder)) for split, folder in splits.items()}
    return {"train": partial(_open_tree, tree)}


def split_folders(folders: Sequence[str]) -> dict[Split, str]:
    """Which of the folders (names ending in "/") holds which split; {} unless all of them are named after splits."""
    found: dict[Split, str] = {}
    if not set(folders) <= {"train/", "test/", "val/"}:
        return found
    if "train/" in folders:
        found["train"] = "train/"
    if "test/" in folders or "val/" in folders:
        found["test"] = "test/" if "test/" in folders else "val/"
    return found


def decode(data: bytes, shape: tuple[int, ...], where: str) -> npt.NDArray[np.uint8]:
    """An image file -> `shape` (1 or 3, H, W), uint8; grey and colour are converted, transparency is dropped.

    Raises:
        DataError: no image that can be read, another size, or more than 8 bits a channel.
    """
    pillow = _pillow()
    try:
        with pillow.open(io.BytesIO(data), formats=_CODECS) as image:
            _check_image(image.size, image.mode, shape, where)
            # A palette's transparency is understood only by way of RGBA.
            plain = image.convert("RGBA") if image.mode in ("P", "PA") else image
            pixels = np.asarray(plain.convert(_MODES[shape[0]]), dtype=np.uint8)
    except DataError:
        raise
    except Exception as error:  # a decoder given hostile bytes may raise anything
        raise DataError(f"{where} is no readable image ({error}); replace or remove it") from error
    return pixels[None] if shape[0] == 1 else pixels.transpose(2, 0, 1)


def _check_image(size: tuple[int, int], mode: str, shape: tuple[int, ...], where: str) -> None:
    """Before any pixel is decoded, so that a huge image costs nothing."""
    if size != (shape[2], shape[1]):
        raise DataError(
            f"{where} is {size[0]}x{size[1]} pixels (width x height), the bundle takes {shape[2]}x{shape[1]}: "
            "resize the images, or export the network for their size"
        )
    if mode in _DEEP_MODES:
        raise DataError(f"{where} has more than 8 bits a channel (mode {mode}), expected 8: convert the image")


def _open_folder(path: Path, spec: InputSpec, task: TaskSpec, _: Path | None) -> Dataset:
    return _open_tree(FolderTree.open(path), spec, task)


def _open_tree(tree: Tree, spec: InputSpec, task: TaskSpec, _: Path | None = None) -> Dataset:
    if len(spec.shape) != 3 or spec.shape[0] not in _MODES:
        raise DataError(f"{tree.source} holds images, but the bundle takes {spec.shape}, expected (1 or 3, H, W)")
    _pillow()
    folders, positions, members = _classes(tree)
    classes = _class_order(folders, task, tree.source)
    ids = np.asarray([classes.index(folder) for folder in folders], dtype=np.int64)[members]
    return ImageDataset(tree.source, classes, class_labels(ids, task, tree.source), tree, positions, spec.shape)


def _classes(tree: Tree) -> tuple[list[str], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sorted class folders; the positions of the images, by name; the folder number of each image."""
    found: dict[str, list[int]] = {}
    for position in sorted(range(len(tree.names)), key=tree.names.__getitem__):
        name = tree.names[position]
        folder, slash, file = name.partition("/")
        images = found.setdefault(folder, []) if slash else []
        if file or not slash:
            _check_name(tree.source, name)
            images.append(position)
    empty = [folder for folder, images in found.items() if not images]
    if empty or not found:
        place = f"class folder {empty[0]!r}" if empty else "it"
        raise DataError(f"{tree.source}: {place} holds no images; add some or remove the folder")
    folders = sorted(found)
    counts = [len(found[folder]) for folder in folders]
    positions = np.concatenate([np.asarray(found[folder], dtype=np.int64) for folder in folders])
    return folders, positions, np.repeat(np.arange(len(folders)), counts)


def _check_name(source: str, name: str) -> None:
    if name.count("/") != 1 or PurePosixPath(name).suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{source}: found {name!r}, expected only <class>/<image> with an image of {', '.join(SUFFIXES)}: "
            "move it away or convert it"
        )


def _class_order(folders: list[str], task: TaskSpec, source: str) -> tuple[str, ...]:
    """Class names by id: those of the task if it has any, the folders otherwise."""
    unknown = sorted(set(folders) - set(task.class_names))
    if task.class_names and unknown:
        raise DataError(
            f"{source}: class folder {unknown[0]!r} is not among the classes of the bundle "
            f"({', '.join(task.class_names[:12])}): rename or remove it, or export with these class names"
        )
    if not task.class_names and len(folders) != task.classes:
        raise DataError(
            f"{source}: {len(folders)} class folders, the bundle has {task.classes} classes: add or remove folders, "
            f"or export with --classes {len(folders)}"
        )
    return task.class_names or tuple(folders)


def _pillow() -> ModuleType:
    try:
        from PIL import Image, WebPImagePlugin  # noqa: F401 - else the first such image loads the plugins of all formats
    except ImportError as error:
        raise UsageError("image files need Pillow, which is not installed: pip install pillow") from error
    return Image
