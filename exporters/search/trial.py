"""Blocks that are not exported yet, as the device would have them, and what its own arithmetic says they need there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from edgelocal.bundle.manifest import render_manifest
from edgelocal.bundle.spec import (
    AccumulationSpec,
    BlockMemorySpec,
    BlockSpec,
    FileSpec,
    FrontierSpec,
    GraphSpec,
    MacsSpec,
    Manifest,
    graphs_of,
)
from edgelocal.commands.plan import PlanRequest, assumed_work
from edgelocal.exporters.memory.liveness import RULES
from edgelocal.exporters.memory.optimise import optimise
from edgelocal.exporters.request import ExportRequest
from edgelocal.exporters.rules import LocalBlock
from edgelocal.exporters.target_graphs import training_graph
from edgelocal.machine.profiles import ASSUMED_SAMPLES, PROFILES, idle_process_bytes
from edgelocal.memory.needs import PipelineBytes, block_needs, has_convolutions
from edgelocal.memory.peaks import Workload
from edgelocal.memory.plan import make_thresholds

THREADS = max(profile.cores for profile in PROFILES)  # of the device; a loaded graph has something for each of them


def trial_block(block: LocalBlock, request: ExportRequest, shape: tuple[int, ...], dtype: torch.dtype) -> BlockSpec:
    """The block with its step graph alone, which stands in for the others: none of them needs more. Of its MACs only
    `recomputed` is filled in."""
    exported = training_graph("step", block, request, shape, dtype, request.targets[0])
    lean = optimise(exported, request.defaults.batch, RULES[request.targets[0]])
    step = GraphSpec(
        f"blocks/{block.name}/step.onnx",
        exported.inputs,
        exported.outputs,
        lean.structure,
        lean.in_place,
        len(lean.model.graph.node),
    )
    weights = tuple(t for t in step.inputs if t.kind in ("param", "buf"))
    forward = replace(step, inputs=(step.inputs[0], *weights), outputs=step.outputs[:1], in_place=())
    head = None if block.auxiliary is None else forward
    model = lean.memory
    memory = BlockMemorySpec(model, model, model, model, None if head is None else model)
    return BlockSpec(
        name=block.name,
        units=block.unit_names,
        step=step,
        forward=forward,
        head=head,
        weights=f"blocks/{block.name}/weights.safetensors",
        masks=exported.masks,
        accumulation=AccumulationSpec(step, step),
        memory=memory,
        macs=MacsSpec(0, 0, 0, 0, lean.recomputed),
    )


def working_set(spec: BlockSpec, batch: int, convolves: bool) -> int:
    """Bytes above the idle process while the step runs on a whole batch and nothing else is loaded, without data;
    `convolves` says whether any block of the network has convolutions."""
    no_data = PipelineBytes(0, 0)
    needs = (block_needs(spec),)
    alone = Workload(needs, batch, batch, "interleaved", 0, 0, lambda n: no_data, False, THREADS, convolves)
    graphs = alone.graph_bytes(alone.uncut, every=False)
    return alone.arena(alone.uncut).total + alone.beside(alone.uncut, graphs)


def arena_parts(spec: BlockSpec, batch: int) -> tuple[int, int]:
    """Bytes of the arena that a step has whatever the batch, and those that are there because of the batch."""
    assert spec.memory is not None, "blocks of this schema have a memory model"
    model = spec.memory.step
    peak = model.peak(batch)
    fixed = min(peak.activations.fixed + peak.gradients.fixed + peak.workspace.fixed, model.arena_bytes(batch))
    return fixed, model.arena_bytes(batch) - fixed


def partition_point(kind: str, specs: Sequence[BlockSpec], macs: int, batch: int) -> FrontierSpec:
    """These blocks in the trade-off; `macs` are those of training a sample without what is computed again."""
    again = sum(spec.macs.recomputed for spec in specs if spec.macs is not None)
    convolves = has_convolutions(specs)
    largest = max(working_set(spec, batch, convolves) for spec in specs)
    return FrontierSpec(kind, len(specs), largest, macs + again, False, batch, estimated=False)


def whole_batch_budget(specs: Sequence[BlockSpec], request: ExportRequest) -> int:
    """The smallest budget with which `edgelocal plan` keeps the batch whole on a device with a profile.

    The process, the data pipeline of ASSUMED_SAMPLES and validation are in it; graphs and states that wait are not.
    """
    names = [f"{index:03}" for index in range(len(specs))]
    manifest = _manifest([replace(s, name=name) for s, name in zip(specs, names, strict=True)], request)
    samples = ASSUMED_SAMPLES
    plan = PlanRequest(
        Path(), "auto", None, None, "interleaved", samples, validate=True, augment=True, profile=None, threads=THREADS
    )
    idle = idle_process_bytes(len(render_manifest(manifest)))
    found = make_thresholds(assumed_work(manifest, plan, idle, THREADS)).batch
    assert found is not None, "the host takes any batch with some budget"
    return found


def _manifest(specs: Sequence[BlockSpec], request: ExportRequest) -> Manifest:
    """What the bundle of these blocks would say; its length is about right."""
    inputs = {t.name: t for spec in specs for t in spec.forward.inputs}
    manifest = Manifest(
        network=request.network,
        seed=request.seed,
        units=tuple(unit for spec in specs for unit in spec.units),
        rule=request.rule,
        input=request.input,
        task=request.task,
        optimizer=request.optimizer.spec(),
        augment=request.augment,
        defaults=request.defaults,
        blocks=tuple(specs),
        predict=GraphSpec("predict.onnx", tuple(inputs.values()), specs[-1].forward.outputs),
        versions={},
        files={},
    )
    names = [f"{number}-{graph.file}" for number, graph in enumerate(graphs_of(manifest))]
    weights = [f"{number}-{spec.weights}" for number, spec in enumerate(specs)]
    return replace(manifest, files={name: FileSpec(1 << 20, "0" * 64) for name in (*names, *weights)})
