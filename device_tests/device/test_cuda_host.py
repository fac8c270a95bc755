"""What is asked of CUDA by ctypes, of libraries that answer as CUDA would."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgelocal.errors import OverBudgetError
from edgelocal.runtime.cuda_host import gpu_name, pinned


class Cuda:
    """Both libraries: host memory is numpy's, and the GPU has a name."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.taken: dict[int, np.ndarray] = {}
        self.freed: list[int] = []

    def cudaHostAlloc(self, address: Any, size: ctypes.c_size_t, flags: int) -> int:  # noqa: N802
        memory = np.empty(size.value, np.uint8)
        self.taken[memory.ctypes.data] = memory
        ctypes.cast(address, ctypes.POINTER(ctypes.c_void_p))[0] = memory.ctypes.data
        return self.code

    def cudaFreeHost(self, address: ctypes.c_void_p) -> int:  # noqa: N802
        self.freed.append(address.value or 0)
        return 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.code

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = b"NVIDIA Test 1000"
        return 0


def loading(library: Cuda, *missing: str) -> Callable[[str], Any]:
    def load(name: str) -> Cuda:
        if name in missing:
            raise OSError(name)
        return library

    return load


@pytest.mark.parametrize(("shape", "dtype"), [((3, 4), "float32"), ((), "int64"), ((0, 5), "float32"), ((7,), "bool")])
def test_pinned_memory_is_an_array_and_is_freed_with_it(shape: tuple[int, ...], dtype: str) -> None:
    cuda = Cuda()
    array = pinned(shape, dtype, loading(cuda))
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    array[...] = np.ones(shape, dtype)
    (memory,) = cuda.taken.values()
    assert memory[: array.nbytes].tobytes() == np.ones(shape, dtype).tobytes()
    view = array.reshape(-1)
    del array
    gc.collect()
    assert not cuda.freed  # a view of it lives
    del view
    gc.collect()
    assert cuda.freed == list(cuda.taken)


def test_no_pinned_memory_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(OverBudgetError, match=r"no 48 bytes of pinned .*CUDA error 2.* then states wait on disk"):
        pinned((3, 4), "float32", loading(Cuda(code=2)))


def test_the_gpu_s_name_or_none() -> None:
    assert gpu_name(loading(Cuda())) == "NVIDIA Test 1000"
    assert gpu_name(loading(Cuda(code=1))) == "CUDA device 0"
    assert gpu_name(loading(Cuda(), "libcuda.so.1")) == "CUDA device 0"
