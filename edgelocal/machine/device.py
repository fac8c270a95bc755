"""What this machine is. Nothing else in the project reads it.

Files are read below a root folder, so that a test, or a look at another machine's copied `/proc` and `/sys`, can
give its own. What cannot be read or makes no sense counts as absent: a machine without `/proc` still gets an answer.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")

_MACHINES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
_CUDA_TRACES = ("dev/nvidia[0-9]*", "dev/nvhost-gpu", "usr/bin/nvidia-smi", "usr/lib/wsl/lib/nvidia-smi")
_CGROUP_MOUNTS = {"": ("", "unified"), "memory": ("memory",), "cpu": ("cpu", "cpu,cpuacct")}
# cgroup v1 writes "no limit" as the largest page-aligned 63-bit number.
_UNLIMITED_BYTES = 1 << 62
_LARGEST_TEXT = 1 << 16  # characters of a system file that are read


@dataclass(frozen=True)
class DeviceInfo:
    """The machine as this process may use it; memory and disk in bytes.

    `cores` respects affinity and cgroup quota (rounded up); `memory_limit_bytes` is the tightest cgroup limit, None
    without one; `model` is the board's name for itself, None where the machine has none.
    """

    machine: str
    system: str
    python: str
    cores: int
    memory_total_bytes: int
    memory_available_bytes: int
    memory_limit_bytes: int | None
    disk_free_bytes: int
    model: str | None
    jetson: bool
    cuda: bool

    @property
    def effective_bytes(self) -> int:
        """Memory this process could have now: what is available, at most the cgroup limit."""
        limit = self.memory_available_bytes if self.memory_limit_bytes is None else self.memory_limit_bytes
        return min(self.memory_total_bytes, self.memory_available_bytes, limit)


def describe(root: Path = ROOT, folder: Path = Path()) -> DeviceInfo:
    """This machine; `disk_free_bytes` is that of the file system of `folder`."""
    total, available = _memory(root)
    model = _model(root)
    return DeviceInfo(
        machine=_MACHINES.get(platform.machine().lower(), platform.machine()),
        system=platform.system(),
        python=platform.python_version(),
        cores=_cores(root),
        memory_total_bytes=total,
        memory_available_bytes=available,
        memory_limit_bytes=_memory_limit(root),
        disk_free_bytes=shutil.disk_usage(folder).free,
        model=model,
        jetson=(root / "etc/nv_tegra_release").exists() or "jetson" in (model or "").lower(),
        cuda=any(any(root.glob(trace)) for trace in _CUDA_TRACES),
    )


def _memory(root: Path) -> tuple[int, int]:
    """Total and available bytes, by `/proc/meminfo` or else by the C library."""
    meminfo = read_text(root / "proc/meminfo") or ""
    fields = {key: int(kib) * 1024 for key, kib in re.findall(r"^(\w+):\s*([0-9]{1,15}) kB$", meminfo, re.MULTILINE)}
    total = fields.get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, fields.get("MemAvailable", total)


def _cores(root: Path) -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [*_cpu_quotas_v2(root), *_cpu_quotas_v1(root)]
    return max(1, min([usable, *(math.ceil(quota) for quota in quotas)]))


def _cpu_quotas_v2(root: Path) -> Iterator[float]:
    """Cores, from `cpu.max`: "<quota> <period>" in microseconds, or "max <period>"."""
    for folder in _cgroup_folders(root, ""):
        match = re.fullmatch(r"([0-9]+) ([1-9][0-9]*)", read_text(folder / "cpu.max") or "")
        if match:
            yield int(match[1]) / int(match[2])


def _cpu_quotas_v1(root: Path) -> Iterator[float]:
    """Cores, from quota and period in microseconds; a quota of -1 is none."""
    for folder in _cgroup_folders(root, "cpu"):
        quota = _read_number(folder / "cpu.cfs_quota_us")
        period = _read_number(folder / "cpu.cfs_period_us")
        if quota and period:
            yield quota / period


def _memory_limit(root: Path) -> int | None:
    """The tightest limit of this process's cgroup and those above it, v2 and v1."""
    limits = [_read_number(folder / "memory.max") for folder in _cgroup_folders(root, "")]
    limits += [_read_number(folder / "memory.limit_in_bytes") for folder in _cgroup_folders(root, "memory")]
    return min((limit for limit in limits if limit and limit < _UNLIMITED_BYTES), default=None)


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's cgroup and of all above it, for a v1 controller or, with "", for v2.

    In a container the path may be that of the host and missing here; the mount's own top is then what counts.
    """
    inner = PurePosixPath()
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        match = re.fullmatch(r"[0-9]+:([^:]*):/?(.*)", line)
        if match and controller in match[1].split(","):
            inner = PurePosixPath(match[2])
    for mount in _CGROUP_MOUNTS[controller]:
        for folder in (inner, *inner.parents):
            if ".." not in folder.parts:
                yield root / "sys/fs/cgroup" / mount / folder


def _model(root: Path) -> str | None:
    for name in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        text = (read_text(root / name) or "").strip("\0 \n")
        if text:
            return text
    return None


def read_text(path: Path) -> str | None:
    """The stripped text of a small system file, or None where it cannot be read."""
    try:
        with path.open(errors="replace") as file:
            return file.read(_LARGEST_TEXT).strip()
    except OSError:
        return None


def _read_number(path: Path) -> int | None:
    """A number of at least 0; "max", "-1" and anything else are None."""
    text = read_text(path) or ""
    return int(text) if re.fullmatch(r"[0-9]{1,20}", text) else None
