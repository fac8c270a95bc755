"""Manifests: what is rendered is parsed, everything else is refused by name, and only BundleError leaves the parser."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_tests.device.runs import DROPOUT, RESIDUAL, disturb
from edgelocal.bundle.manifest import MAX_MANIFEST_BYTES, SEAL, is_plain, parse_manifest, render_manifest, seal
from edgelocal.bundle.spec import (
    AugmentSpec,
    DefaultsSpec,
    FileSpec,
    InputSpec,
    Manifest,
    RuleSpec,
    TensorSpec,
)
from edgelocal.errors import BundleError

Edit = Callable[[dict[str, Any]], Any]
WHOLE = {path: (path / "manifest.json").read_bytes() for path in (RESIDUAL, DROPOUT)}
BODY = b"{" + WHOLE[DROPOUT][len(SEAL) + 66 :]
SCALAR = {"name": "z", "shape": [], "dtype": "float32"}
numbers = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12)


def edited(edit: Edit) -> bytes:
    raw = json.loads(BODY)
    edit(raw)
    return seal(json.dumps(raw).encode())


def step(raw: dict[str, Any]) -> dict[str, Any]:
    graph: dict[str, Any] = raw["blocks"][0]["step"]
    return graph


def tensor(raw: dict[str, Any], name: str, side: str = "inputs") -> dict[str, Any]:
    """Input or output `name` of the step graph of block 00."""
    return next(t for t in step(raw)[side] if t["name"] == name)


def reshaped(raw: dict[str, Any], name: str, shape: list[int]) -> None:
    """State `name` of another shape, before and after the step."""
    tensor(raw, name).update(shape=shape)
    tensor(raw, f"new/{name}", "outputs").update(shape=shape)


def renamed(name: str) -> Edit:
    return lambda raw: raw["files"].update({name: raw["files"]["predict.onnx"]})


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.name)
def test_golden_manifests_round_trip(path: Any) -> None:
    manifest = parse_manifest(WHOLE[path])
    assert json.loads(render_manifest(manifest)) == json.loads(WHOLE[path])
    assert parse_manifest(render_manifest(manifest)) == manifest


@given(
    st.builds(RuleSpec, words, st.integers(), numbers, st.integers(), words),
    st.builds(AugmentSpec, st.integers(0, 9), st.sampled_from(["reflect", "zero"]), st.booleans()),
    st.builds(DefaultsSpec, st.integers(1), st.integers(1), st.floats(0, 9), st.just("step")),
    st.lists(words),
    st.dictionaries(words, words),
    st.integers(),
)
def test_round_trip(
    rule: RuleSpec,
    augment: AugmentSpec,
    defaults: DefaultsSpec,
    units: list[str],
    versions: dict[str, str],
    seed: int,
) -> None:
    base = parse_manifest(WHOLE[DROPOUT])
    changes: dict[str, Any] = {"rule": rule, "augment": augment, "defaults": defaults, "versions": versions}
    manifest = dataclasses.replace(base, units=tuple(units), seed=seed, **changes)
    assert parse_manifest(render_manifest(manifest)) == manifest


def test_the_golden_values_are_read_as_they_were_written() -> None:
    manifest = parse_manifest(WHOLE[RESIDUAL])
    assert [b.units for b in manifest.blocks] == [("a",), ("b",), ("c",)]
    assert manifest.input == InputSpec((1, 8, 8), (0.5,), (0.5,))
    assert manifest.optimizer.hyper == {"momentum": 0.9, "weight_decay": 1e-4}
    assert manifest.blocks[0].step.inputs[0] == TensorSpec("x", ("N", 1, 8, 8), "float32")
    assert manifest.blocks[0].step.inputs[0].resolve(5) == (5, 1, 8, 8)
    assert {t.kind for t in manifest.blocks[0].state()} == {"param", "opt", "buf"}
    assert parse_manifest(WHOLE[DROPOUT]).blocks[1].masks[0].keep == 0.5


def modelled(*arena: tuple[int, ...]) -> Edit:
    """With a memory model for block 00."""
    size = {"fixed": 0, "per_sample": 4}
    peak = {"activations": size, "gradients": size, "workspace": size}
    model = {"peaks": [peak], "arena": [list(point) for point in arena]}
    return lambda raw: raw["blocks"][0].update(memory=dict.fromkeys(("step", "gradient", "apply", "forward"), model))


def test_what_lives_is_touched_whatever_a_memory_model_says() -> None:
    """Where the table says less than the peaks, the peaks count: 3 kinds of 4 bytes a sample."""
    manifest = parse_manifest(edited(modelled((1, 0, 0), (2, 8, 8))))
    memory = manifest.blocks[0].memory
    assert memory is not None
    assert [memory.step.arena_at(n).touched for n in (1, 2)] == [12, 24]
    assert memory.step.region_bytes(2) == 24


def test_a_memory_model_is_read_with_the_region_of_every_batch() -> None:
    manifest = parse_manifest(edited(modelled((1, 512, 512), (2, 1024, 1536))))
    assert manifest.blocks[0].memory is not None
    assert manifest.blocks[0].memory.step.arena == ((1, 512, 512), (2, 1024, 1536))
    assert parse_manifest(render_manifest(manifest)) == manifest


REFUSED: list[tuple[str, Edit, str]] = [
    (
        "arena in pairs",
        modelled((1, 512), (2, 1024)),
        "memory: expected batch, bytes touched and bytes of region, found",
    ),
    ("one batch of the arena", modelled((1, 512, 512)), "memory: expected batch, bytes touched and bytes of region"),
    ("batches that fall", modelled((2, 512, 512), (1, 512, 512)), "memory: expected rising batches from 1 on, found"),
    (
        "a region too small",
        modelled((1, 512, 512), (2, 1024, 1023)),
        "expected regions no smaller than what is touched",
    ),
    ("a negative arena", modelled((1, -512, 512), (2, 1024, 1024)), "memory: expected sizes in bytes"),
    ("no memory model", lambda m: m.update(schema=2), "block 00: expected its memory and its accumulation"),
    ("an escape in the network", lambda m: m.update(network="n\x1b[2J"), "has text with control characters"),
    ("a line in a unit", lambda m: m.update(units=["a\nb"]), "has text with control characters"),
    ("a bell in a version", lambda m: m["versions"].update(torch="\x07"), "has text with control characters"),
    ("a control sequence", lambda m: step(m)["inputs"][0].update(name="x\x9b"), "has text with control characters"),
    ("an escape in a key", lambda m: m["versions"].update({"\x1b[2J": "1"}), "has text with control characters"),
    ("an escape in a rule", lambda m: m["rule"].update(name="\x1b[2J"), "has text with control characters"),
    ("unknown key", lambda m: m.update(extra=1), r"manifest: unknown keys \['extra'\], missing keys \[\]"),
    ("unknown key inside", lambda m: step(m).update(a=1), r"manifest.blocks\[0\].step: unknown keys \['a'\]"),
    ("missing key", lambda m: m["task"].pop("loss"), r"manifest.task: unknown keys \[\], missing keys \['loss'\]"),
    ("string for integer", lambda m: m.update(seed="1"), "manifest.seed: expected int, found '1'"),
    ("float for integer", lambda m: m.update(seed=1.0), "manifest.seed: expected int, found '1.0'"),
    ("true for integer", lambda m: m.update(seed=True), "manifest.seed: expected int, found 'True'"),
    ("true for float", lambda m: m["rule"].update(tau=True), "rule.tau: expected a finite number, found 'True'"),
    ("integer for bool", lambda m: m["augment"].update(flip=1), "augment.flip: expected bool, found '1'"),
    ("string for list", lambda m: m.update(units="ab"), "manifest.units: expected a list, found 'ab'"),
    ("list for object", lambda m: m.update(versions=[]), "manifest.versions: expected an object"),
    ("null for object", lambda m: m.update(predict=None), "manifest.predict: expected an object, found 'None'"),
    ("null in a list", lambda m: m["units"].append(None), r"manifest.units\[2\]: expected str, found 'None'"),
    ("true as dim", lambda m: step(m)["inputs"][0].update(shape=[True]), r"shape\[0\]: expected int, found 'True'"),
    ("another format", lambda m: m.update(format="onnx"), "does not describe an edgelocal bundle"),
    ("no format", lambda m: m.pop("format"), "does not describe an edgelocal bundle"),
    ("newer schema", lambda m: m.update(schema=5), "has schema 5, this edgelocal reads up to 4: upgrade edgelocal"),
    ("schema 0", lambda m: m.update(schema=0), "schema 0, expected a positive integer"),
    ("schema as text", lambda m: m.update(schema="1"), "schema '1', expected a positive integer"),
    ("unknown loss", lambda m: m["task"].update(loss="hinge"), "manifest.task.loss: expected one of"),
    ("no classes", lambda m: m["task"].update(classes=0), "manifest.task.classes: expected at least 1, found '0'"),
    ("smoothing of 1", lambda m: m["task"].update(label_smoothing=1), "label_smoothing: expected 0 <= s < 1"),
    ("unknown padding", lambda m: m["augment"].update(mode="wrap"), "augment.mode: expected one of"),
    ("negative padding", lambda m: m["augment"].update(pad=-1), "augment.pad: expected at least 0, found '-1'"),
    ("batch of 0", lambda m: m["defaults"].update(batch=0), "defaults.batch: expected at least 1, found '0'"),
    ("no epochs", lambda m: m["defaults"].update(epochs=0), "defaults.epochs: expected at least 1, found '0'"),
    ("no blocks", lambda m: m.update(blocks=[]), "manifest.blocks: expected at least one block"),
    ("parent path", renamed("../x"), r"manifest.files: expected a plain relative path, found '../x'"),
    ("parent inside", renamed("a/../../x"), "expected a plain relative path"),
    ("absolute path", renamed("/etc/passwd"), "expected a plain relative path, found '/etc/passwd'"),
    ("windows path", renamed("C:x"), "expected a plain relative path"),
    ("backslash", renamed("a\\x"), "expected a plain relative path"),
    ("nul in path", renamed("a\0x"), "has text with control characters"),
    ("double slash", renamed("a//x"), "expected a plain relative path"),
    ("dot", renamed("./x"), "expected a plain relative path"),
    ("empty path", renamed(""), "expected a plain relative path"),
    ("long path", renamed("a" * 257), "expected a plain relative path"),
    ("half a surrogate pair in a path", renamed("a\ud800x"), "is not valid JSON .*surrogates not allowed"),
    ("unlisted graph", lambda m: m["files"].pop("predict.onnx"), "predict.onnx: expected a file listed in files"),
    ("unlisted weights", lambda m: m["files"].pop("blocks/01/weights.safetensors"), "expected files that are listed"),
    ("negative size", lambda m: m["files"]["predict.onnx"].update(size=-1), "predict.onnx: expected a size and a sha"),
    ("short sha256", lambda m: m["files"]["predict.onnx"].update(sha256="00"), "expected a size and a sha256"),
    ("rank 9", lambda m: step(m)["inputs"][0].update(shape=[1] * 9), "step.onnx: x: expected at most 8 dimensions"),
    ("no name", lambda m: step(m)["inputs"][0].update(name=""), "expected a name of 1 to 256 characters"),
    ("long name", lambda m: step(m)["inputs"][0].update(name="n" * 257), "expected a name of 1 to 256 characters"),
    ("dtype", lambda m: step(m)["inputs"][0].update(dtype="float16"), r"x: expected one of \('float32', 'int64'"),
    ("zero dim", lambda m: step(m)["inputs"][0].update(shape=["N", 0]), "x: expected positive dims"),
    ("other symbol", lambda m: step(m)["inputs"][0].update(shape=["M", 1]), "x: expected positive dims"),
    ("too large", lambda m: step(m)["inputs"][0].update(shape=[1 << 40]), r"x: expected fewer than 2\^40 elements"),
    ("integer beyond floats", lambda m: m["rule"].update(tau=10**400), "rule.tau: expected a finite number"),
    ("NaN", lambda m: m["defaults"].update(lr=float("nan")), "defaults.lr: expected a finite number, found 'nan'"),
    ("infinity", lambda m: m["defaults"].update(lr=-float("inf")), "defaults.lr: expected a finite number"),
    ("no input shape", lambda m: m["input"].update(shape=[]), "manifest.input.shape: expected a positive shape"),
    ("negative input", lambda m: m["input"].update(shape=[3, -1]), "manifest.input.shape: expected a positive shape"),
    ("means", lambda m: m["input"].update(mean=[0.0] * 5), "manifest.input: expected 1 or 12 means and deviations"),
    ("zero deviation", lambda m: m["input"].update(std=[0.0]), "input.std: expected positive deviations"),
    ("input dtype", lambda m: m["input"].update(dtype="bool"), "input.dtype: expected float32 or int64"),
    ("no outputs", lambda m: step(m).update(outputs=[]), "step.onnx: output 0: expected 'h', found 'nothing'"),
    ("no h", lambda m: step(m)["outputs"].pop(0), "step.onnx: output 0: expected 'h', found 'loss'"),
    ("no loss", lambda m: step(m)["outputs"].pop(1), "step.onnx: output 1: expected 'loss', found 'correct'"),
    ("no metric", lambda m: step(m)["outputs"].pop(2), "step.onnx: output 2: expected 'correct', found 'new/param"),
    ("lost state", lambda m: step(m)["outputs"].pop(), "expected 'new/opt/step', found 'nothing'"),
    ("one output more", lambda m: step(m)["outputs"].append(SCALAR), "expected 'nothing', found 'z'"),
    ("one output twice", lambda m: step(m)["outputs"].append(step(m)["outputs"][0]), "a name of its own for each"),
    ("no x", lambda m: step(m)["inputs"].pop(0), "step.onnx: input 0: expected 'x', found 'y'"),
    ("no y", lambda m: step(m)["inputs"].pop(1), "step.onnx: input 1: expected 'y', found 'lr'"),
    ("forward of nothing", lambda m: m["blocks"][0]["forward"].update(inputs=[]), "forward.onnx: input 0: expected"),
    ("forward to logits", lambda m: m["blocks"][0]["forward"]["outputs"][0].update(name="logits"), "expected 'h'"),
    ("head to h", lambda m: m["blocks"][0]["head"]["outputs"][0].update(name="h"), "expected 'logits'"),
    ("predict to h", lambda m: m["predict"]["outputs"][0].update(name="h"), "predict.onnx: output 0: expected"),
    (
        "loss of shape 3",
        lambda m: tensor(m, "loss", "outputs").update(shape=[3]),
        "loss: expected the shape of a number",
    ),
    ("correct of N", lambda m: tensor(m, "correct", "outputs").update(shape=["N"]), "correct: expected the shape of"),
    (
        "mask of no input",
        lambda m: m["blocks"][0]["masks"][0].update(name="rand/9"),
        "an input for each mask, found 'rand/9'",
    ),
    ("state of N", lambda m: tensor(m, "param/0.bias").update(shape=["N"]), "param/0.bias: expected a fixed shape"),
    ("other new state", lambda m: tensor(m, "new/param/0.bias", "outputs").update(shape=[9]), "new state of the same"),
    ("other new dtype", lambda m: tensor(m, "new/opt/step", "outputs").update(dtype="int64"), "new state of the same"),
    ("huge slot", lambda m: reshaped(m, "opt/m/0.bias", [1 << 39]), r"expected the shape of its parameter, \[24\]"),
    ("slot of nothing", lambda m: reshaped(m, "opt/step", [7]), r"expected the shape of its parameter, \[\], found"),
    (
        "block without a name",
        lambda m: m["blocks"][0].update(name=""),
        "manifest.blocks: expected a plain name, found ''",
    ),
    ("block named as a path", lambda m: m["blocks"][0].update(name="../x"), "expected a plain name, found '../x'"),
    ("block with a colon", lambda m: m["blocks"][0].update(name="a:b"), "expected a plain name, found 'a:b'"),
    ("block with a line", lambda m: m["blocks"][0].update(name="a\n"), "has text with control characters"),
    ("block of a long name", lambda m: m["blocks"][0].update(name="b" * 33), "expected a plain name"),
    ("blocks of one name", lambda m: m["blocks"][1].update(name="00"), "manifest.blocks: expected a name of its own"),
]


@pytest.mark.parametrize(("edit", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(edit: Edit, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        parse_manifest(edited(edit))
    assert is_plain(str(caught.value))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not begin with a seal"),
        (b"[]", "does not begin with a seal"),
        (BODY, "does not begin with a seal"),
        (b"\xef\xbb\xbf" + WHOLE[DROPOUT], "does not begin with a seal"),
        (SEAL, "is damaged"),
        (WHOLE[DROPOUT][:-1], "is damaged"),
        (WHOLE[DROPOUT] + b"\n", "is damaged"),
        (WHOLE[DROPOUT].replace(b'"seed":0', b'"seed":1'), "is damaged, or was edited"),
        (seal(b"{\xff\xfe}"), "is not valid JSON"),
        (seal(b'{"seed":1,' + BODY[1:]), "duplicate key 'seed'"),
        (seal(BODY.replace(b'"lr":', b'"lr":1e999,"lr":', 1)), "duplicate key 'lr'"),
        (seal(b'{"a":' + b"[" * 100_000), "is not valid JSON"),
        (b" " * (MAX_MANIFEST_BYTES + 1), f"has {MAX_MANIFEST_BYTES + 1} bytes, the limit is {MAX_MANIFEST_BYTES}"),
    ],
    ids=[
        *("empty", "list", "unsealed", "byte order mark", "seal alone", "cut", "longer", "edited", "no utf-8"),
        *("twice", "twice inside", "nested", "large"),
    ],
)
def test_bytes_that_are_no_manifest_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        parse_manifest(data)


@pytest.mark.parametrize("keep", [-0.1, 1.5])
def test_a_mask_keeps_with_a_probability(keep: float) -> None:
    with pytest.raises(BundleError, match="block 00: rand/0: expected a probability"):
        parse_manifest(edited(lambda m: m["blocks"][0]["masks"][0].update(keep=keep)))


def test_every_flipped_bit_is_found() -> None:
    damaged = bytearray(WHOLE[DROPOUT])
    for bit in range(8 * len(damaged)):
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BundleError, match=r"is damaged|does not begin with a seal"):
            parse_manifest(bytes(damaged))
        damaged[bit // 8] ^= 1 << bit % 8
    assert bytes(damaged) == WHOLE[DROPOUT]


def test_a_value_over_the_largest_float_is_refused() -> None:
    text = seal(BODY.replace(b'"lr":0.01', b'"lr":1e999'))
    with pytest.raises(BundleError, match=r"defaults\.lr: expected a finite number, found 'inf'"):
        parse_manifest(text)


def test_too_many_tensors_are_refused() -> None:
    one = {"name": "x", "shape": [], "dtype": "bool"}
    with pytest.raises(BundleError, match="expected at most 65536 tensors, found '65"):
        parse_manifest(edited(lambda m: step(m).update(inputs=[one] * 65_537)))


def test_a_duplicate_among_many_keys_is_found_quickly() -> None:
    keys = b",".join(b'"%d":0' % n for n in range(200_000))
    with pytest.raises(BundleError, match="duplicate key '199999'"):
        parse_manifest(seal(b"{" + keys + b',"199999":0}'))


def parsed_or_refused(data: bytes) -> Manifest | None:
    """Anything but a manifest or a BundleError fails the test that called; a manifest must survive rendering."""
    try:
        manifest = parse_manifest(data)
    except BundleError:
        return None
    assert parse_manifest(render_manifest(manifest)) == manifest
    return manifest


def test_only_bundle_errors_leave_the_parser_under_damaged_bytes_with_a_fitting_seal() -> None:
    rng = random.Random(0)
    whole = BODY
    refused = 0
    for _ in range(2500):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        cut = data[: rng.randrange(len(data))] if rng.random() < 0.1 else data
        refused += parsed_or_refused(seal(bytes(cut))) is None
    assert refused > 1500


VALUES = [None, True, -1, 0, 1.5, 10**400, float("nan"), "", "N", "x" * 300, "\ud800", [], {}, [[]], {"": 0}, [0] * 9]


def test_only_bundle_errors_leave_the_parser_under_other_structures() -> None:
    rng = random.Random(1)
    refused = 0
    for _ in range(2000):
        raw = json.loads(BODY)
        disturb(raw, VALUES, rng)
        refused += parsed_or_refused(seal(json.dumps(raw).encode())) is None
    assert refused > 1500


def test_file_entries_are_values() -> None:
    assert parse_manifest(WHOLE[DROPOUT]).files["predict.onnx"] == FileSpec(
        **json.loads(WHOLE[DROPOUT])["files"]["predict.onnx"]
    )
