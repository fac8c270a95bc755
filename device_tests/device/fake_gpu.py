"""NVIDIA's libraries in memory, called as ctypes calls the real ones."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edgelocal.machine.gpu_libraries import NVML, RUNTIMES

MIB = 1 << 20
CONTEXT = 300 * MIB
NOT_AVAILABLE = (1 << 64) - 1


def _set(pointer: Any, kind: Any, value: int) -> None:
    ctypes.cast(pointer, ctypes.POINTER(kind))[0] = value


@dataclass
class FakeGpu:
    """A device. `listed_as`: this process's number for NVML, None where it does not list it; `codes`: functions that
    fail, and with what."""

    total: int = 80 << 30
    others: dict[int, int] = field(default_factory=dict)
    listed_as: int | None = 4242
    integrated: bool = False
    without: tuple[str, ...] = ()
    codes: dict[str, int] = field(default_factory=dict)
    known: bool = True  # whether NVML knows memory
    own: int = 0  # what this process holds, its context included
    device_used: int | None = None  # as NVML says; None: what all hold together
    listings: int = 0

    def load(self, name: str) -> Any:
        if name not in (RUNTIMES[-1], NVML) or name in self.without:
            raise OSError(f"{name}: cannot open shared object file")
        return Library(self, Cudart if name == RUNTIMES[-1] else NvmlLibrary)

    def context(self) -> None:
        self.own = max(self.own, CONTEXT)

    @property
    def used(self) -> int:
        return self.own + sum(self.others.values())


class Library:
    """Functions by name; one without such a name has no such attribute."""

    def __init__(self, gpu: FakeGpu, functions: Any) -> None:
        self._gpu, self._functions = gpu, functions

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name in self._gpu.without:
            raise AttributeError(name)
        function = getattr(self._functions, name)

        def call(*arguments: Any) -> int:
            code = self._gpu.codes.get(name)
            return int(function(self._gpu, *arguments)) if code is None else code

        return call


class Cudart:
    """As of libcudart."""

    def cudaMemGetInfo(gpu: FakeGpu, free: Any, total: Any) -> int:  # noqa: N802, N805
        gpu.context()
        _set(free, ctypes.c_size_t, gpu.total - gpu.used)
        _set(total, ctypes.c_size_t, gpu.total)
        return 0

    def cudaDeviceGetPCIBusId(gpu: FakeGpu, text: Any, room: Any, device: Any) -> int:  # noqa: N802, N805
        assert (room.value, device.value) == (32, 0)
        text.value = b"0000:19:00.0"
        return 0

    def cudaDeviceGetAttribute(gpu: FakeGpu, value: Any, number: Any, device: Any) -> int:  # noqa: N802, N805
        assert device.value == 0
        _set(value, ctypes.c_int, {18: int(gpu.integrated), 75: 8, 76: 7}[number.value])
        return 0

    def cudaMalloc(gpu: FakeGpu, address: Any, size: Any) -> int:  # noqa: N802, N805
        gpu.context()
        gpu.own += size.value
        _set(address, ctypes.c_void_p, 4096 + size.value)
        return 0

    def cudaFree(gpu: FakeGpu, address: Any) -> int:  # noqa: N802, N805
        gpu.own -= address.value - 4096
        return 0


class NvmlLibrary:
    """As of libnvidia-ml."""

    def nvmlInit_v2(gpu: FakeGpu) -> int:  # noqa: N802, N805
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(gpu: FakeGpu, bus_id: bytes, handle: Any) -> int:  # noqa: N802, N805
        assert bus_id == b"0000:19:00.0"
        _set(handle, ctypes.c_void_p, 77)
        return 0

    def nvmlDeviceGetMemoryInfo(gpu: FakeGpu, handle: Any, memory: Any) -> int:  # noqa: N802, N805
        assert handle.value == 77
        sizes = ctypes.cast(memory, ctypes.POINTER(ctypes.c_ulonglong))
        used = gpu.used if gpu.device_used is None else gpu.device_used
        sizes[0], sizes[1], sizes[2] = gpu.total, gpu.total - used, used
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(gpu: FakeGpu, handle: Any, count: Any, rows: Any) -> int:  # noqa: N802, N805
        gpu.listings += 1
        listed = dict(gpu.others)
        if gpu.listed_as is not None and gpu.own:
            listed[gpu.listed_as] = gpu.own if gpu.known else NOT_AVAILABLE
        room = ctypes.cast(count, ctypes.POINTER(ctypes.c_uint))
        if len(listed) > room[0]:
            room[0] = len(listed)
            return 7
        room[0] = len(listed)
        for row, (pid, used) in zip(rows, listed.items(), strict=False):
            row.pid, row.used = pid, used
        return 0

    nvmlDeviceGetComputeRunningProcesses_v2 = nvmlDeviceGetComputeRunningProcesses_v3  # noqa: N815
