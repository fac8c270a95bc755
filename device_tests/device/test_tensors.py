"""The safetensors reader and writer against the reference package, and against everything malformed."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgelocal.storage.tensors import MAX_HEADER_BYTES, MAX_NAME, MAX_TENSORS, Array, TensorFormatError, decode, encode

DTYPES = [np.dtype(name) for name in ("float32", "float64", "float16", "int64", "int32", "uint8", "bool")]

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda n: n != "__metadata__")
arrays = st.sampled_from(DTYPES).flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)))
tensor_maps = st.dictionaries(names, arrays, max_size=5)
metadata_maps = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.just("wört"), max_size=3)


def joined(tensors: dict[str, Array], metadata: dict[str, str] | None = None) -> bytes:
    return b"".join(encode(tensors, metadata))


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: Any = (1,), begin: Any = 0, end: Any = 4, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def assert_same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


@given(tensor_maps, metadata_maps)
def test_round_trip(tensors: dict[str, Array], metadata: dict[str, str]) -> None:
    found, found_metadata = decode(joined(tensors, metadata))
    assert_same(found, tensors)
    assert found_metadata == metadata


@given(tensor_maps)
def test_the_reference_package_reads_what_we_write(tensors: dict[str, Array]) -> None:
    reference = pytest.importorskip("safetensors.numpy")
    assert_same(reference.load(joined(tensors)), tensors)


@given(tensor_maps)
def test_we_read_what_the_reference_package_writes(tensors: dict[str, Array]) -> None:
    reference = pytest.importorskip("safetensors.numpy")
    found, metadata = decode(reference.save(tensors, metadata={"a": "b"}))
    assert_same(found, tensors)
    assert metadata == {"a": "b"}


def test_nothing_is_copied_and_every_tensor_is_aligned() -> None:
    array = np.arange(5, dtype=np.float32)
    tensors = {"a": np.array([True]), "b": array, "c": np.ones(3, np.float64)}
    chunks = encode(tensors)
    assert any(np.shares_memory(np.frombuffer(chunk, np.uint8), array) for chunk in chunks)
    data = b"".join(chunks)
    for found in decode(data)[0].values():
        assert np.shares_memory(found, np.frombuffer(data, np.uint8))
        assert found.flags.aligned
        assert not found.flags.writeable


def test_strided_and_big_endian_arrays_keep_their_values() -> None:
    grid = np.arange(12, dtype=np.int32).reshape(3, 4)
    found, _ = decode(joined({"t": grid.T, "b": grid.astype(">i4")}))
    np.testing.assert_array_equal(found["t"], grid.T)
    np.testing.assert_array_equal(found["b"], grid)


MALFORMED = {
    "at least 8": b"1234567",
    "at least 8 ": b"",
    "the limit is 8388608": (MAX_HEADER_BYTES + 1).to_bytes(8, "little"),
    "cut short": (9).to_bytes(8, "little") + b"{}",
    "begins with": raw(b" {}"),
    "begins with ": raw(b""),
    "not valid JSON": raw(b"{"),
    "not valid JSON: ": raw(b"\x7b\xff\x7d"),
    "not valid JSON: maximum": raw(b'{"a":' + b"[" * 100_000),
    "not valid JSON: Extra": raw(b"{}{}"),
    "names 'a' twice": raw(b'{"a":1,"a":2}'),
    "names 'dtype' twice": raw(b'{"a":{"dtype":"F32","dtype":"F32"}}'),
    "expected an object with": raw({"a": 1}),
    r"\['dtype'\], expected an object with": raw({"a": {"dtype": "F32"}}),
    "unknown dtype 'F8'": raw({"a": entry(dtype="F8")}, bytes(4)),
    r"unknown dtype '\[\]'": raw({"a": entry(dtype=[])}, bytes(4)),
    "a shape that is a int": raw({"a": entry(shape=4)}, bytes(4)),
    "dimension -1": raw({"a": entry(shape=(-1,))}, bytes(4)),
    "dimension True": raw({"a": entry(shape=(True,))}, bytes(4)),
    "dimension 1.0": raw({"a": entry(shape=(1.0,))}, bytes(4)),
    "shape overflows": raw({"a": entry(shape=(2**62, 2))}, bytes(4)),
    "more than 9223372036854775807": raw({"a": entry(shape=(0, 2**62), end=0)}),
    "rank 9": raw({"a": entry(shape=(1,) * 9)}, bytes(4)),
    "257 characters": raw({"a" * (MAX_NAME + 1): entry()}, bytes(4)),
    "0 characters": raw({"": entry()}, bytes(4)),
    "cannot be named": raw({"\ud800": entry()}, bytes(4)),
    "not a list of two integers": raw({"a": entry(end=None)}, bytes(4)),
    "run backwards": raw({"a": entry(begin=4, end=0)}, bytes(4)),
    "negative": raw({"a": entry(begin=-4, end=0)}, bytes(4)),
    "12 bytes, but its offsets span 4": raw({"a": entry(shape=(3,))}, bytes(4)),
    "overlaps": raw({"a": entry(), "b": entry(begin=2, end=6)}, bytes(6)),
    "leaves a gap": raw({"a": entry(), "b": entry(begin=5, end=9)}, bytes(9)),
    "the tensors take 4 bytes, only 3": raw({"a": entry()}, bytes(3)),
    "1 bytes follow the last tensor": raw({"a": entry()}, bytes(5)),
    "other than 0 and 1": raw({"a": entry(shape=(4,), dtype="BOOL")}, b"\0\1\2\0"),
    "__metadata__ is a list": raw({"__metadata__": []}),
    "not a string that maps": raw({"__metadata__": {"a": 1}}),
    "half a surrogate": raw({"__metadata__": {"a": "\udc00"}}),
    "lists 65537 tensors": raw({f"{i:05d}": 0 for i in range(MAX_TENSORS + 1)}),
}


@pytest.mark.parametrize("message", MALFORMED)
def test_each_malformed_file_has_its_own_message(message: str) -> None:
    with pytest.raises(TensorFormatError, match=message.strip()):
        decode(MALFORMED[message])


def test_the_limits_themselves_are_allowed() -> None:
    tensors = {"n" * MAX_NAME: np.ones((1,) * 8, np.float32)}
    assert_same(decode(joined(tensors))[0], tensors)
    many = {str(i): np.empty(0, np.uint8) for i in range(MAX_TENSORS)}
    assert len(decode(joined(many))[0]) == MAX_TENSORS


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a": np.ones(1, np.complex64)}, {}, "dtype complex64, supported are"),
        ({"a": np.array(["x"])}, {}, "dtype <U1"),
        ({"a": np.ones((1,) * 9, np.uint8)}, {}, "rank 9"),
        ({"": np.ones(1, np.uint8)}, {}, "0 characters"),
        ({"__metadata__": np.ones(1, np.uint8)}, {}, "cannot be named"),
        ({}, {"a": 1}, "not a string"),
        ({}, {"a": "x" * MAX_HEADER_BYTES}, "the header would have"),
        (dict.fromkeys(map(str, range(MAX_TENSORS + 1)), np.ones(1)), {}, "65537 tensors"),
    ],
)
def test_what_cannot_be_written_is_refused(tensors: Any, metadata: Any, message: str) -> None:
    with pytest.raises(TensorFormatError, match=message):
        encode(tensors, metadata)


def test_any_single_bit_flip_of_the_head_is_read_or_refused_as_ours() -> None:
    data = joined({"w": np.ones((2, 3), np.float32), "m": np.array([True, False])}, {"k": "v"})
    head = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for bit in range(head * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            decode(bytes(damaged))
        except TensorFormatError:
            refused += 1
    assert refused > head * 4  # most flips; those inside names and metadata make another valid file


@settings(max_examples=300)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=9),
        lambda s: (
            st.lists(s) | st.dictionaries(st.sampled_from(["__metadata__", "dtype", "shape", "data_offsets", "a"]), s)
        ),
    ),
    st.binary(max_size=16),
)
def test_only_our_error_leaves_the_reader(header: Any, data: bytes) -> None:
    with contextlib.suppress(TensorFormatError):
        decode(raw(header, data))
