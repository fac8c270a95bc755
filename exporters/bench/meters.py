"""How much memory a PyTorch program took: of the host, or of a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from edgelocal.errors import UsageError
from edgelocal.exporters.bench.result import Setting
from edgelocal.machine.budget import peak_rss_bytes, reset_peak, rss_bytes


@dataclass(frozen=True)
class Peak:
    """Bytes, as the fields of `Measurement` by these names."""

    idle_bytes: int
    working_set_bytes: int
    process_peak_bytes: int
    reserved_bytes: int | None = None


class Meter(Protocol):
    """Made while the process is idle."""

    def warmed(self) -> None:
        """The warm-up is over."""

    def restart(self) -> None:
        """Forget the peak so far: what is held now counts, what was given back does not."""

    def read(self) -> Peak:
        """The peak since it was made, or since the last restart."""


def make_meter(setting: Setting) -> Meter:
    """The meter of the setting's device.

    Raises:
        UsageError: nothing can be measured there.
    """
    return CudaMeter() if setting.device == "cuda" else HostMeter()


class HostMeter:
    """Resident memory. Everything counts, the warm-up too."""

    def __init__(self) -> None:
        self.restart()
        self._idle = rss_bytes()

    def warmed(self) -> None:
        """Changes nothing."""

    def restart(self) -> None:
        """See `Meter`."""
        if not reset_peak():
            raise UsageError(
                "this system does not set the peak of resident memory back (/proc/self/clear_refs), so a working set "
                "cannot be measured; run on Linux"
            )

    def read(self) -> Peak:
        """See `Meter`."""
        peak = peak_rss_bytes()
        return Peak(self._idle, peak - self._idle, peak)


class CudaMeter:
    """What PyTorch's allocator counts, and what the process takes of the device.

    The peak of the allocator counts from the end of the warm-up: before, cuDNN tries algorithms that it then does not
    take. What the process takes is read at the end, when it is the most: the allocator gives nothing back.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise UsageError("--device cuda: this PyTorch sees no CUDA device; check `nvidia-smi` and the installation")
        self._used = _used_by_all()
        before = self._used() if self._used is not _of_the_runtime else 0
        torch.ones(8, device="cuda").sum().item()
        self._before, self._idle = before, self._used() - before

    def warmed(self) -> None:
        """The peak of the allocator counts from here."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def restart(self) -> None:
        """See `Meter`."""
        torch.cuda.empty_cache()
        self.warmed()

    def read(self) -> Peak:
        """See `Meter`."""
        torch.cuda.synchronize()
        taken = self._used() - self._before
        return Peak(self._idle, torch.cuda.max_memory_allocated(), taken, torch.cuda.max_memory_reserved())


def _of_the_runtime() -> int:
    """Bytes of the device that are taken, by all processes and the driver; makes the context."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def _used_by_all() -> Callable[[], int]:
    """What reads the bytes of the device that are taken: NVML where it is installed (nvidia-ml-py), which needs no
    context and so can be asked before there is one; else the CUDA runtime, on a device that nobody else uses.

    NVML numbers devices by itself, so with several of them it is not asked.
    """
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        if nvml.nvmlDeviceGetCount() != 1:
            return _of_the_runtime
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        nvml.nvmlDeviceGetMemoryInfo(handle)
    except Exception:  # noqa: BLE001 (whatever it lacks: the module, the library, a permission)
        return _of_the_runtime
    return lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
