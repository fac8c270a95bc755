"""A bundle's bytes are what the manifest says, or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from device_tests.device.runs import DROPOUT, RESIDUAL, copy_bundle, put
from edgelocal.bundle.folder import open_bundle, verify
from edgelocal.errors import BundleError
from edgelocal.storage.tensors import decode, encode

WEIGHTS = "blocks/00/weights.safetensors"


@pytest.mark.parametrize("folder", [RESIDUAL, DROPOUT])
def test_golden_bundles_stay_readable(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert set(verify(bundle)) == set(bundle.manifest.files)
    for block in bundle.manifest.blocks:
        assert {t.name for t in block.state() if t.kind != "opt"} == set(bundle.weights(block))


def test_every_flipped_bit_of_a_file_is_found(tmp_path: Path) -> None:
    bundle = open_bundle(copy_bundle(DROPOUT, tmp_path / "b"))
    name = min(bundle.manifest.files, key=lambda n: bundle.manifest.files[n].size)
    path = bundle.folder / name
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for bit in range(8 * len(whole)):
            at = bit // 8
            os.pwrite(file.fileno(), bytes([whole[at] ^ 1 << bit % 8]), at)
            with pytest.raises(BundleError, match="is damaged"):
                bundle.read(name)
            os.pwrite(file.fileno(), whole[at : at + 1], at)
    assert bundle.read(name) == whole


def test_a_flipped_bit_anywhere_in_a_large_file_is_found(tmp_path: Path) -> None:
    bundle = open_bundle(copy_bundle(RESIDUAL, tmp_path / "b"))
    path = bundle.folder / "blocks/00/step.onnx"
    whole = path.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(whole), 300):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << int(bit % 8)
        path.write_bytes(damaged)
        with pytest.raises(BundleError, match="is damaged"):
            bundle.read("blocks/00/step.onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "bytes, expected"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "bytes, expected"),
        (lambda p: p.unlink(), "is missing"),
        (lambda p: (p.rename(p.with_suffix(".real")), p.symlink_to(p.with_suffix(".real"))), "no links"),
        (lambda p: (p.unlink(), p.mkdir()), "not a regular file"),
        (lambda p: (p.unlink(), os.mkfifo(p)), "not a regular file"),
        (lambda p: (p.parent.rename(p.parents[2] / "x"), p.parent.symlink_to(p.parents[2] / "x")), "00 is a link"),
        (lambda p: (p.parents[1] / "02" / "more").symlink_to(p.parent), "does not list: blocks/02/more"),
    ],
)
def test_truncated_extended_missing_linked_or_odd_files_are_refused(
    tmp_path: Path, change: object, message: str
) -> None:
    bundle = open_bundle(copy_bundle(RESIDUAL, tmp_path / "b"))
    assert callable(change)
    change(bundle.folder / WEIGHTS)
    with pytest.raises(BundleError, match=message):
        verify(bundle)


def test_extra_files_are_found_and_unlisted_ones_never_read(tmp_path: Path) -> None:
    bundle = open_bundle(copy_bundle(RESIDUAL, tmp_path / "b"))
    (bundle.folder / "blocks" / "extra.bin").write_bytes(b"?")
    with pytest.raises(BundleError, match=r"does not list: blocks/extra\.bin"):
        verify(bundle)
    with pytest.raises(BundleError, match="not listed"):
        bundle.read("blocks/extra.bin")


@pytest.mark.parametrize("shape", [(3,), (5, 1, 3, 3)])
def test_weights_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = copy_bundle(RESIDUAL, tmp_path / "b")
    tensors = dict(decode((folder / WEIGHTS).read_bytes())[0])
    name = next(n for n in tensors if n.endswith("conv1.weight"))
    tensors[name] = np.zeros(shape, dtype=np.float32)
    put(folder, WEIGHTS, b"".join(encode(tensors)))
    bundle = open_bundle(folder)
    with pytest.raises(BundleError, match=r"conv1\.weight should be float32\[4, 1, 3, 3\]"):
        bundle.weights(bundle.manifest.blocks[0])


def test_malformed_weights_are_refused(tmp_path: Path) -> None:
    folder = copy_bundle(RESIDUAL, tmp_path / "b")
    put(folder, WEIGHTS, b"\xff" * 64)
    bundle = open_bundle(folder)
    with pytest.raises(BundleError, match=r"weights\.safetensors"):
        bundle.weights(bundle.manifest.blocks[0])


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(tmp_path)


def test_a_newer_schema_asks_for_an_upgrade(tmp_path: Path) -> None:
    folder = copy_bundle(RESIDUAL, tmp_path / "b", lambda m: m.update(schema=5))
    with pytest.raises(BundleError, match=r"schema 5.*upgrade edgelocal"):
        open_bundle(folder)


def test_the_digest_names_every_file(tmp_path: Path) -> None:
    folder = copy_bundle(RESIDUAL, tmp_path / "b")
    before = open_bundle(folder).digest
    put(folder, WEIGHTS, b"other")
    assert open_bundle(folder).digest != before
    assert json.loads((folder / "manifest.json").read_bytes())["files"][WEIGHTS]["size"] == 5
