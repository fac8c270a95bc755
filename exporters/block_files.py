"""The files of a block in a bundle: its graphs, its weights, and its artifacts for ONNX Runtime's training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch

from edgelocal.bundle.spec import (
    AccumulationSpec,
    BlockMemorySpec,
    BlockSpec,
    FileSpec,
    GraphSpec,
    MacsSpec,
    OrtTrainingSpec,
    TargetSpec,
    TensorSpec,
)
from edgelocal.errors import ExportError
from edgelocal.exporters.memory.liveness import CPU_RULES, RULES
from edgelocal.exporters.memory.optimise import Lean, optimise
from edgelocal.exporters.onnx_accumulate import apply_graph
from edgelocal.exporters.onnx_block import ExportedGraph
from edgelocal.exporters.onnx_inference import forward_graph, head_graph
from edgelocal.exporters.request import ExportRequest
from edgelocal.exporters.rules import LocalBlock
from edgelocal.exporters.target_graphs import Guard, training_graph
from edgelocal.storage.tensors import Array, TensorFormatError, encode
from edgelocal.storage.whole import atomic_write
from edgelocal.training.config import ORT_TRAINING, PORTABLE


class Writer:
    """Writes the files of a bundle and remembers their sizes and digests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, FileSpec] = {}

    def write(self, name: str, chunks: Sequence[bytes | memoryview]) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        size = atomic_write(path, chunks)
        self.files[name] = FileSpec(size, digest.hexdigest())

    def model(self, name: str, model: onnx.ModelProto) -> None:
        self.write(name, [model.SerializeToString(deterministic=True)])

    def graph(self, name: str, graph: ExportedGraph, lean: Lean, *, described: bool = False) -> GraphSpec:
        """Write the lean form of a graph, or only describe it."""
        if not described:
            self.model(name, lean.model)
        return GraphSpec(
            name, graph.inputs, graph.outputs, lean.structure, lean.in_place, nodes=len(lean.model.graph.node)
        )


def write_block(
    writer: Writer,
    block: LocalBlock,
    request: ExportRequest,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    macs: MacsSpec,
) -> BlockSpec:
    """Write the files of a block whose input is (N, *shape) of `dtype`.

    Raises:
        ExportError: it cannot be exported for the runtimes that are asked for.
        UsageError: artifacts are asked for, and ONNX Runtime's training build is not installed.
    """
    own = request.targets[0]
    trained = {kind: training_graph(kind, block, request, shape, dtype, own) for kind in ("step", "gradient")}
    step, gradient = trained["step"], trained["gradient"]
    forward = forward_graph(block, shape, dtype)
    output = step.output("h")
    if output != forward.output("h"):
        raise ExportError(
            f"block {block.name} puts out {output.shape} in training and {forward.output('h').shape} in inference; "
            "a unit must have one output shape"
        )
    graphs = {**trained, "apply": apply_graph(gradient, request.optimizer), "forward": forward}
    if block.auxiliary is not None:
        graphs["head"] = head_graph(block, output.shape[1:])  # type: ignore[arg-type]  # static
    rules = {name: RULES[own] if name in trained else CPU_RULES for name in graphs}  # all others serve both targets
    lean = {name: optimise(graph, request.defaults.batch, rules[name]) for name, graph in graphs.items()}
    guard = Guard(block, request, shape, dtype)
    for name in _on_cuda(request.targets, lean):
        guard.check(name, lean[name].model, graphs[name].origins)
    replaced = trained.keys() if request.runtime == ORT_TRAINING else ()
    folder = f"blocks/{block.name}"
    specs = {
        name: writer.graph(f"{folder}/{name}.onnx", graph, lean[name], described=name in replaced)
        for name, graph in graphs.items()
    }
    weights = f"{folder}/weights.safetensors"
    writer.write(weights, _encoded(block, step.inputs))
    return BlockSpec(
        name=block.name,
        units=block.unit_names,
        step=specs["step"],
        forward=specs["forward"],
        head=specs.get("head"),
        weights=weights,
        masks=step.masks,
        accumulation=AccumulationSpec(specs["gradient"], specs["apply"]),
        memory=BlockMemorySpec(**{name: found.memory for name, found in lean.items()}),
        macs=replace(macs, recomputed=lean["step"].recomputed),
        ort_training=_write_artifacts(writer, block, request, shape, dtype, step.inputs),
        cuda=_write_second(writer, block, request, shape, dtype, trained) if len(request.targets) > 1 else None,
    )


def _on_cuda(targets: Sequence[str], names: Iterable[str]) -> list[str]:
    """Those of a block's first graphs that a CUDA device runs: for both targets it has a training step of its own."""
    if "cuda" not in targets:
        return []
    return [name for name in names if len(targets) == 1 or name not in ("step", "gradient")]


def _write_second(
    writer: Writer,
    block: LocalBlock,
    request: ExportRequest,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    first: Mapping[str, ExportedGraph],
) -> TargetSpec | None:
    """The graphs of training for the second target; None if they are those of the first, which are in `first`."""
    target = request.targets[1]
    graphs = {kind: training_graph(kind, block, request, shape, dtype, target) for kind in ("step", "gradient")}
    if all(_same(graph, first[kind]) for kind, graph in graphs.items()):
        return None
    lean = {kind: optimise(graph, request.defaults.batch, RULES[target]) for kind, graph in graphs.items()}
    guard = Guard(block, request, shape, dtype)
    for kind, graph in graphs.items():
        guard.check(kind, lean[kind].model, graph.origins)
    specs = {
        kind: writer.graph(f"blocks/{block.name}/{target}/{kind}.onnx", graph, lean[kind])
        for kind, graph in graphs.items()
    }
    recomputed = lean["step"].recomputed
    return TargetSpec(specs["step"], specs["gradient"], lean["step"].memory, lean["gradient"].memory, recomputed)


def _write_artifacts(
    writer: Writer,
    block: LocalBlock,
    request: ExportRequest,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    inputs: Sequence[TensorSpec],
) -> OrtTrainingSpec | None:
    """The block for ONNX Runtime's own training, under the file names that it is known by; None if not asked for."""
    if request.runtime == PORTABLE:
        return None
    from edgelocal.exporters.ort_training import make_artifacts  # its packages are not everyone's

    made = make_artifacts(block, request.task, request.optimizer, shape, dtype, _initial(block, inputs))
    folder = f"blocks/{block.name}/ort_training"
    models = {"training_model": made.training, "eval_model": made.evaluation, "optimizer_model": made.optimizer}
    for name, model in models.items():
        writer.model(f"{folder}/{name}.onnx", model)
    writer.write(f"{folder}/checkpoint", [made.checkpoint])
    return OrtTrainingSpec(
        GraphSpec(f"{folder}/training_model.onnx", *made.training_signature, nodes=len(made.training.graph.node)),
        GraphSpec(f"{folder}/eval_model.onnx", *made.evaluation_signature, nodes=len(made.evaluation.graph.node)),
        f"{folder}/optimizer_model.onnx",
        f"{folder}/checkpoint",
    )


def _encoded(block: LocalBlock, inputs: Sequence[TensorSpec]) -> Sequence[bytes | memoryview]:
    try:
        return encode(_initial(block, inputs))
    except TensorFormatError as error:
        raise ExportError(f"the weights of block {block.name} cannot be written: {error}") from error


def _initial(block: LocalBlock, inputs: Sequence[TensorSpec]) -> dict[str, Array]:
    local = {name: key for key, name in block.tensor_names().items()}
    state = block.state_dict()
    return {
        t.name: np.ascontiguousarray(state[local[t.name.partition("/")[2]]].numpy()).reshape(t.resolve(1))
        for t in inputs
        if t.kind in ("param", "buf")
    }


def _same(graph: ExportedGraph, other: ExportedGraph) -> bool:
    first, second = (each.model.SerializeToString(deterministic=True) for each in (graph, other))
    return bool(first == second)
