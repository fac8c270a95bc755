"""Which graphs of a bundle a device runs.

All graphs are standard ONNX and run on any device, only not at their best: a bundle for one target serves the other
too. A bundle for both has a second set of the graphs that differ. What `for_device` returns describes one set, so that
nothing else has to know of two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from edgelocal.bundle.spec import BlockSpec, Manifest, TargetSpec
from edgelocal.errors import BundleError

Device = Literal["cpu", "cuda"]


def for_device(manifest: Manifest, device: Device) -> Manifest:
    """The manifest whose blocks have the graphs for this device; itself if the bundle has but one set of them.

    Raises:
        BundleError: the graphs cannot run there.
    """
    if manifest.precision == "bfloat16" and device == "cpu":
        raise BundleError(
            "this bundle has matrix products in bfloat16, which ONNX Runtime has no kernel for on the CPU: train with "
            "--device cuda, or export with --precision float32"
        )
    if manifest.target != "both":
        return manifest
    blocks = tuple(replace(_chosen(block, device), cuda=None) for block in manifest.blocks)
    return replace(manifest, target=device, blocks=blocks)


def _chosen(block: BlockSpec, device: Device) -> BlockSpec:
    return block if device == "cpu" or block.cuda is None else _with(block, block.cuda)


def _with(block: BlockSpec, other: TargetSpec) -> BlockSpec:
    """The block with the graphs of another target instead of its own."""
    assert block.accumulation is not None, "a bundle for two targets has a memory model and an accumulation"
    assert block.memory is not None, "as above"
    return replace(
        block,
        step=other.step,
        accumulation=replace(block.accumulation, gradient=other.gradient),
        memory=replace(block.memory, step=other.step_memory, gradient=other.gradient_memory),
        macs=None if block.macs is None else replace(block.macs, recomputed=other.recomputed),
    )
