"""Joining graphs and binding weights on the level of the file format, checked by ONNX Runtime."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_tests.device.runs import DROPOUT, RESIDUAL
from edgelocal.bundle.folder import Bundle, open_bundle
from edgelocal.bundle.onnx_wire import bind, compose, fields, put_together, render, take_apart
from edgelocal.errors import BundleError
from edgelocal.storage.tensors import Array


def run(model: bytes, feeds: dict[str, Array]) -> Array:
    """The first output of a model on those of the feeds that it wants."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    result: Array = session.run(None, {k: v for k, v in feeds.items() if k in wanted})[0]
    return result


def all_weights(bundle: Bundle) -> dict[str, Array]:
    return {name: a for block in bundle.manifest.blocks for name, a in bundle.weights(block).items()}


def samples(bundle: Bundle) -> Array:
    return np.random.default_rng(0).normal(size=(5, *bundle.manifest.input.shape)).astype(np.float32)


def chained(bundle: Bundle, x: Array, last: int) -> Array:
    """The forward graphs one after the other, each in a session of its own."""
    for block in bundle.manifest.blocks[: last + 1]:
        x = run(bundle.read(block.forward.file), {"x": x, **bundle.weights(block)})
    return x


@pytest.mark.parametrize("folder", [RESIDUAL, DROPOUT])
def test_taking_apart_and_putting_together_changes_no_field(folder: Path) -> None:
    for path in folder.rglob("*.onnx"):
        model = path.read_bytes()
        assert render(fields(model)) == model
        again = put_together(take_apart(model))
        assert len(again) == len(model)
        assert take_apart(again) == take_apart(model)


@pytest.mark.parametrize("folder", [RESIDUAL, DROPOUT])
def test_predict_is_the_blocks_in_a_row(folder: Path) -> None:
    bundle = open_bundle(folder)
    x = samples(bundle)
    predicted = run(bundle.read("predict.onnx"), {"x": x, **all_weights(bundle)})
    np.testing.assert_allclose(predicted, chained(bundle, x, len(bundle.manifest.blocks) - 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exit_block", [0, 1])
def test_an_early_exit_is_the_blocks_and_the_head_in_a_row(exit_block: int) -> None:
    bundle = open_bundle(RESIDUAL)
    x = samples(bundle)
    blocks = bundle.manifest.blocks
    head = blocks[exit_block].head
    assert head is not None
    models = [bundle.read(b.forward.file) for b in blocks[: exit_block + 1]] + [bundle.read(head.file)]
    bound = bind(compose(models), all_weights(bundle))
    h = chained(bundle, x, exit_block)
    expected = run(bundle.read(head.file), {"h": h, **bundle.weights(blocks[exit_block])})
    np.testing.assert_allclose(run(bound, {"x": x}), expected, rtol=1e-5, atol=1e-6)


def test_a_bound_model_wants_only_x_and_any_batch() -> None:
    bundle = open_bundle(RESIDUAL)
    session = onnxruntime.InferenceSession(bind(bundle.read("predict.onnx"), all_weights(bundle)))
    assert [i.name for i in session.get_inputs()] == ["x"]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    for batch in (1, 3):
        x = np.zeros((batch, *bundle.manifest.input.shape), dtype=np.float32)
        assert session.run(None, {"x": x})[0].shape == (batch, bundle.manifest.task.classes)


def test_a_missing_weight_is_named() -> None:
    bundle = open_bundle(RESIDUAL)
    with pytest.raises(BundleError, match="the model wants 'param/"):
        bind(bundle.read("predict.onnx"), {})


def test_only_bundle_errors_leave_under_damaged_bytes() -> None:
    """The whole way of `finish`: join, bind, with damage in one of the two graphs."""
    rng = random.Random(0)
    bundle = open_bundle(RESIDUAL)
    models = [bundle.read(b.forward.file) for b in bundle.manifest.blocks[:2]]
    weights = all_weights(bundle)
    refused = 0
    for _ in range(2000):
        bad = bytearray(rng.choice(models))
        for _ in range(rng.choice((1, 1, 2, 4))):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        damaged = bytes(bad[: rng.randrange(len(bad))] if rng.random() < 0.2 else bad)
        try:
            joined = compose([damaged, models[1]] if rng.random() < 0.5 else [models[0], damaged])
            bind(joined, weights)
        except BundleError:
            refused += 1
        else:
            assert render(fields(joined)) == joined
    assert refused > 500


@given(st.binary(max_size=40))
def test_any_bytes_are_fields_or_refused(data: bytes) -> None:
    """What is read as fields is written back; only a number that was written too long comes back shorter."""
    try:
        found = tuple(fields(data))
    except BundleError:
        return
    assert tuple(fields(render(found))) == found
    assert len(render(found)) <= len(data)


def field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2, len(value)]) + value


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"", "holds 0 graphs, expected one"),
        (field(7, b"") * 2, "holds 2 graphs, expected one"),
        (b"\x38\x01", "field 7 has wire type 0"),
        (field(7, b""), "has no inputs or no outputs"),
        (field(7, field(11, b"") + b"\x60\x01"), "field 12 has wire type 0"),
        (b"\x3b", "wire type 3 at byte 1"),
        (b"\x3a\x05ab", "a field of 5 bytes runs past its end"),
        (b"\x3d\x00", "a field of 4 bytes runs past its end"),
        (b"\x80" * 12, "a number runs past its end"),
        (field(7, field(11, field(1, b"\xff")) + field(12, b"")), r"b'\\xff' is no name"),
    ],
)
def test_what_is_no_model_is_refused_by_reason(model: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        compose([model])
