"""Checkpoint bytes: what is written is read back, and nothing else is."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelocal.errors import CheckpointError, DivergedError
from edgelocal.storage.state import MAGIC, SEAL_BYTES, DamagedCheckpointError, TrainingState, decode_state, encode_state
from edgelocal.storage.tensors import Array, encode

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def state(**progress: Any) -> TrainingState:
    tensors: dict[str, Array] = {
        "param/w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "opt/step": np.array(3, np.int64),
    }
    return TrainingState(progress, tensors)


def written(value: TrainingState, fingerprint: str = "abc") -> bytes:
    return b"".join(encode_state(value, fingerprint))


def sealed(metadata: dict[str, str], payload: bytes | None = None) -> bytes:
    """A checkpoint with any content under a correct seal."""
    data = (b"".join(encode({}, metadata)) if payload is None else payload) + MAGIC
    return data + hashlib.sha256(data).digest()


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), json_values, max_size=4))
def test_round_trip(progress: dict[str, Any]) -> None:
    found = decode_state(written(state(k=progress)), "abc")
    assert found.progress == {"k": progress}
    for name, tensor in state().tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found.tensors[name], tensor, strict=True)


def test_large_integers_of_a_generator_survive() -> None:
    generator = np.random.default_rng(7).bit_generator.state
    assert decode_state(written(state(rng=generator)), "abc").progress["rng"] == generator


def test_without_its_seal_a_checkpoint_is_a_safetensors_file() -> None:
    reference = pytest.importorskip("safetensors.numpy")
    found = reference.load(written(state(epoch=1))[:-SEAL_BYTES])
    np.testing.assert_array_equal(found["param/w"], state().tensors["param/w"])


def test_equal_states_have_equal_bytes() -> None:
    reordered = TrainingState({"b": 1, "a": 2}, dict(reversed(state().tensors.items())))
    assert written(reordered) == written(state(a=2, b=1))


def test_every_bit_is_guarded() -> None:
    data = written(state(epoch=1))
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedCheckpointError):
            decode_state(bytes(damaged), "abc")


def test_every_truncation_and_an_extension_is_found() -> None:
    data = written(state(epoch=1))
    for length in range(len(data)):
        with pytest.raises(DamagedCheckpointError, match="seal"):
            decode_state(data[:length], "abc")
    with pytest.raises(DamagedCheckpointError, match="extended"):
        decode_state(data + b"\0", "abc")


def test_another_fingerprint_is_refused_with_both_named() -> None:
    with pytest.raises(CheckpointError, match=r"found fingerprint 'abc', expected 'xyz'.*--resume never") as caught:
        decode_state(written(state()), "xyz")
    assert not isinstance(caught.value, DamagedCheckpointError)


GOOD = {"format": "edgelocal-checkpoint", "version": "1", "fingerprint": "abc", "progress": "{}"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not an edgelocal checkpoint: format 'other'"),
        ({"version": "2"}, "version 2, this edgelocal reads up to 1: upgrade"),
        ({"version": "x"}, "version 'x', expected a number"),
        ({"version": ""}, "expected a number"),
        ({"progress": "{"}, "not valid JSON"),
        ({"progress": "[" * 100_000}, "not valid JSON"),
        ({"progress": "[]"}, "is a list, not an object"),
        ({"progress": '{"a":1,"a":2}'}, "not valid JSON: duplicate key 'a'"),
    ],
)
def test_a_sealed_but_foreign_file_says_why(change: dict[str, str], message: str) -> None:
    assert decode_state(sealed(GOOD), "abc").progress == {}
    with pytest.raises(CheckpointError, match=message) as caught:
        decode_state(sealed(GOOD | change), "abc")
    assert type(caught.value) is CheckpointError


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_sealed_tensor_that_is_not_finite_is_refused(value: float) -> None:
    payload = b"".join(encode({"a": np.ones(2, np.float32), "b": np.full(3, value, np.float32)}, GOOD))
    with pytest.raises(CheckpointError, match="tensor 'b' of the checkpoint holds a value that is not finite"):
        decode_state(sealed({}, payload), "abc")


def test_a_sealed_but_malformed_payload_is_refused() -> None:
    with pytest.raises(CheckpointError, match="sealed but malformed"):
        decode_state(sealed({}, b"12345678"), "abc")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("place", [0, 50, 99])
def test_what_is_not_finite_is_never_encoded(value: float, dtype: type, place: int) -> None:
    tensor: Array = np.zeros(100, dtype)
    tensor[place] = value
    with pytest.raises(DivergedError, match="'param/bad' holds a value that is not finite"):
        encode_state(TrainingState({}, {"param/good": np.ones(2), "param/bad": tensor}), "abc")


def test_progress_that_is_not_finite_is_never_encoded() -> None:
    with pytest.raises(DivergedError, match="finite numbers only"):
        encode_state(state(loss=float("nan")), "abc")


def test_empty_tensors_and_extreme_values_are_finite() -> None:
    tensors = {"empty": np.empty((0, 3), np.float32), "max": np.full(3, np.finfo(np.float32).max)}
    assert set(decode_state(written(TrainingState({}, tensors)), "abc").tensors) == set(tensors)


def test_written_bytes_stay_within_five_percent_of_the_tensors() -> None:
    tensors = {f"param/unit{i}.conv.weight": np.zeros((16, 16, 3, 3), np.float32) for i in range(30)}
    progress = {"epoch": 3, "rng": np.random.default_rng(1).bit_generator.state}
    size = len(written(TrainingState(progress, tensors)))
    assert size <= 1.05 * sum(tensor.nbytes for tensor in tensors.values())


def test_metadata_is_plain_json_text() -> None:
    data = written(state(epoch=1))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["progress"]) == {"epoch": 1}
