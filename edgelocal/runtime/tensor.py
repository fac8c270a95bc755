"""Tensors that graphs read and write, and the places where they lie: the host's memory, or that of a device.

A graph is run on memory of ours, bound by name; on a device nothing comes back to the host but what is asked for.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgelocal.errors import OverBudgetError
from edgelocal.runtime.library import OOM_ADVICE, runtime, translated
from edgelocal.storage.tensors import Array


class Tensor:
    """A numpy array, C-contiguous, and the same memory as the runtime sees it."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self._value = runtime().OrtValue.ortvalue_from_numpy(array)

    @classmethod
    def of(cls, array: Array) -> Tensor:
        """The array itself where it is contiguous, else a copy."""
        return cls(np.ascontiguousarray(array).reshape(array.shape))

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Memory for a result.

        Raises:
            OverBudgetError: the system has none.
        """
        try:
            return cls(np.empty(shape, dtype=dtype))
        except MemoryError as error:
            raise OverBudgetError(f"out of memory ({error}){OOM_ADVICE}") from None

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes."""
        return tuple(self._array.shape)

    @property
    def dtype(self) -> str:
        """As numpy calls it."""
        return str(self._array.dtype)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self._array.nbytes

    @property
    def batch(self) -> int:
        """The first dimension."""
        return int(self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        """Samples start .. stop - 1, in the same memory."""
        return Tensor(self._array[start:stop])

    def array(self) -> Array:
        """The values; on the host the same memory."""
        return self._array

    def item(self) -> float:
        """The value of a () tensor."""
        return float(self.array())

    def bind_input(self, binding: Any, name: str) -> None:
        """Let a run read it as its input `name`."""
        binding.bind_ortvalue_input(name, self._value)

    def bind_output(self, binding: Any, name: str) -> None:
        """Let a run write its output `name` there."""
        binding.bind_ortvalue_output(name, self._value)


class DeviceTensor(Tensor):
    """Memory of a device, or a part of it: `owner` has the memory, `offset` is in bytes.

    Raises:
        OverBudgetError: the device has none.
    """

    def __init__(self, device: str, shape: tuple[int, ...], dtype: str, owner: Any = None, offset: int = 0) -> None:
        self._device, self._shape, self._dtype, self._offset = device, shape, dtype, offset
        if owner is None:
            try:
                owner = runtime().OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, device, 0)
            except Exception as error:
                raise translated(error, f"memory of the device for {dtype} {list(shape)}") from error
        self._owner = owner

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes."""
        return self._shape

    @property
    def dtype(self) -> str:
        """As numpy calls it."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self._shape) * np.dtype(self._dtype).itemsize

    def rows(self, start: int, stop: int) -> Tensor:
        """Samples start .. stop - 1, in the same memory."""
        row = self.nbytes // max(self.batch, 1)
        shape = (stop - start, *self._shape[1:])
        return DeviceTensor(self._device, shape, self._dtype, self._owner, self._offset + start * row)

    def fill(self, array: Array) -> None:
        """Bring values up; the whole tensor only."""
        self._owner.update_inplace(np.ascontiguousarray(array).reshape(array.shape))

    def array(self) -> Array:
        """A copy of the values on the host."""
        values: Array = self._owner.numpy().reshape(-1).view(np.uint8)
        return values[self._offset : self._offset + self.nbytes].view(self._dtype).reshape(self._shape)

    def bind_input(self, binding: Any, name: str) -> None:
        """Let a run read it as its input `name`."""
        binding.bind_input(name, *self._place())

    def bind_output(self, binding: Any, name: str) -> None:
        """Let a run write its output `name` there."""
        binding.bind_output(name, *self._place())

    def _place(self) -> tuple[str, int, Any, list[int], int]:
        address = self._owner.data_ptr() + self._offset
        return self._device, 0, np.dtype(self._dtype).type, list(self._shape), address


class Place:
    """Where tensors lie: on the host, or, by its name in the runtime, on a `device`."""

    def __init__(self, device: str | None = None) -> None:
        self.device = device

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Memory for a result.

        Raises:
            OverBudgetError: there is none.
        """
        return Tensor.empty(shape, dtype) if self.device is None else DeviceTensor(self.device, shape, dtype)

    def turn(self) -> None:
        """Another batch begins; of interest where memory is used again (uploads.py)."""

    def of(self, array: Array) -> Tensor:
        """The values there; on the host the array itself where it is contiguous.

        Raises:
            OverBudgetError: there is no memory.
        """
        if self.device is None:
            return Tensor.of(array)
        tensor = DeviceTensor(self.device, array.shape, array.dtype.name)
        tensor.fill(array)
        return tensor

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Zeros there.

        Raises:
            OverBudgetError: there is no memory.
        """
        return self.of(np.zeros(shape, dtype))


HOST = Place()
