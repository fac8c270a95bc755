"""Memory that batches go up into: two sets in turn, nothing allocated for a batch that fits."""

from __future__ import annotations

import numpy as np
import pytest

from edgelocal.runtime.tensor import HOST, DeviceTensor, Place, Tensor
from edgelocal.runtime.uploads import Uploads


def batch(number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples and labels of equal shape and type, so that only their order tells which is which."""
    x = np.full((size, 3), number, np.float32) + np.arange(size, dtype=np.float32)[:, None] / 100
    return x, -x


def taken(uploads: Uploads, number: int, size: int) -> tuple[Tensor, Tensor]:
    uploads.turn()
    x, y = batch(number, size)
    return uploads.of(x), uploads.of(y)


def test_a_batch_stays_until_the_one_after_the_next() -> None:
    uploads = Uploads(Place("cpu"))
    sizes = [4, 4, 2, 4, 3]
    before: tuple[Tensor, Tensor] | None = None
    for number, size in enumerate(sizes):
        found = taken(uploads, number, size)
        for tensor, expected in zip(found, batch(number, size), strict=True):
            np.testing.assert_array_equal(tensor.array(), expected)
        if before is not None:  # the one before is in use still
            for tensor, expected in zip(before, batch(number - 1, sizes[number - 1]), strict=True):
                np.testing.assert_array_equal(tensor.array(), expected)
        before = found


def test_memory_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plain = DeviceTensor.__init__

    def noted(self: DeviceTensor, device: str, shape: tuple[int, ...], dtype: str, *more: object) -> None:
        if not more:  # not rows of another
            made.append(shape)
        plain(self, device, shape, dtype, *more)

    monkeypatch.setattr(DeviceTensor, "__init__", noted)
    uploads = Uploads(Place("cpu"))
    for number, size in enumerate([4, 4, 4, 4, 2, 1, 4]):
        taken(uploads, number, size)
    assert made == [(4, 3)] * 4  # x and y, twice
    taken(uploads, 8, 5)
    assert made[4:] == [(5, 3)] * 2  # larger than before


def test_other_kinds_of_arrays_get_memory_of_their_own() -> None:
    uploads = Uploads(Place("cpu"))
    for array in (np.arange(6.0, dtype=np.float32).reshape(2, 3), np.arange(4), np.array([[True]]), np.float32(3.0)):
        for _ in range(3):
            uploads.turn()
            found = uploads.of(np.asarray(array))
            assert (found.shape, found.dtype) == (np.shape(array), np.asarray(array).dtype.name)
            np.testing.assert_array_equal(found.array(), array)


def test_on_the_host_the_array_itself_is_the_tensor() -> None:
    uploads = Uploads(HOST)
    array = np.ones((2, 3), np.float32)
    uploads.turn()
    assert uploads.of(array).array() is array or np.shares_memory(uploads.of(array).array(), array)
