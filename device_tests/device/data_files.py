"""Small data sets and the files that hold them, written without the code under test."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelocal.bundle.spec import InputSpec, TaskSpec

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
