"""The NVIDIA GPU of this machine, as files tell: nothing is loaded, and no NVML is asked (a Jetson Orin has none that
knows memory).

Only a Jetson tells its compute capability so: its system on a chip has one kind of GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgelocal.machine.device import ROOT, read_text

# Device tree -> name, compute capability. The GPU of all of them works in the memory of the CPU.
_TEGRA = {"tegra194": ("Xavier", 72), "tegra234": ("Orin", 87), "tegra264": ("Thor", 110)}
_LARGEST = 4096  # characters of the driver's version that are looked at
_VERSION = re.compile(r"Kernel Module.*?\s([0-9]{1,4}(?:\.[0-9]{1,4}){1,2})\s")


@dataclass(frozen=True)
class Gpu:
    """`names` in the order of the bus, empty where there is none; `driver` is the kernel module's version;
    `capability` is 87 for 8.7; `shared_memory`: the GPU has none of its own."""

    names: tuple[str, ...] = ()
    driver: str | None = None
    capability: int | None = None
    shared_memory: bool = False

    @property
    def driver_release(self) -> int | None:
        """The driver's first number: 580 of 580.65.06."""
        return int(self.driver.split(".")[0]) if self.driver else None


def read_gpu(root: Path = ROOT) -> Gpu:
    """What `/proc` below `root` says; an empty `Gpu` where it says nothing."""
    found = _VERSION.search((read_text(root / "proc/driver/nvidia/version") or "")[:_LARGEST] + "\n")
    driver = found[1] if found else None
    for name, capability in _tegra(root):
        return Gpu((f"{name} (in the chip)",), driver, capability, shared_memory=True)
    return Gpu(_names(root), driver)


def _tegra(root: Path) -> list[tuple[str, int]]:
    compatible = (read_text(root / "proc/device-tree/compatible") or "").split("\0")
    return [_TEGRA[chip] for text in compatible if (chip := text.strip().removeprefix("nvidia,")) in _TEGRA]


def _names(root: Path) -> tuple[str, ...]:
    """`Model:` of every GPU of the driver."""
    texts = [read_text(path) or "" for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))]
    return tuple(match[1].strip() for text in texts if (match := re.search(r"^Model:\s*(.+)$", text, re.MULTILINE)))
