"""A bundle on disk -> verified bytes. The bytes that were checked are the bytes that are used.

Every file is read once, its size compared with the manifest before reading and its sha256 after; nothing outside the
folder and nothing that the manifest does not name is opened, and links are refused.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from edgelocal.errors import BundleError
from edgelocal.manifest import MAX_MANIFEST_BYTES, parse_manifest
from edgelocal.spec import BlockSpec, FileSpec, Manifest
from edgelocal.tensors import Array, TensorFormatError, decode

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `digest` is the sha256 of its manifest, which names every other file's."""

    folder: Path
    manifest: Manifest
    digest: str

    def read(self, name: str) -> bytes:
        """The verified bytes of a file.

        Raises:
            BundleError: the file is missing, is a link, or is not the one the manifest describes.
        """
        expected = self.manifest.files.get(name)
        if expected is None:
            raise BundleError(f"{self.folder}: {name} is not listed in {MANIFEST}")
        path = self.folder / name
        linked = [p for p in path.parents if p.is_relative_to(self.folder) and p != self.folder and p.is_symlink()]
        if linked:
            raise BundleError(f"{linked[0]} is a link; a bundle holds plain files and folders, no links")
        return _checked(path, expected)

    def weights(self, block: BlockSpec) -> dict[str, Array]:
        """Initial parameters and buffers of a block by their graph input names, read-only views.

        Raises:
            BundleError: as `read`, or a tensor is missing or has another shape or dtype than the manifest says.
        """
        try:
            tensors, _ = decode(self.read(block.weights))
        except TensorFormatError as error:
            raise BundleError(f"{self.folder / block.weights}: {error}; export the bundle again") from None
        for spec in block.state():
            if spec.kind == "opt":
                continue
            found = tensors.get(spec.name)
            if found is None or found.shape != spec.shape or found.dtype.name != spec.dtype:
                has = "nothing" if found is None else f"{found.dtype.name}{list(found.shape)}"
                raise BundleError(
                    f"{self.folder / block.weights}: {spec.name} should be {spec.dtype}{list(spec.shape)}, found "
                    f"{has}; export the bundle again"
                )
        return tensors


def open_bundle(folder: Path) -> Bundle:
    """Read and check the manifest of a bundle; the other files are checked when they are read.

    Raises:
        BundleError: no bundle there, or one that is damaged or too new.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise BundleError(f"{folder} does not exist; `edgelocal export` writes bundles")
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; `edgelocal export` writes one")
    data = _read(path, MAX_MANIFEST_BYTES)
    return Bundle(folder, parse_manifest(data), hashlib.sha256(data).hexdigest())


def verify(bundle: Bundle) -> tuple[str, ...]:
    """Check every file of the bundle, and that there are no others; return their names.

    Raises:
        BundleError: the first file that is missing, extra or not as described.
    """
    names = tuple(sorted(bundle.manifest.files))
    for name in names:
        bundle.read(name)
    for block in bundle.manifest.blocks:
        bundle.weights(block)
    present = {
        p.relative_to(bundle.folder).as_posix() for p in bundle.folder.rglob("*") if p.is_symlink() or not p.is_dir()
    }
    extra = sorted(present - set(names) - {MANIFEST})
    if extra:
        raise BundleError(
            f"{bundle.folder} holds files that {MANIFEST} does not list: {', '.join(extra[:5])}; remove them"
        )
    return names


def _checked(path: Path, expected: FileSpec) -> bytes:
    data = _read(path, expected.size, exact=True)
    found = hashlib.sha256(data).hexdigest()
    if found != expected.sha256:
        raise BundleError(
            f"{path} is damaged: its sha256 is {found[:12]}..., {MANIFEST} says {expected.sha256[:12]}...; "
            "copy the bundle again"
        )
    return data


def _read(path: Path, size: int, exact: bool = False) -> bytes:
    """At most `size` bytes of a regular file (exactly, if `exact`)."""
    try:
        # Without O_NONBLOCK opening a pipe waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BundleError(f"{path} is missing; copy the bundle again") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be opened ({error.strerror}); a bundle holds plain files, no links") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise BundleError(f"{path} is not a regular file; copy the bundle again")
    with os.fdopen(descriptor, "rb") as file:
        wrong = status.st_size != size if exact else status.st_size > size
        if wrong:
            raise BundleError(
                f"{path} has {status.st_size} bytes, expected {'' if exact else 'at most '}{size}; "
                "copy the bundle again"
            )
        return file.read(size)
