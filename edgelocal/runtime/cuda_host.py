"""What is asked of CUDA itself, by ctypes: that needs no package, and no NVML, which a Jetson may not have."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from edgelocal.errors import OverBudgetError, RuntimeMissingError
from edgelocal.machine.device import describe
from edgelocal.machine.doctor import advice
from edgelocal.storage.tensors import Array

_RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")
_DRIVER = "libcuda.so.1"
_INTEGRATED = 18  # cudaDevAttrIntegrated: the GPU works in the host's memory
_LONGEST_NAME = 256

Load = Callable[[str], Any]


def cuda_runtime(load: Load = ctypes.CDLL) -> Any:
    """CUDA's runtime library, by its C names.

    Raises:
        RuntimeMissingError: none can be loaded.
    """
    for name in _RUNTIMES:
        try:
            return load(name)
        except OSError:
            continue
    raise RuntimeMissingError(f"none of {', '.join(_RUNTIMES)} can be loaded: {advice(describe())}")


def is_integrated(load: Load = ctypes.CDLL) -> bool:
    """Whether the GPU works in the host's memory, as a Jetson's does.

    Raises:
        RuntimeMissingError: CUDA cannot be loaded, or has no device.
    """
    found = ctypes.c_int()
    code = cuda_runtime(load).cudaDeviceGetAttribute(ctypes.byref(found), _INTEGRATED, 0)
    if code != 0:
        raise RuntimeMissingError(f"CUDA finds no GPU (error {code}): `edgelocal doctor` says what is missing")
    return bool(found.value)


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
    library, address = cuda_runtime(load), ctypes.c_void_p()
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
