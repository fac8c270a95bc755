"""How much memory a PyTorch program took: of the host, or of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from edgelocal.errors import UsageError
from edgelocal.exporters.bench.result import Setting
from edgelocal.machine.budget import peak_rss_bytes, reset_peak, rss_bytes
from edgelocal.machine.gpu_memory import gpu_meter


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
        self._process = gpu_meter()  # before there is a context, so that it is counted; the same that trainings have
        torch.ones(8, device="cuda").sum().item()
        self._idle = self._process.used_bytes()

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
        taken = self._process.used_bytes()
        return Peak(self._idle, torch.cuda.max_memory_allocated(), taken, torch.cuda.max_memory_reserved())
