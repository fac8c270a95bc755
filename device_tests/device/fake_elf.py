"""Shared libraries as files of bytes, with what edgelocal reads of one and nothing else."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

HEADER_BYTES, SECTION_BYTES = 64, 64


def write_library(path: Path, linked: Iterable[str] = (), code: Iterable[tuple[int, int]] = ()) -> Path:
    """A library linked with these, and with code of these kinds (1 PTX, 2 machine code) for these GPUs."""
    names, needed = b"\0", []
    for name in linked:
        needed.append((1, len(names)))
        names += name.encode() + b"\0"
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in (*needed, (0, 0)))
    texts = {".dynstr": 3, ".dynamic": 6, ".nv_fatbin": 1, ".shstrtab": 3}
    titles = b"\0" + b"\0".join(text.encode() for text in texts) + b"\0"
    contents = [names, dynamic, b"".join(container(kind, number) for kind, number in code), titles]
    rows, at = [bytes(SECTION_BYTES)], HEADER_BYTES
    for (title, kind), content in zip(texts.items(), contents, strict=True):
        link = 1 if title == ".dynamic" else 0
        where = titles.index(title.encode())
        rows.append(struct.pack("<IIQQQQIIQQ", where, kind, 0, 0, at, len(content), link, 0, 1, 0))
        at += len(content)
    header = b"\x7fELF\x02\x01\x01".ljust(40, b"\0") + struct.pack("<QI6H", at, 0, 64, 0, 0, SECTION_BYTES, 5, 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + b"".join(contents) + b"".join(rows))
    return path


def container(kind: int, number: int) -> bytes:
    """nvcc's: a header of 16 bytes, and one entry with a header of 64 and eight bytes of code; padded as it pads."""
    entry = struct.pack("<HHIQIIII", kind, 1, 64, 8, 0, 0, 0, number).ljust(64, b"\0") + b"the code"
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entry)) + entry + bytes(24)


def write_cache(root: Path, libraries: Iterable[tuple[str, str]]) -> None:
    """`/etc/ld.so.cache` with these names and paths."""
    libraries = list(libraries)
    at = 48 + 24 * len(libraries)
    entries, texts = b"", b""
    for name, path in libraries:
        key = at + len(texts)
        texts += name.encode() + b"\0"
        entries += struct.pack("<iIIIQ", 0x303, key, at + len(texts), 0, 0)
        texts += path.encode() + b"\0"
    header = b"glibc-ld.so.cache1.1" + struct.pack("<II", len(libraries), len(texts))
    (root / "etc").mkdir(parents=True, exist_ok=True)
    (root / "etc/ld.so.cache").write_bytes(header.ljust(48, b"\0") + entries + texts)
