"""The protobuf wire format, pure: a message is a sequence of fields, each a varint key (number * 8 + wire type) and a
value. No schema is needed to read it; what a field means is its reader's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from edgelocal.errors import BundleError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

Field = tuple[int, int, Any]  # number, wire type, value: int for VARINT, else bytes


def fields(message: bytes) -> Iterator[Field]:
    """The fields of a protobuf message.

    Raises:
        BundleError: the bytes are no protobuf message.
    """
    at, end = 0, len(message)
    while at < end:
        key = message[at]  # most numbers have one byte, and a call for each would take most of the time
        at += 1
        if key > 127:
            key, at = _read_varint(message, at - 1)
        number, kind = key >> 3, key & 7
        if kind in (VARINT, BYTES):
            if at < end and message[at] < 128:
                size = message[at]
                at += 1
            else:
                size, at = _read_varint(message, at)
            if kind == VARINT:
                yield number, kind, size
                continue
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise BundleError(f"damaged ONNX: wire type {kind} at byte {at}; copy the bundle again")
        if at + size > end:
            raise BundleError(f"damaged ONNX: a field of {size} bytes runs past its end; copy the bundle again")
        yield number, kind, message[at : at + size]
        at += size


def render(parts: Iterable[Field]) -> bytes:
    """The inverse of `fields`."""
    out = bytearray()
    for number, kind, value in parts:
        out += _varint(number << 3 | kind)
        if kind == VARINT:
            out += _varint(value)
        else:
            out += (_varint(len(value)) if kind == BYTES else b"") + value
    return bytes(out)


def as_bytes(field: Field) -> bytes:
    """The value of a field that must hold bytes.

    Raises:
        BundleError: it holds a number.
    """
    if field[1] != BYTES:
        raise BundleError(f"damaged ONNX: field {field[0]} has wire type {field[1]}; copy the bundle again")
    value: bytes = field[2]
    return value


def _varint(value: int) -> bytes:
    out = bytearray()
    while True:
        value, low = value >> 7, value & 127
        out.append(low | (128 if value else 0))
        if not value:
            return bytes(out)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise BundleError("damaged ONNX: a number runs past its end; copy the bundle again")
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
