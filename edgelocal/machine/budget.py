"""Sizes in words <-> bytes, and the meters of this process's memory.

Resident memory is what the system counts against the process; its peak is `VmHWM`, which Linux can set back.
"""

from __future__ import annotations

import re
import resource
import sys
from fractions import Fraction
from pathlib import Path
from types import TracebackType

from edgelocal.errors import UsageError

AUTO_FRACTION = Fraction(4, 5)
PROC = Path("/proc/self")
LARGEST_SIZE = 1 << 60  # an exbibyte: sums of sizes still are 64-bit numbers

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_NUMBER = r"([0-9]{1,18}(?:\.[0-9]{1,18})?)"
_SIZE = re.compile(rf"\s*{_NUMBER}\s*([kmg]i?b|b|)\s*", re.IGNORECASE)
_PERCENT = re.compile(rf"\s*{_NUMBER}\s*%\s*")


def parse_size(text: str) -> int:
    """Bytes of "96MiB", "1.5GB", "4096": B, KB, MB, GB count in thousands, KiB, MiB, GiB in 1024s. Rounds down.

    Raises:
        UsageError: not of this form, less than one byte, or more than an exbibyte.
    """
    match = _SIZE.fullmatch(text)
    size = int(Fraction(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if not 1 <= size <= LARGEST_SIZE:
        raise UsageError(
            f"{text!r} is not a size; write for example 96MiB, 1.5GB or 100000000 (bytes); the units are KB, MB, "
            "GB, KiB, MiB and GiB"
        )
    return size


def parse_budget(text: str, total_bytes: int) -> int:
    """Bytes of a memory budget: a size as in `parse_size`, "60%" of `total_bytes`, or "auto", 80 % of it.

    `total_bytes` is the memory this process could have (`DeviceInfo.effective_bytes`). A size may be larger; whether
    it can be had is not decided here.

    Raises:
        UsageError: none of the three, or a percentage outside (0, 100].
    """
    if text.strip().lower() == "auto":
        return int(total_bytes * AUTO_FRACTION)
    if "%" not in text:
        return parse_size(text)
    match = _PERCENT.fullmatch(text)
    share = Fraction(match[1]) / 100 if match else Fraction(0)
    if not 0 < share <= 1:
        raise UsageError(
            f"{text!r} is not a share of memory; write for example 60% (above 0, up to 100), 96MiB or auto"
        )
    return int(total_bytes * share)


def format_size(size_bytes: int) -> str:
    """ "96 MiB", "1.5 GiB", "-3 KiB": one decimal at most; `parse_size` reads positive ones back."""
    value = float(size_bytes)
    unit = "B"
    for larger in ("KiB", "MiB", "GiB"):
        if round(abs(value), 1) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def size_up(size_bytes: int) -> str:
    """As `format_size`, but never less than `size_bytes`: a budget so large is enough."""
    text = format_size(size_bytes)
    while size_bytes > 0 and parse_size(text) < size_bytes:
        number, unit = text.split()
        text = f"{float(number) + 0.1:.1f}".removesuffix(".0") + f" {unit}"
    return text


def rss_bytes(proc: Path = PROC) -> int:
    """Resident memory of this process now; its lifetime peak, an upper bound, where the system has no `/proc`."""
    return _status_bytes(proc, "VmRSS") or _lifetime_peak_bytes()


def peak_rss_bytes(proc: Path = PROC) -> int:
    """Highest resident memory since the start or the last `reset_peak`; since the start where it cannot be reset."""
    return _status_bytes(proc, "VmHWM") or _lifetime_peak_bytes()


def reset_peak(proc: Path = PROC) -> bool:
    """Set the peak back to the present resident memory. False where the system lacks or forbids it."""
    if not (proc / "clear_refs").exists():
        return False
    try:
        (proc / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


class PeakMeter:
    """Peak resident memory of a stretch of code.

        with PeakMeter() as meter:
            step()
        meter.peak_bytes, meter.growth_bytes

    `exact` is False where the peak cannot be reset: then `peak_bytes` is that of the whole life of the process, an
    upper bound. Meters do not nest: an inner one resets the peak of the outer.
    """

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self.exact = False
        self.start_bytes = 0
        self.peak_bytes = 0

    def __enter__(self) -> PeakMeter:
        self.exact = reset_peak(self._proc)
        self.start_bytes = rss_bytes(self._proc)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.peak_bytes = peak_rss_bytes(self._proc)

    @property
    def growth_bytes(self) -> int:
        """Peak above the resident memory at the start, at least 0."""
        return max(0, self.peak_bytes - self.start_bytes)


def _status_bytes(proc: Path, key: str) -> int | None:
    """A line "VmRSS:   123 kB" of `/proc/self/status` in bytes; None where there is none."""
    try:
        status = (proc / "status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{key}:\s*([0-9]+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _lifetime_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
