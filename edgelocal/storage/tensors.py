"""The safetensors format, pure: named arrays <-> bytes.

    8 bytes   length of the header, unsigned little-endian
    header    JSON: {name: {"dtype", "shape", "data_offsets": [begin, end)}, "__metadata__": {str: str}}, space-padded
    data      the tensors, little-endian, C order, without gap or overlap; offsets count from the start of the data

Writing orders tensors by element size (largest first) and pads the header to 8 bytes, so every tensor is aligned.
Neither direction copies tensor data that is in memory: beyond its argument the peak is the header and what parsing it
takes. Tensors that are made or read when asked for are in memory one at a time.
The reader is strict, because a reader that guesses turns damage into other weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias, overload

import numpy as np

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 65_536
MAX_RANK = 8
MAX_NAME = 256
MAX_TENSOR_BYTES = (1 << 63) - 1
METADATA_KEY = "__metadata__"

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Read: TypeAlias = Callable[[int, int], memoryview]  # bytes begin .. end - 1 of a file, read-only

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


class TensorFormatError(ValueError):
    """The bytes are not a well-formed safetensors file, or the arrays cannot be written as one."""


class Chunks(Sequence[bytes | memoryview]):
    """The chunks of a file: its head, then one flat byte view per tensor, made when it is asked for.

    `nbytes` is the size of the file; `tail` are chunks behind the tensors.
    """

    def __init__(
        self, head: bytes, tensors: Mapping[str, Array], names: Sequence[str], nbytes: int, tail: tuple[bytes, ...] = ()
    ) -> None:
        self.nbytes = nbytes + sum(map(len, tail))
        self._head, self._tensors, self._names, self._size, self._tail = head, tensors, names, nbytes, tail

    def __len__(self) -> int:
        return 1 + len(self._names) + len(self._tail)

    @overload
    def __getitem__(self, index: int) -> bytes | memoryview: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes | memoryview]: ...
    def __getitem__(self, index: int | slice) -> bytes | memoryview | list[bytes | memoryview]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index == 0:
            return self._head
        if index <= len(self._names):
            return _flat_bytes(self._tensors[self._names[index - 1]])
        return self._tail[index - 1 - len(self._names)]

    def followed_by(self, *tail: bytes) -> Chunks:
        """These chunks and more behind them."""
        return Chunks(self._head, self._tensors, self._names, self._size, (*self._tail, *tail))


def encode(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> Chunks:
    """Arrays and string metadata -> the chunks of a file.

    A view shares the memory of its array, so arrays must not change until the chunks are written. Only an array that
    is not contiguous or not little-endian is copied. A mapping that makes its arrays when asked is asked for one at a
    time, so no more than that is in memory.

    Raises:
        TensorFormatError: an unsupported dtype, or a name, rank, count or header over its cap.
    """
    if len(tensors) > MAX_TENSORS:
        raise TensorFormatError(f"{len(tensors)} tensors, at most {MAX_TENSORS} can be written to one file")
    widths = {name: tensors[name].dtype.itemsize for name in tensors}
    names = sorted(widths, key=lambda name: (-widths[name], name))
    header: dict[str, Any] = {METADATA_KEY: _check_metadata(dict(metadata))} if metadata else {}
    begin = 0
    for name in names:
        header[name] = _describe(name, tensors[name], begin)
        begin = header[name]["data_offsets"][1]
    head = _head(header)
    return Chunks(head, tensors, names, len(head) + begin)


def decode(data: bytes | memoryview) -> tuple[dict[str, Array], dict[str, str]]:
    """The bytes of a file -> (arrays, metadata). Arrays are read-only views of `data`, in the order of the header.

    Raises:
        TensorFormatError: the bytes break any rule of the format; the message says which, and where.
    """
    tensors, metadata = parse(*reader(data))
    return dict(tensors), metadata


def reader(data: bytes | memoryview) -> tuple[Read, int]:
    """Bytes in memory as `parse` takes them: how to read them, without a copy, and how many there are."""
    view = memoryview(data).toreadonly()
    view = view.cast("B") if view.nbytes else memoryview(b"")
    return lambda begin, end: view[begin:end], view.nbytes


def parse(read: Read, nbytes: int) -> tuple[Tensors, dict[str, str]]:
    """A file of `nbytes` bytes -> (tensors, metadata); of the file no more than its header is read.

    Raises:
        TensorFormatError: its header breaks any rule of the format; the message says which, and where.
    """
    if nbytes < 8:
        raise TensorFormatError(f"the file has {nbytes} bytes, expected at least 8 for the length of its header")
    start = 8 + _header_length(bytes(read(0, 8)), nbytes - 8)
    header = _parse_header(bytes(read(8, start)))
    metadata = _check_metadata(header.pop(METADATA_KEY, {}))
    if len(header) > MAX_TENSORS:
        raise TensorFormatError(f"the header lists {len(header)} tensors, the limit is {MAX_TENSORS}")
    entries = [_parse_entry(name, raw) for name, raw in header.items()]
    _check_layout(entries, nbytes - start)
    return Tensors(read, start, entries), metadata


class Tensors(Mapping[str, Array]):
    """The tensors of a file, in the order of its header. Each is read, read-only, whenever it is asked for; asking
    raises TensorFormatError where its bytes are no values of its dtype."""

    def __init__(self, read: Read, start: int, entries: Sequence[_Entry]) -> None:
        self._read, self._start = read, start
        self._entries = {entry.name: entry for entry in entries}

    def __getitem__(self, name: str) -> Array:
        entry = self._entries[name]
        return _array(self._read(self._start + entry.begin, self._start + entry.end), entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class _Entry:
    """One tensor of the header; `begin` and `end` in bytes from the start of the data."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


def _head(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise TensorFormatError(f"the header would have {len(text)} bytes, the limit is {MAX_HEADER_BYTES}")
    return len(text).to_bytes(8, "little") + text


def _describe(name: str, array: Array, begin: int) -> dict[str, Any]:
    """The header's entry of a tensor whose data starts at `begin`."""
    _check_name(name)
    code = _CODES.get(array.dtype.newbyteorder("<"))
    if code is None:
        _refuse(name, f"has dtype {array.dtype}, supported are {', '.join(dtype.name for dtype in _CODES)}")
    if array.ndim > MAX_RANK:
        _refuse(name, f"has rank {array.ndim}, the limit is {MAX_RANK}")
    return {"dtype": code, "shape": list(array.shape), "data_offsets": [begin, begin + array.nbytes]}


def _flat_bytes(array: Array) -> memoryview:
    wire = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return wire.reshape(-1).view(np.uint8).data


def _header_length(field: bytes, following: int) -> int:
    length = int.from_bytes(field, "little")
    if length > MAX_HEADER_BYTES:
        raise TensorFormatError(f"the header claims {length} bytes, the limit is {MAX_HEADER_BYTES}")
    if length > following:
        raise TensorFormatError(f"the header claims {length} bytes, only {following} follow: the file is cut short")
    return length


def _parse_header(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise TensorFormatError(f"the header begins with {text[:1]!r}, expected a JSON object that begins with '{{'")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except TensorFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise TensorFormatError(f"the header is not valid JSON: {error}") from None
    assert isinstance(header, dict)  # the text begins with "{"
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise TensorFormatError(f"the header names {key[:MAX_NAME]!r} twice")
        result[key] = value
    return result


def _check_metadata(raw: Any) -> dict[str, str]:
    if not isinstance(raw, dict):
        raise TensorFormatError(f"{METADATA_KEY} is a {type(raw).__name__}, expected an object")
    for key, value in raw.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TensorFormatError(f"{METADATA_KEY}: {str(key)[:64]!r} is not a string that maps to a string")
        if not (_is_unicode(key) and _is_unicode(value)):
            raise TensorFormatError(f"{METADATA_KEY}: {key[:64]!r} holds half a surrogate pair, expected Unicode text")
    return raw


def _check_name(name: str) -> None:
    if not 0 < len(name) <= MAX_NAME:
        raise TensorFormatError(f"a tensor name has {len(name)} characters, expected 1 to {MAX_NAME}")
    if name == METADATA_KEY or not _is_unicode(name):
        raise TensorFormatError(f"a tensor cannot be named {name!r}")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _parse_entry(name: str, raw: Any) -> _Entry:
    _check_name(name)
    if not isinstance(raw, dict) or set(raw) != _ENTRY_KEYS:
        found = sorted(raw)[:4] if isinstance(raw, dict) else type(raw).__name__
        _refuse(name, f"is described by {found}, expected an object with {sorted(_ENTRY_KEYS)}")
    code = raw["dtype"]
    if not isinstance(code, str) or code not in _DTYPES:
        _refuse(name, f"has unknown dtype {str(code)[:32]!r}, expected one of {', '.join(_DTYPES)}")
    shape = _parse_shape(name, raw["shape"])
    begin, end = _parse_offsets(name, raw["data_offsets"])
    size = math.prod(shape) * _DTYPES[code].itemsize
    # A zero hides a huge dimension beside it from the product, but not from numpy.
    if math.prod(d for d in shape if d) * _DTYPES[code].itemsize > MAX_TENSOR_BYTES:
        _refuse(name, f"has more than {MAX_TENSOR_BYTES} bytes: its shape overflows")
    if size != end - begin:
        _refuse(name, f"has shape {list(shape)} of {code}, {size} bytes, but its offsets span {end - begin}")
    return _Entry(name, _DTYPES[code], shape, begin, end)


def _parse_shape(name: str, raw: Any) -> tuple[int, ...]:
    if not isinstance(raw, list):
        _refuse(name, f"has a shape that is a {type(raw).__name__}, expected a list")
    if len(raw) > MAX_RANK:
        _refuse(name, f"has rank {len(raw)}, the limit is {MAX_RANK}")
    for dim in raw:
        if type(dim) is not int or dim < 0:
            _refuse(name, f"has a dimension {str(dim)[:32]}, expected an integer of at least 0")
    return tuple(raw)


def _parse_offsets(name: str, raw: Any) -> tuple[int, int]:
    if not isinstance(raw, list) or len(raw) != 2 or any(type(offset) is not int for offset in raw):
        _refuse(name, "has data_offsets that are not a list of two integers")
    begin, end = raw
    if not 0 <= begin <= end <= MAX_TENSOR_BYTES:
        _refuse(name, "has data_offsets that are negative, too large or run backwards")
    return begin, end


def _check_layout(entries: list[_Entry], data_bytes: int) -> None:
    """The tensors must tile the data exactly: any other layout could hide bytes or share them."""
    position = 0
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            _refuse(entry.name, f"{what}: it begins at {entry.begin}, expected {position}")
        position = entry.end
    if position > data_bytes:
        raise TensorFormatError(f"the tensors take {position} bytes, only {data_bytes} follow: the file is cut short")
    if position < data_bytes:
        raise TensorFormatError(f"{data_bytes - position} bytes follow the last tensor, expected none")


def _array(span: memoryview, entry: _Entry) -> Array:
    if entry.begin == entry.end:
        array: Array = np.empty(entry.shape, entry.dtype)
        array.setflags(write=False)
        return array
    if entry.dtype == np.bool_ and np.frombuffer(span, np.uint8).max() > 1:
        _refuse(entry.name, "holds bytes other than 0 and 1, expected booleans")
    return np.frombuffer(span, entry.dtype).reshape(entry.shape)


def _refuse(name: str, what: str) -> NoReturn:
    raise TensorFormatError(f"tensor {name!r} {what}")
