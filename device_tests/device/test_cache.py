"""Outputs of frozen blocks on disk: what is read is what the blocks put out, and neither way takes much memory."""

from __future__ import annotations

import os
import resource
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from device_tests.device.runs import RESIDUAL
from edgelocal.bundle.folder import open_bundle
from edgelocal.data.formats.base import Indices
from edgelocal.data.pipeline import batches
from edgelocal.errors import StorageError, UsageError
from edgelocal.machine.budget import PeakMeter
from edgelocal.runtime.tensor import HOST, Tensor
from edgelocal.training.blocks import load_blocks
from edgelocal.training.cache import OutputCache

MIB = 1 << 20
RNG = np.random.default_rng(4)
VALUES = RNG.normal(0, 1000, (20, 3, 4)).astype(np.float32)
ORDER = list(batches(20, 7, 0, 0, False))


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def block(shape: tuple[int, ...]) -> Any:
    """One that hands on what it is given, of this shape."""
    output = SimpleNamespace(resolve=lambda n: (n, *shape))
    return SimpleNamespace(
        index=0, place=HOST, forward=lambda h: h, spec=SimpleNamespace(forward=SimpleNamespace(outputs=[output]))
    )


def build(folder: Path, values: np.ndarray = VALUES, order: Any = ORDER, **options: Any) -> OutputCache:
    """The cache of a block that puts out `values`."""
    return OutputCache.build(
        folder, lambda indices: Tensor.of(values[indices]), [block(values.shape[1:])], order, **options
    )


def rows(cache: OutputCache, indices: np.ndarray) -> np.ndarray:
    """What the cache gives, copied while the tensor lives: its array may be a view."""
    found = cache.read(indices)
    return found.array().copy()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_come_back_in_any_order(tmp_path: Path, dtype: str) -> None:
    cache = build(tmp_path, dtype=dtype)
    expected = VALUES.astype(dtype).astype(np.float32)
    size = VALUES.size * np.dtype(dtype).itemsize
    assert (cache.written_bytes, cache.read_bytes) == (size, 0)
    assert [file.stat().st_size for file in tmp_path.iterdir()] == [size]
    for indices in (np.arange(20), RNG.permutation(20), np.asarray([19, 19, 0, 1, 2, 18]), np.asarray([], np.int64)):
        found = rows(cache, indices)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected[indices])
    assert cache.read_bytes == (20 + 20 + 6) * size // 20
    cache.close()
    assert list(tmp_path.iterdir()) == []


def test_batches_in_any_order_are_written_to_their_places(tmp_path: Path) -> None:
    cache = build(tmp_path, order=list(batches(20, 6, 3, 0, True)))
    np.testing.assert_array_equal(rows(cache, np.arange(20)), VALUES)
    cache.close()


def test_it_holds_what_the_blocks_of_a_bundle_put_out(tmp_path: Path) -> None:
    """Two caches, the second built from the first, against the blocks run one after the other."""
    blocks = load_blocks(open_bundle(RESIDUAL), 1, None)
    x = RNG.normal(size=(20, 1, 8, 8)).astype(np.float32)
    expected = []
    for indices in ORDER:
        h = Tensor.of(x[indices])
        for one in blocks[:2]:
            h = one.forward(h)
        expected.append(h.array().copy())
    first = OutputCache.build(tmp_path, lambda indices: Tensor.of(x[indices]), blocks[:1], ORDER)
    second = OutputCache.build(tmp_path, first.read, blocks[1:2], ORDER)
    assert (first.depth, second.depth) == (1, 2)
    assert first.read_bytes == first.written_bytes
    np.testing.assert_array_equal(rows(second, np.arange(20)), np.concatenate(expected))
    first.close()
    second.close()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_is_a_batch_in_each_direction(tmp_path: Path, dtype: str) -> None:
    """128 MiB of outputs, in batches of 4 MiB."""
    values = np.broadcast_to(RNG.normal(size=(1, 1 << 14)).astype(np.float32), (2048, 1 << 14))
    order = list(batches(2048, 64, 0, 0, False))
    read = RNG.permutation(2048)
    for traced in (True, False):
        tracemalloc.start() if traced else None
        with PeakMeter() as meter:
            cache = build(tmp_path, values, order, dtype=dtype)
            for first in range(0, 2048, 64):
                cache.read(read[first : first + 64])
        if traced:
            peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak_bytes < 3 * 4 * MIB
        else:
            assert meter.exact
            assert meter.growth_bytes < 24 * MIB
        cache.close()


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    values = VALUES.copy()
    values[8, 1, 1] = -70000.0
    with pytest.raises(UsageError, match=r"puts out 7e\+04, float16 holds at most 65504; keep the cache in float32"):
        build(tmp_path, values, dtype="float16")
    assert list(tmp_path.iterdir()) == []
    values[8, 1, 1], values[9, 0, 0] = np.nan, np.inf
    cache = build(tmp_path, values, dtype="float16")
    assert np.argwhere(~np.isfinite(rows(cache, np.arange(20)))).tolist() == [[8, 1, 1], [9, 0, 0]]
    cache.close()
    with pytest.raises(UsageError, match="a cache of int8 was asked for, expected one of float32, float16"):
        build(tmp_path, dtype="int8")


@pytest.mark.parametrize("ends", [[0, 7, 14], [5, 20]])
def test_stopped_on_the_way_no_file_stays(tmp_path: Path, ends: list[int]) -> None:
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    order = [
        np.arange(start, stop_at) for start, stop_at in zip([0, *ends], [*ends, 20], strict=True) if start < stop_at
    ]
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, order=order, after_batch=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_file_cut_short_is_an_error(tmp_path: Path) -> None:
    cache = build(tmp_path)
    (file,) = tmp_path.iterdir()
    os.truncate(file, file.stat().st_size // 20 * 11 + 5)
    assert cache.read(np.arange(11)).batch == 11
    with pytest.raises(StorageError, match=r"outputs-1 ends before sample 11; check the medium"):
        cache.read(np.arange(8, 14))
    with pytest.raises(StorageError, match=r"outputs-1 ends before sample 19"):
        cache.read(np.asarray([3, 19]))
    cache.close()


def test_a_full_disk_is_an_error_before_any_block_runs(tmp_path: Path) -> None:
    asked: list[Indices] = []

    def inputs(indices: Indices) -> Tensor:
        asked.append(indices)
        return Tensor.of(VALUES[indices])

    message = rf"no room for a cache of {VALUES.nbytes} bytes \(File too large\); free space"
    with file_limit(VALUES.nbytes - 1), pytest.raises(StorageError, match=message):
        OutputCache.build(tmp_path, inputs, [block(VALUES.shape[1:])], ORDER)
    assert asked == []
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_while_rows_are_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "edgelocal.training.cache.reserve", lambda descriptor, size: None
    )  # a file system that only promises
    message = r"outputs-1: File too large \(writing the cache"
    with file_limit(VALUES.nbytes // 2), pytest.raises(StorageError, match=message):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    for name in ("outputs-1", "outputs-12", "mine"):
        (tmp_path / name).write_bytes(b"x")
    OutputCache.clear(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    OutputCache.clear(tmp_path / "missing")
