"""What a shared library says of itself in its file: which others it is linked with, and for which GPUs it has code.

Nothing is loaded. Only the few pages that hold the headers are read, so hundreds of megabytes cost milliseconds.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ELF64_LITTLE = b"\x7fELF\x02\x01"
_SHT_DYNAMIC, _DT_NULL, _DT_NEEDED = 6, 0, 1
_MOST_DYNAMIC = 1 << 16  # bytes of the section; a library has some hundred entries of 16
_FATBIN = struct.pack("<I", 0xBA55ED50)  # opens each container of nvcc's in the section .nv_fatbin
_PTX, _SASS = 1, 2
_HEADER_BYTES = 32  # of an entry, as far as read here


@dataclass(frozen=True)
class GpuCode:
    """Compute capabilities (87 is 8.7) of the machine code and of the PTX, which the driver can compile for later
    GPUs. Code for one GPU only (sm_90a) looks like that for its generation."""

    sass: tuple[int, ...]
    ptx: tuple[int, ...]

    def runs_on(self, capability: int) -> bool:
        """False: it cannot. Machine code runs on its own generation, from its own number upwards. NVIDIA says that of
        GPUs in general; of a desktop's code on a Jetson's GPU (8.0 on 8.7) there are reports that it ran."""
        of_generation = any(own // 10 == capability // 10 and own <= capability for own in self.sass)
        return of_generation or any(own <= capability for own in self.ptx)


@dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    offset: int
    size: int
    link: int


def linked_libraries(path: Path) -> tuple[str, ...]:
    """The names (DT_NEEDED) that the loader must find before this library can be used.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no 64-bit little-endian ELF file, or is cut off.
    """
    with _mapped(path) as data:
        sections = _sections(data)
        dynamic = next((section for section in sections if section.kind == _SHT_DYNAMIC), None)
        if dynamic is None:
            return ()
        names, found = sections[dynamic.link].offset, []
        for at in range(dynamic.offset, dynamic.offset + min(dynamic.size, _MOST_DYNAMIC), 16):
            tag, value = _unpack("<QQ", data, at)
            if tag == _DT_NULL:
                break
            if tag == _DT_NEEDED:
                found.append(_text(data, names + value))
        return tuple(found)


def gpu_code(path: Path) -> GpuCode:
    """For which GPUs nvcc's section of a library has code; nothing in it where there is no such section.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no 64-bit little-endian ELF file, or is cut off.
    """
    with _mapped(path) as data:
        entries = {entry for s in _sections(data) if s.name == ".nv_fatbin" for entry in _fatbin_entries(data, s)}
    of_kind = {kind: tuple(sorted(number for own, number in entries if own == kind)) for kind in (_SASS, _PTX)}
    return GpuCode(of_kind[_SASS], of_kind[_PTX])


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # ValueError where it is empty
    if data[: len(_ELF64_LITTLE)] != _ELF64_LITTLE:
        data.close()
        raise ValueError(f"{path} is no 64-bit shared library")
    return data


def _sections(data: mmap.mmap) -> list[_Section]:
    [start] = _unpack("<Q", data, 40)
    size, count, of_names = _unpack("<HHH", data, 58)
    raw = [_unpack("<IIQQQQII", data, start + index * size) for index in range(count)]
    if of_names >= count:
        raise ValueError("no section has the names of sections")
    names = raw[of_names][4]
    found = [_Section(_text(data, names + row[0]), row[1], row[4], row[5], row[6]) for row in raw]
    if any(section.kind == _SHT_DYNAMIC and section.link >= count for section in found):
        raise ValueError("no section has the names of libraries")
    return found


def _fatbin_entries(data: mmap.mmap, section: _Section) -> Iterator[tuple[int, int]]:
    """Kind and compute capability of each piece of code."""
    end = min(section.offset + section.size, len(data))
    at = data.find(_FATBIN, min(section.offset, end), end)
    while at >= 0:
        header, size = _unpack("<HQ", data, at + 6)
        entry, stop = at + header, at + header + size
        while entry + _HEADER_BYTES <= min(stop, end):
            kind, _, own_header, own_size, _, _, _, number = _unpack("<HHIQIIII", data, entry)
            yield kind, number
            entry += max(own_header + own_size, _HEADER_BYTES)
        at = data.find(_FATBIN, min(max(stop, at + 1), end), end)


def _unpack(form: str, data: mmap.mmap, at: int) -> tuple[int, ...]:
    if at + struct.calcsize(form) > len(data):
        raise ValueError(f"cut off before byte {at + struct.calcsize(form)}")
    return struct.unpack_from(form, data, at)


def _text(data: mmap.mmap, at: int) -> str:
    end = data.find(b"\0", at, at + 4096) if at < len(data) else -1
    if end < 0:
        raise ValueError("a name without an end")
    return data[at:end].decode("utf-8", "replace")
