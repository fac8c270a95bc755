"""Memory of a device for what comes from the host batch after batch: two sets of tensors that are written over in turn.

One set is in use while the other is filled, and nothing is allocated for it while a graph runs: what lies between the
values of a run would spoil their places in the arena.
"""

from __future__ import annotations

import numpy as np

from edgelocal.runtime.tensor import DeviceTensor, Place, Tensor
from edgelocal.storage.tensors import Array

_SETS = 2


class Uploads(Place):
    """The place `place`, where tensors made of arrays are only good until the turn after the next begins. On the host
    it is `place` itself."""

    def __init__(self, place: Place) -> None:
        super().__init__(place.device)
        self._sets: list[list[DeviceTensor]] = [[] for _ in range(_SETS)]
        self._turn = self._used = 0

    def turn(self) -> None:
        """Begin the next batch."""
        self._turn, self._used = (self._turn + 1) % _SETS, 0

    def of(self, array: Array) -> Tensor:
        """The values there, in memory of this turn; it is made larger where they do not fit.

        Raises:
            OverBudgetError: there is no memory.
        """
        if self.device is None:
            return super().of(array)
        tensors, number = self._sets[self._turn], self._used
        self._used += 1
        if number == len(tensors) or not _fits(array, tensors[number]):
            for each in self._sets:  # all now: when the other set is filled, a graph runs
                if len(each) == number or each is tensors:
                    del each[number:]
                    each.append(DeviceTensor(self.device, array.shape, array.dtype.name))
        tensor = tensors[number]
        tensor.fill(_padded(array, tensor.shape))
        return tensor if tensor.shape == array.shape else tensor.rows(0, len(array))

    def clear(self) -> None:
        """Give the memory back."""
        self._sets = [[] for _ in range(_SETS)]


def _fits(array: Array, tensor: Tensor) -> bool:
    """Whether the array is that tensor, or its first rows."""
    alike = array.dtype.name == tensor.dtype and array.shape[1:] == tensor.shape[1:]
    return alike and len(array.shape) == len(tensor.shape) and array.shape[:1] <= tensor.shape[:1]


def _padded(array: Array, shape: tuple[int, ...]) -> Array:
    """The array with rows of zeros up to this shape: memory is filled as a whole."""
    if array.shape == shape:
        return array
    whole = np.zeros(shape, array.dtype)
    whole[: len(array)] = array
    return whole
