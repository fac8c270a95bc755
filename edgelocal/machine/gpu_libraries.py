"""The little that edgelocal asks of NVIDIA's own libraries, by ctypes: CUDA's runtime, and NVML where it is.

`load` is what opens a library by name, so that a test can give its own. Structures and numbers are those of
cuda_runtime_api.h and nvml.h, the same in CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgelocal.errors import RuntimeMissingError

Load = Callable[[str], Any]

RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")
NVML = "libnvidia-ml.so.1"
_INTEGRATED = 18  # cudaDevAttrIntegrated: the GPU works in the memory of the CPU
_MAJOR, _MINOR = 75, 76  # cudaDevAttrComputeCapabilityMajor and -Minor
_BUS_ID_BYTES = 32
_TOO_SMALL = 7  # NVML_ERROR_INSUFFICIENT_SIZE
_NOT_AVAILABLE = (1 << 64) - 1


class LibraryError(RuntimeMissingError):
    """A library is not there, or answered with an error."""


@dataclass(frozen=True)
class DeviceMemory:
    """Of the device, all processes together, in bytes."""

    free: int
    total: int


class CudaRuntime:
    """CUDA's runtime library, for the process's first device (which CUDA_VISIBLE_DEVICES chooses).

    Raises:
        LibraryError: none can be loaded; any method: CUDA answered with an error.
    """

    def __init__(self, load: Load = ctypes.CDLL) -> None:
        self._library = cuda_library(load)

    def memory(self) -> DeviceMemory:
        """cudaMemGetInfo; makes the process's context if there is none yet."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return DeviceMemory(free.value, total.value)

    def bus_id(self) -> str:
        """Where the device is, as NVML names it too: "0000:19:00.0". Needs no context."""
        text = ctypes.create_string_buffer(_BUS_ID_BYTES)
        self._call("cudaDeviceGetPCIBusId", text, ctypes.c_int(_BUS_ID_BYTES), ctypes.c_int(0))
        return text.value.decode("ascii", "replace")

    def shares_memory(self) -> bool:
        """Whether the device has no memory of its own, as on a Jetson. Needs no context."""
        return self._attribute(_INTEGRATED) != 0

    def capability(self) -> int:
        """Compute capability, 87 for 8.7. Needs no context."""
        return 10 * self._attribute(_MAJOR) + self._attribute(_MINOR)

    def allocate(self, size_bytes: int) -> int:
        """Address of new memory on the device."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        return address.value or 0

    def free(self, address: int) -> None:
        """Give back what `allocate` gave."""
        self._call("cudaFree", ctypes.c_void_p(address))

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._call("cudaDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), ctypes.c_int(0))
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise LibraryError(f"CUDA does not answer ({name} gave error {code}); see `edgelocal doctor`")


class _Process(ctypes.Structure):
    """nvmlProcessInfo_v2_t, which the functions _v2 and _v3 fill."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """NVML's view of one device.

    Raises:
        LibraryError: it is not there or does not know the device; any method: it does not know that of this device.
    """

    def __init__(self, bus_id: str, load: Load = ctypes.CDLL) -> None:
        self._library = _first(load, (NVML,))
        self._call("nvmlInit_v2")
        self._device = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByPciBusId_v2", bus_id.encode(), ctypes.byref(self._device))

    def used_bytes(self) -> int:
        """Of the device, all processes and the driver together."""
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", self._device, ctypes.byref(memory))
        return int(memory.used)

    def processes(self) -> dict[int, int]:
        """Process number -> bytes, of those whose memory NVML knows. In a container the numbers are the host's."""
        room = 16
        while True:
            count, rows = ctypes.c_uint(room), (_Process * room)()
            code = self._processes(ctypes.byref(count), rows)
            if code == 0:
                return {row.pid: row.used for row in rows[: count.value] if row.used != _NOT_AVAILABLE}
            if code != _TOO_SMALL or room > 1 << 16:
                raise LibraryError(f"NVML does not list the processes of the device (error {code})")
            room = max(2 * room, count.value)

    def _processes(self, count: Any, rows: Any) -> int:
        for name in ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2"):
            function = getattr(self._library, name, None)  # drivers before 510 have only the second
            if function is not None:
                return int(function(self._device, count, rows))
        raise LibraryError("this NVML is too old to list processes")

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name, None)
        code = -1 if function is None else function(*arguments)
        if code != 0:
            raise LibraryError(f"NVML does not answer ({name} gave error {code})")


def cuda_library(load: Load = ctypes.CDLL) -> Any:
    """CUDA's runtime library, by its C names: the one that this process has loaded already (a second one of another
    version would be a stranger to it), else the newest.

    Raises:
        LibraryError: none can be loaded.
    """
    return _first(load, loaded_first(RUNTIMES) if load is ctypes.CDLL else RUNTIMES)


def loaded_first(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, those of libraries that this process has loaded before the others."""
    return tuple(sorted(names, key=lambda name: not _is_loaded(name)))


def _is_loaded(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


def _first(load: Load, names: tuple[str, ...]) -> Any:
    """The first of the libraries that can be loaded."""
    for name in names:
        try:
            return load(name)
        except OSError:
            continue
    raise LibraryError(f"none of {', '.join(names)} can be loaded; see `edgelocal doctor`")
