"""Meters of device memory: what this process holds on the GPU, and what there is to have.

By NVML where it knows the process: that counts the context, the code, the libraries' own memory and every arena. A
Jetson Orin's NVML knows no memory, and in a container NVML may hide processes; then the device as a whole is looked at
and what it became fuller by since the meter was made, so other programs show as well:

- as NVML sees the device, where it does;
- on a device that shares the CPU's memory, what the driver has mapped for all its users (`NvMapMemUsed` of
  `/proc/meminfo`, JetPack 5 and 6);
- else by cudaMemGetInfo. That makes the context, which therefore is not counted (`counts_context` is False).

Nothing here was run on a Jetson; what the libraries answer there is known from reports of users.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgelocal.machine.device import ROOT, read_text
from edgelocal.machine.gpu_libraries import CudaRuntime, DeviceMemory, LibraryError, Load, Nvml

NVML, DRIVER = "nvml", "driver"
_PROBE_BYTES = 64 << 20


@dataclass(frozen=True)
class Meter:
    """Memory of one device in bytes. `source` is "nvml" where this process alone is counted, "driver" where the device
    is; `shared`: the device has no memory of its own."""

    source: str
    shared: bool
    counts_context: bool
    _used: Callable[[], int]
    _free: Callable[[], int]

    def used_bytes(self) -> int:
        """What this process holds, or what the device became fuller by, at least 0."""
        return max(0, self._used())

    def free_bytes(self) -> int:
        """What there is to have, for all processes. On a shared device that is what the system could free, too."""
        return self._free()


def device_memory(load: Load = ctypes.CDLL) -> DeviceMemory:
    """What CUDA says of the device as a whole; makes the process's context if there is none yet.

    Raises:
        LibraryError: there is no CUDA runtime library, or no device.
    """
    return CudaRuntime(load).memory()


def gpu_meter(load: Load = ctypes.CDLL, root: Path = ROOT, pid: int | None = None) -> Meter:
    """The best meter that works here. To count the context, it must be made before the process has one; it leaves one.

    `pid` is this process's number, for a test.

    Raises:
        LibraryError: there is no CUDA runtime library, or no device.
    """
    cuda = CudaRuntime(load)
    shared, nvml = cuda.shares_memory(), _nvml(cuda, load)
    held = _whole_device(nvml, shared, root)
    before = held() if held else 0
    own = _own_number(cuda, nvml, os.getpid() if pid is None else pid) if nvml else None
    free = _free_memory(cuda, shared, root)
    if nvml is not None and own is not None:
        return Meter(NVML, shared, True, lambda: nvml.processes().get(own, 0), free)
    start = cuda.memory()
    if held is not None:
        return Meter(DRIVER, shared, True, lambda: held() - before, free)
    return Meter(DRIVER, shared, False, lambda: start.free - cuda.memory().free, free)


def _nvml(cuda: CudaRuntime, load: Load) -> Nvml | None:
    try:
        return Nvml(cuda.bus_id(), load)
    except LibraryError:
        return None


def _whole_device(nvml: Nvml | None, shared: bool, root: Path) -> Callable[[], int] | None:
    """What tells the bytes in use on the device without a context."""
    if shared:  # there NVML's figure would be that of the machine, if it had one
        return (lambda: _meminfo(root, "NvMapMemUsed") or 0) if _meminfo(root, "NvMapMemUsed") is not None else None
    return nvml.used_bytes if nvml is not None and _answers(nvml.used_bytes) else None


def _own_number(cuda: CudaRuntime, nvml: Nvml, pid: int) -> int | None:
    """Under which number NVML lists this process: that which grows when memory is allocated. None: under none.

    In a container the process does not know its number on the host.
    """
    try:
        cuda.memory()  # makes the context, so that the process is listed
        before = nvml.processes()
        address = cuda.allocate(_PROBE_BYTES)
        try:
            after = nvml.processes()
        finally:
            cuda.free(address)
    except LibraryError:
        return None
    grown = [number for number, used in after.items() if used - before.get(number, used) >= _PROBE_BYTES]
    return pid if pid in grown else grown[0] if len(grown) == 1 else None


def _free_memory(cuda: CudaRuntime, shared: bool, root: Path) -> Callable[[], int]:
    """On a shared device cudaMemGetInfo leaves out what the system could free; MemAvailable has it."""

    def free() -> int:
        available = _meminfo(root, "MemAvailable") if shared else None
        return cuda.memory().free if available is None else available

    return free


def _meminfo(root: Path, key: str) -> int | None:
    """A line "NvMapMemUsed:  123 kB" of `/proc/meminfo` in bytes."""
    match = re.search(rf"^{key}:\s*([0-9]{{1,15}}) kB$", read_text(root / "proc/meminfo") or "", re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _answers(ask: Callable[[], int]) -> bool:
    try:
        ask()
    except LibraryError:
        return False
    return True
