"""The members of a .zip archive, for archives of very many small files.

The standard library keeps some 600 bytes a member, 35 MB for CIFAR-10's 60,000 images: more than some budgets. Here it
is the name and 28 bytes. Members are stored or deflated, their checksums are checked, and names are only compared,
never used as paths. Layout: PKWARE's APPNOTE.TXT 6.3, sections 4.3.7 (local header), 4.3.12 to 4.3.16 (directory).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgelocal.data.formats.base import is_junk, names_bytes, reading
from edgelocal.errors import DataError

_LOCAL = struct.Struct("<4s2xH18xHH")  # signature, flags, length of the name, length of the extra field
_ENTRY = struct.Struct("<4s4xHH4xIIIHHH8xI")  # signature, flags, method, crc, packed, size, 3 lengths, offset
_END = struct.Struct("<4s4xHHIIH")  # signature, entries here and in all, bytes and offset of the directory, comment
_END_64 = struct.Struct("<4s20xQQQQ")  # signature, entries here and in all, bytes and offset of the directory
_LOCATOR_64 = struct.Struct("<4s4xQ4x")  # signature, offset of the record above
_MEMBER = np.dtype([("offset", "<u8"), ("packed", "<u8"), ("size", "<u8"), ("crc", "<u4"), ("method", "<u2")])
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _UTF8 = 1, 1 << 11
_FULL = 0xFFFFFFFF  # the value is in the 64-bit extra field


@dataclass(frozen=True, eq=False)
class ZipTree:
    """Files of an archive, in the order of its directory; `members` holds their places, dtype `_MEMBER`."""

    path: Path
    prefix: str
    names: tuple[str, ...]
    members: npt.NDArray[Any]

    @classmethod
    def open(cls, path: Path) -> ZipTree:
        """All files that are no junk. A folder around everything is left out of their names.

        Raises:
            DataError: damaged, encrypted, or no zip archive.
        """
        with reading(path) as file:
            try:
                names, members = _entries(file)
            except (struct.error, OverflowError, ValueError) as error:
                raise _damaged(path, str(error)) from error
        last = {name: k for k, name in enumerate(names) if not any(is_junk(part) for part in name.split("/"))}
        tree = cls(path, "", tuple(last), members[list(last.values())])
        return tree.under(_wrapper(tree.names))

    @property
    def resident_bytes(self) -> int:
        """As `Tree.resident_bytes`."""
        return names_bytes(self.names) + self.members.nbytes

    @property
    def largest_bytes(self) -> int:
        """As `Tree.largest_bytes`."""
        return max(int(self.members[field].max(initial=0)) for field in ("size", "packed"))

    @property
    def source(self) -> str:
        """The archive and the folder in it."""
        return f"{self.path}/{self.prefix}".rstrip("/")

    def under(self, folder: str) -> ZipTree:
        """The part below `folder`, a name ending in "/" ("" for all), with names relative to it."""
        inside = [k for k, name in enumerate(self.names) if name.startswith(folder) and name != folder]
        names = tuple(self.names[k][len(folder) :] for k in inside)
        return ZipTree(self.path, self.prefix + folder, names, self.members[inside])

    def read(self, positions: Sequence[int], limit: int) -> Iterator[bytes]:
        """The files at these positions of `names`.

        Raises:
            DataError: larger than `limit` bytes, packed in an unknown way, or not what its checksum says.
        """
        with reading(self.path) as file:
            for position in positions:
                where = f"{self.source}/{self.names[position]}"
                offset, packed, size, crc, method = self.members[position].item()
                if max(packed, size) > limit:
                    raise DataError(f"{where} has {size} bytes, expected at most {limit}: remove or shrink it")
                name, content = _content(file, offset, packed)
                data = _unpack(content, method, size, where)
                if name != self.prefix + self.names[position] or len(data) != size or zlib.crc32(data) != crc:
                    raise DataError(f"{where} is damaged (not the name, size and checksum listed); copy it again")
                yield data


def _entries(file: BinaryIO) -> tuple[list[str], npt.NDArray[Any]]:
    """Name and member of each entry of the directory; where a name comes twice, the last counts."""
    start, count, size, shift = _directory(file)
    file.seek(start)
    data = file.read(size)
    names: list[str] = []
    members = np.empty(min(count, len(data) // _ENTRY.size + 1), dtype=_MEMBER)
    at = 0
    for k in range(count):
        signature, flags, method, crc, packed, full, *lengths, offset = _ENTRY.unpack_from(data, at)
        if signature != b"PK\x01\x02" or flags & _ENCRYPTED:
            raise ValueError("it is encrypted" if flags & _ENCRYPTED else "an entry of its directory is broken")
        at += _ENTRY.size
        names.append(_text(data[at : at + lengths[0]], flags))
        extra = data[at + lengths[0] : at + lengths[0] + lengths[1]]
        full, packed, offset = _wide(extra, (full, packed, offset))
        at += sum(lengths)
        if offset + shift + packed > start:
            raise ValueError(f"{names[-1]} lies beyond its directory")
        members[k] = (offset + shift, packed, full, crc, method)
    if at != size:
        raise ValueError(f"its directory has other than the {count} entries it announces")
    return names, members


def _directory(file: BinaryIO) -> tuple[int, int, int, int]:
    """Start, entries and bytes of the directory, and by how much all offsets are short (data before the archive)."""
    length = file.seek(0, os.SEEK_END)
    tail_at = max(length - _END.size - 0xFFFF, 0)
    file.seek(tail_at)
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise ValueError("it has no zip directory at its end")
    _, _, count, size, offset, _ = _END.unpack_from(tail, at)
    end = tail_at + at
    end, count, size, offset = _directory_64(file, end) or (end, count, size, offset)
    shift = end - size - offset
    if shift < 0:
        raise ValueError("its directory does not fit into the file")
    return offset + shift, count, size, shift


def _directory_64(file: BinaryIO, end: int) -> tuple[int, int, int, int] | None:
    """Where the 64-bit end record lies, then entries, bytes and offset of the directory; None if there is none."""
    file.seek(max(end - _LOCATOR_64.size, 0))
    signature, at = _LOCATOR_64.unpack(file.read(_LOCATOR_64.size))
    if signature != b"PK\x06\x07":
        return None
    file.seek(at)
    signature, _, count, size, offset = _END_64.unpack(file.read(_END_64.size))
    if signature != b"PK\x06\x06":
        raise ValueError("its 64-bit directory is not where it should be")
    return at, count, size, offset


def _wide(extra: bytes, values: tuple[int, int, int]) -> Iterator[int]:
    """Size, packed size and offset, taken from the 64-bit extra field (id 1) where they did not fit 32 bits."""
    wide = b""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            wide = extra[4 : 4 + length]
        extra = extra[4 + length :]
    for value in values:
        if value == _FULL:
            (value,), wide = struct.unpack_from("<Q", wide), wide[8:]
        yield value


def _content(file: BinaryIO, offset: int, packed: int) -> tuple[str, bytes]:
    """Name and packed bytes of the member at `offset`; empty or short where the file is damaged."""
    file.seek(offset)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size or not header.startswith(b"PK\x03\x04"):
        return "", b""
    _, flags, name, extra = _LOCAL.unpack(header)
    text = _text(file.read(name), flags)
    file.seek(extra, os.SEEK_CUR)
    return text, file.read(packed)


def _text(name: bytes, flags: int) -> str:
    return name.decode("utf-8" if flags & _UTF8 else "cp437", "replace")


def _unpack(data: bytes, method: int, size: int, where: str) -> bytes:
    if method == _STORED:
        return data
    if method != _DEFLATED:
        raise DataError(f"{where} is packed by method {method}, expected stored or deflated: make the archive again")
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise DataError(f"{where} is damaged ({error}); make or copy the archive again") from error


def _wrapper(names: Sequence[str]) -> str:
    """The one folder around folders of files, as archivers make it, unless it is named after a split."""
    tops = {name.partition("/")[0] for name in names}
    deep = all(name.count("/") >= 2 for name in names if not name.endswith("/"))
    if len(tops) != 1 or not deep or tops <= {"train", "test", "val"}:
        return ""
    return tops.pop() + "/"


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path} is damaged or no zip archive ({why}); make or copy it again")
