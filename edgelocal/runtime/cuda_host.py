"""What is asked of CUDA itself, by ctypes: that needs no package, and no NVML, which a Jetson may not have."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable

import numpy as np

from edgelocal.errors import OverBudgetError
from edgelocal.machine.gpu_libraries import Load, cuda_library
from edgelocal.storage.tensors import Array

_DRIVER = "libcuda.so.1"
_LONGEST_NAME = 256


def gpu_name(load: Load = ctypes.CDLL) -> str:
    """The name of the GPU that CUDA calls the first; "CUDA device 0" where the driver does not tell."""
    name = ctypes.create_string_buffer(_LONGEST_NAME)
    device = ctypes.c_int()
    try:
        driver = load(_DRIVER)
    except OSError:
        return "CUDA device 0"
    steps: tuple[Callable[[], int], ...] = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDeviceGetName(name, _LONGEST_NAME, device),
    )
    return "CUDA device 0" if any(step() != 0 for step in steps) else name.value.decode(errors="replace")


def pinned(shape: tuple[int, ...], dtype: str, load: Load = ctypes.CDLL) -> Array:
    """Memory of the host that the system never moves or swaps, so that the GPU copies from and to it at full speed. It
    is freed with the array.

    Raises:
        OverBudgetError: the system has none.
    """
    size = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
    library, address = cuda_library(load), ctypes.c_void_p()
    code = library.cudaHostAlloc(ctypes.byref(address), ctypes.c_size_t(size), 0)
    if code != 0 or not address.value:
        raise OverBudgetError(
            f"no {size} bytes of pinned memory for a state that waits on the host (CUDA error {code}): lower "
            "--memory-budget, then states wait on disk"
        )
    memory = (ctypes.c_uint8 * size).from_address(address.value)
    weakref.finalize(memory, library.cudaFreeHost, ctypes.c_void_p(address.value))
    values: Array = np.frombuffer(memoryview(memory), np.dtype(dtype), math.prod(shape))
    return values.reshape(shape)
