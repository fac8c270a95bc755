"""Which graphs a device takes out of a bundle for one target or two."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from device_tests.device.runs import ARTIFACTS, RESIDUAL
from edgelocal.bundle.manifest import parse_manifest, render_manifest
from edgelocal.bundle.spec import BlockSpec, FileSpec, Manifest, TargetSpec, graphs_of
from edgelocal.bundle.targets import for_device
from edgelocal.errors import BundleError

WHOLE = parse_manifest((ARTIFACTS / "manifest.json").read_bytes())


def with_second(block: BlockSpec) -> BlockSpec:
    """With graphs for CUDA that differ in file, nodes and memory."""
    assert block.accumulation is not None
    assert block.memory is not None
    step, gradient = block.step, block.accumulation.gradient
    second = TargetSpec(
        dataclasses.replace(step, file=f"blocks/{block.name}/cuda/step.onnx", nodes=7, structure="s"),
        dataclasses.replace(gradient, file=f"blocks/{block.name}/cuda/gradient.onnx", nodes=8, structure="g"),
        step_memory=block.memory.apply,
        gradient_memory=block.memory.forward,
        recomputed=99,
    )
    return dataclasses.replace(block, cuda=second)


def both(**changes: Any) -> Manifest:
    """The golden manifest for both targets; its last block has one set of graphs for both."""
    *first, last = WHOLE.blocks
    blocks = (*map(with_second, first), last)
    named = {f"blocks/{b.name}/cuda/{kind}.onnx": FileSpec(1, "0" * 64) for b in first for kind in ("step", "gradient")}
    given = {"target": "both", "precision": "float32", "schema": 4, "blocks": blocks, "files": WHOLE.files | named}
    return dataclasses.replace(WHOLE, **(given | changes))


def test_a_manifest_for_both_targets_is_read_as_it_was_written() -> None:
    manifest = both()
    assert parse_manifest(render_manifest(manifest)) == manifest
    assert sum("/cuda/" in graph.file for graph in graphs_of(manifest)) == 2 * (len(WHOLE.blocks) - 1)


def test_the_cpu_gets_the_first_graphs() -> None:
    found = for_device(both(), "cpu")
    assert found.blocks == WHOLE.blocks
    assert found.target == "cpu"
    assert parse_manifest(render_manifest(found)) == found


def test_cuda_gets_the_second_graphs_with_their_memory() -> None:
    found = for_device(both(), "cuda")
    assert found.target == "cuda"
    assert parse_manifest(render_manifest(found)) == found
    first, own = found.blocks[0], WHOLE.blocks[0]
    assert first.accumulation is not None
    assert own.accumulation is not None
    assert first.memory is not None
    assert own.memory is not None
    assert (first.step.file, first.step.nodes) == ("blocks/00/cuda/step.onnx", 7)
    assert (first.accumulation.gradient.file, first.accumulation.apply) == (
        "blocks/00/cuda/gradient.onnx",
        own.accumulation.apply,
    )
    assert first.memory.step == own.memory.apply
    assert first.memory.gradient == own.memory.forward
    assert first.memory.apply == own.memory.apply
    assert first.macs is not None
    assert first.macs.recomputed == 99
    assert first.state() == own.state()
    assert found.blocks[-1] == WHOLE.blocks[-1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_bundle_for_one_target_serves_every_device(target: str, device: Any) -> None:
    manifest = both(target=target, blocks=WHOLE.blocks)
    assert for_device(manifest, device) is manifest


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_bundle_from_before_there_were_targets_serves_every_device(device: Any) -> None:
    manifest = parse_manifest((RESIDUAL / "manifest.json").read_bytes())
    assert manifest.target is None
    assert for_device(manifest, device) is manifest


def test_products_in_bfloat16_are_refused_on_the_cpu() -> None:
    manifest = both(target="cuda", precision="bfloat16", blocks=WHOLE.blocks)
    assert for_device(manifest, "cuda") is manifest
    with pytest.raises(BundleError, match=r"matrix products in bfloat16.*--device cuda.*--precision float32"):
        for_device(manifest, "cpu")


def edited_second(**changes: Any) -> tuple[BlockSpec, ...]:
    first = with_second(WHOLE.blocks[0])
    assert first.cuda is not None
    return (dataclasses.replace(first, cuda=dataclasses.replace(first.cuda, **changes)), *WHOLE.blocks[1:])


STEP = WHOLE.blocks[0].step
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("no target", {"target": None}, "manifest.target: expected one of"),
    ("another target", {"target": "npu"}, "manifest.target: expected one of"),
    ("no precision", {"precision": None}, "manifest.precision: expected one of"),
    ("float16", {"precision": "float16"}, "manifest.precision: expected one of"),
    ("bfloat16 for both", {"precision": "bfloat16"}, "precision: expected float32 for the target both"),
    ("a target too early", {"schema": 3}, "expected no target, in this schema"),
    ("two sets for one target", {"target": "cuda"}, "cuda: expected no graphs of their own in a bundle for one"),
    ("MACs below 0", {"blocks": edited_second(recomputed=-1)}, "at least 0 MACs done twice"),
    (
        "other inputs",
        {"blocks": edited_second(step=dataclasses.replace(STEP, inputs=STEP.inputs[:-1], in_place=()))},
        "expected the inputs and outputs of",
    ),
    ("the same file", {"blocks": edited_second(step=STEP)}, "expected files of its own"),
    (
        "a file that is not there",
        {"blocks": edited_second(step=dataclasses.replace(STEP, file="blocks/00/other.onnx"))},
        "a file listed in files",
    ),
]


@pytest.mark.parametrize(("changes", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        parse_manifest(render_manifest(both(**changes)))
