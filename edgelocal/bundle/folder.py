"""A bundle on disk -> verified bytes. The bytes that were checked are the bytes that are used.

Every file is read once, its size compared with the manifest before reading and its sha256 after; nothing outside the
folder and nothing that the manifest does not name is opened, and links are refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from edgelocal.bundle.manifest import MAX_MANIFEST_BYTES, parse_manifest
from edgelocal.bundle.onnx_scan import scan
from edgelocal.bundle.spec import BlockSpec, FileSpec, Manifest, graphs_of
from edgelocal.errors import BundleError
from edgelocal.storage.disk import NotRegularError, open_regular, reason
from edgelocal.storage.tensors import Array, TensorFormatError, decode

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
        for parent in path.parents[: len(Path(name).parents) - 1]:
            if _is_link(parent):
                raise BundleError(f"{parent} is a link; a bundle holds plain files and folders, no links")
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
        BundleError: no bundle there, or one that cannot be read, is damaged or too new.
    """
    path = folder / MANIFEST
    try:
        folder.stat()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        found = f"is not a bundle: it has no {MANIFEST}" if os.path.lexists(folder) else "does not exist"
        raise BundleError(f"{folder} {found}; `edgelocal export` writes bundles") from None
    except OSError as error:
        raise BundleError(f"{folder} cannot be read: {reason(error)}; check path and permissions") from error
    data = _read(path, MAX_MANIFEST_BYTES)
    return Bundle(folder, parse_manifest(data), hashlib.sha256(data).hexdigest())


def verify(bundle: Bundle) -> tuple[str, ...]:
    """Check every file of the bundle, and that there are no others; return their names.

    Raises:
        BundleError: the first file that is missing, extra, not as described, or a graph with what no graph may hold.
    """
    names = tuple(sorted(bundle.manifest.files))
    graphs = {graph.file for graph in graphs_of(bundle.manifest)}
    training = {b.ort_training.training.file for b in bundle.manifest.blocks if b.ort_training}
    for name in names:
        data = bundle.read(name)
        if name in graphs:
            scan(data, name, training=name in training)
    for block in bundle.manifest.blocks:
        bundle.weights(block)
    extra = sorted(set(_present(bundle.folder)) - set(names) - {MANIFEST})
    if extra:
        raise BundleError(
            f"{bundle.folder} holds files that {MANIFEST} does not list: {', '.join(extra[:5])}; remove them"
        )
    return names


def _present(folder: Path) -> Iterator[str]:
    """Everything below `folder` but folders, by relative path; links are not followed."""

    def refuse(error: OSError) -> NoReturn:
        raise BundleError(f"{error.filename} cannot be listed: {reason(error)}; check permissions") from error

    for root, folders, files in os.walk(folder, onerror=refuse):
        for path in (*files, *(name for name in folders if _is_link(Path(root, name)))):
            yield Path(root, path).relative_to(folder).as_posix()


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except OSError:  # what cannot be looked at cannot be read either, which says why
        return False


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
        with os.fdopen(open_regular(path), "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size if exact else found > size:
                raise BundleError(
                    f"{path} has {found} bytes, expected {'' if exact else 'at most '}{size}; copy the bundle again"
                )
            return file.read(size)
    except FileNotFoundError:
        raise BundleError(f"{path} is missing; copy the bundle again") from None
    except NotRegularError as error:
        raise BundleError(f"{path}: {reason(error)}; a bundle holds plain files and folders, no links") from None
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read: {reason(error)}; check permissions, or copy the bundle again"
        ) from error
