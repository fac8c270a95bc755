"""A block as artifacts of ONNX Runtime's on-device training, as its own `Module` and `Optimizer` take them.

`onnxruntime.training.artifacts` derives the gradients. It is given the forward pass and the local loss in elementary
operators, batch norm written out like in the portable step: an operator of its own would leave the biased variance in
the running statistics. Their new values, which nothing in those artifacts would keep, are written over the old ones by
the operator that the runtime adds gradients up with (`InPlaceAccumulatorV2`, told to overwrite).

Mended besides: the optimizer model is written at the newest IR version that `onnx` knows, which the runtime does not
read; operator sets are listed that nothing uses; AdamW would be that of another library; and the evaluation model
would be the training graph, dropout, batch statistics and all, so the one of inference mode takes its place. What was
made is run once (`ort_trial`): a gradient may be derived that the runtime cannot compute.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from edgelocal.bundle.onnx_scan import scan
from edgelocal.bundle.spec import TaskSpec, TensorSpec
from edgelocal.errors import BundleError, ExportError, UsageError
from edgelocal.exporters.blame import blame_operator
from edgelocal.exporters.lowering import lower
from edgelocal.exporters.onnx_block import (
    ExportedGraph,
    block_trace,
    examples,
    finish,
    mask_specs,
    placeholders,
    tensor_spec,
)
from edgelocal.exporters.onnx_graph import IR_VERSION, OPSET, GraphBuilder
from edgelocal.exporters.onnx_step import metric_names, target_spec
from edgelocal.exporters.optimizers import Optimizer
from edgelocal.exporters.ort_trial import complaint
from edgelocal.exporters.rules import LocalBlock
from edgelocal.exporters.step import LocalStep
from edgelocal.storage.tensors import Array

Signature: TypeAlias = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]

DOMAIN = "com.microsoft"
OVERWRITE = "overwrite"
PYTORCH_ADAMW = 0  # of the operator's `adam_mode`; 1 is that of HF transformers
_NO_GRADIENT = re.compile(r"gradient builder has not been registered: (\w+) for node (\S+)")
_NO_KERNEL = re.compile(r"implementation for (\w+)Grad\(\d+\) node with name '([^']*?)_Grad/")


@dataclass(frozen=True)
class Artifacts:
    """Of a block: the models for training and evaluation, that of the optimizer, and the checkpoint with the initial
    weights."""

    training: onnx.ModelProto
    evaluation: onnx.ModelProto
    optimizer: onnx.ModelProto
    checkpoint: bytes

    @property
    def training_signature(self) -> Signature:
        """Inputs and outputs of the training model."""
        return _signature(self.training)

    @property
    def evaluation_signature(self) -> Signature:
        """Inputs and outputs of the evaluation model."""
        return _signature(self.evaluation)


def make_artifacts(
    block: LocalBlock,
    task: TaskSpec,
    optimizer: Optimizer,
    input_shape: Sequence[int],
    dtype: torch.dtype,
    weights: Mapping[str, Array],
) -> Artifacts:
    """The artifacts of `block` on inputs (N, *input_shape) of `dtype`; `weights` are arrays by param/... and buf/....

    Raises:
        UsageError: the runtime's training build is not installed here.
        ExportError: the block cannot be written as ONNX, or the runtime has no gradient for an operator of it.
    """
    generator = _generator()
    graph, new, origins = _local_graph(block, task, input_shape, dtype, training=True)
    inference, _, _ = _local_graph(block, task, input_shape, dtype, training=False)
    trained = [name for name, parameter in _parameters(block).items() if parameter.requires_grad]
    model = _with_weights(graph.model, new, weights)
    with tempfile.TemporaryDirectory(prefix="edgelocal-artifacts-") as folder:
        try:
            with _quiet():
                generator.generate_artifacts(
                    model,
                    requires_grad=trained,
                    frozen_params=[name for name in weights if name not in trained],
                    optimizer=_optimizer_block(optimizer),
                    artifact_directory=folder,
                )
        except (RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise _no_gradient(str(error), block, task, input_shape, dtype, origins) from error
        training, update = (_mended(Path(folder) / f"{name}_model.onnx") for name in ("training", "optimizer"))
        checkpoint = (Path(folder) / "checkpoint").read_bytes()
        order = [value.name for value in training.graph.input if value.name in weights]
        made = Artifacts(training, _evaluation(inference.model, order, weights), update, checkpoint)
        found = _tried(made, Path(folder))
    if found is not None:
        raise _no_gradient(found, block, task, input_shape, dtype, origins)
    return made


def _tried(made: Artifacts, folder: Path) -> str | None:
    """What the runner, or the runtime, has against the models."""
    models = {folder / "trained.onnx": made.training, folder / "evaluated.onnx": made.evaluation}
    for path, model in models.items():
        path.write_bytes(model.SerializeToString())
    found = complaint(list(models))
    if found is None:
        try:
            scan((folder / "trained.onnx").read_bytes(), training=True)
        except BundleError as error:
            found = str(error)
    return found


def _generator() -> ModuleType:
    try:
        from onnxruntime.training import artifacts
    except ImportError as error:
        raise UsageError(
            f"the artifacts are made by ONNX Runtime's training build, which is not installed here ({error}): "
            'pip install "edgelocal[export,ort-training]" in an environment without another ONNX Runtime (Python 3.10 '
            "to 3.12, x86-64), or export with --runtime portable"
        ) from None
    module: ModuleType = artifacts
    return module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The generator writes of every pass over a graph to stderr, whatever severity is asked for; errors are raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _optimizer_block(optimizer: Optimizer) -> object:
    """The runtime's own block for the optimizer's model: AdamW with its hyper-parameters; else SGD, which has none."""
    from onnxruntime.training import onnxblock

    if optimizer.name != "adamw":
        return onnxblock.optim.SGD()
    hyper = optimizer.hyper
    return onnxblock.optim.AdamW(
        betas=(hyper["beta1"], hyper["beta2"]), eps=hyper["eps"], weight_decay=hyper["weight_decay"]
    )


def _local_graph(
    block: LocalBlock, task: TaskSpec, input_shape: Sequence[int], dtype: torch.dtype, *, training: bool
) -> tuple[ExportedGraph, dict[str, str], dict[str, str]]:
    """Forward pass and local loss: (loss, h, metric); new values of buffers as further outputs, by the buffer's name;
    and the ATen operator that every node came from."""
    module = LocalStep(block, task).train(training)
    arguments = ((tuple(input_shape), dtype), target_spec(task))
    builder = GraphBuilder(batch_of="x", derived=True)
    with torch.no_grad(), block_trace(module, block, arguments, joint=False) as (traced, tensors):
        names = dict(zip(traced.user_inputs, ("x", "y"), strict=True)) | tensors.value_names()
        values = lower(traced.graph, builder, names)
        results = [
            (tensor_spec(name, node), values[node].name)
            for name, node in zip(("loss", "h", *metric_names(task)), traced.user_outputs, strict=True)
        ]
        new = {}
        for fqn, node in traced.new_buffers.items():
            buffer = tensors.buffers[traced.buffers[fqn]]
            new[buffer.name] = f"new/{buffer.name}"
            results.append((TensorSpec(f"new/{buffer.name}", buffer.shape, buffer.dtype), values[node].name))
        state = [*tensors.parameters.values(), *tensors.buffers.values()]
        data = [tensor_spec(n, placeholders(traced)[p]) for n, p in zip("xy", traced.user_inputs, strict=True)]
    return finish(builder, [*data, *mask_specs(builder), *state], results), new, builder.origins


def _parameters(block: LocalBlock) -> dict[str, torch.nn.Parameter]:
    names = block.tensor_names()
    return {f"param/{names[key]}": parameter for key, parameter in block.named_parameters()}


def _with_weights(exported: onnx.ModelProto, new: Mapping[str, str], weights: Mapping[str, Array]) -> onnx.ModelProto:
    """The model with its weights inside, as the generator wants it, and with new values written over the old."""
    graph = exported.graph
    after = []
    for name, value in new.items():
        source = value
        if weights[name].dtype != np.float32:
            source = f"{value}/float"
            after.append(helper.make_node("Cast", [value], [source], source, to=TensorProto.FLOAT))
        taken, told = [name, source, OVERWRITE], [f"{name}.written"]
        after.append(helper.make_node("InPlaceAccumulatorV2", taken, told, name, domain=DOMAIN))
    written = [helper.make_tensor_value_info(f"{name}.written", TensorProto.BOOL, [1]) for name in new]
    constants = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    if new:
        constants.append(numpy_helper.from_array(np.array([True]), OVERWRITE))
    return _model(
        [*_reading(graph.node, weights), *after],
        graph,
        [i for i in graph.input if i.name not in weights],
        [*(o for o in graph.output if o.name not in new.values()), *written],
        constants,
    )


def _evaluation(exported: onnx.ModelProto, order: Sequence[str], weights: Mapping[str, Array]) -> onnx.ModelProto:
    """The model of inference mode: the runtime gives it all weights, in the order of the training model."""
    graph = exported.graph
    data = [i for i in graph.input if i.name not in weights]
    state = [helper.make_tensor_value_info(name, TensorProto.FLOAT, weights[name].shape) for name in order]
    return _model(_reading(graph.node, weights), graph, [*data, *state], list(graph.output), [])


def _reading(nodes: Sequence[onnx.NodeProto], weights: Mapping[str, Array]) -> list[onnx.NodeProto]:
    """The nodes as they read weights that are all float32, as the runtime keeps them: counters and flags get their
    own type again for whoever reads them."""
    whole = {name for name, value in weights.items() if value.dtype != np.float32}
    read = sorted(whole.intersection(name for node in nodes for name in node.input))
    types = {name: helper.np_dtype_to_tensor_dtype(weights[name].dtype) for name in read}
    casts = [helper.make_node("Cast", [n], [f"{n}/whole"], f"{n}/whole", to=types[n]) for n in read]
    found = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [f"{n}/whole" if n in whole else n for n in node.input]
        found.append(copy)
    return [*casts, *found]


def _model(
    nodes: Sequence[onnx.NodeProto],
    graph: onnx.GraphProto,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Sequence[onnx.TensorProto],
) -> onnx.ModelProto:
    made = helper.make_graph(nodes, graph.name, inputs, outputs, [*graph.initializer, *constants])
    opsets = [helper.make_opsetid("", OPSET)]
    if any(node.domain == DOMAIN for node in nodes):
        opsets.append(helper.make_opsetid(DOMAIN, 1))
    return helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgelocal")


def _mended(path: Path) -> onnx.ModelProto:
    """The model at an IR version that every release reads, without operator sets that it does not use. AdamW is told to
    correct for the first steps as PyTorch does; its other way of doing it lets eps count for 32 times as much in them.
    """
    model = onnx.load(path)
    for attribute in (a for node in model.graph.node for a in node.attribute if a.name == "adam_mode"):
        attribute.i = PYTORCH_ADAMW
    model.ir_version = IR_VERSION
    used = {node.domain for node in model.graph.node} | {""}
    kept = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def _signature(model: onnx.ModelProto) -> Signature:
    inputs, outputs = (tuple(map(_spec, values)) for values in (model.graph.input, model.graph.output))
    return inputs, outputs


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_param if d.HasField("dim_param") else d.dim_value for d in tensor.shape.dim)
    return TensorSpec(value.name, shape, np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name)


def _no_gradient(
    said: str,
    block: LocalBlock,
    task: TaskSpec,
    input_shape: Sequence[int],
    dtype: torch.dtype,
    origins: Mapping[str, str],
) -> ExportError:
    """What the generator could not derive, or the runtime not run, as the user should read it."""
    found = _NO_GRADIENT.search(said) or _NO_KERNEL.search(said)
    if found is None:
        last = said.strip().splitlines()[-1][-300:]
        return ExportError(
            f"block {block.name}: ONNX Runtime's artifacts cannot be made: {last}; use --runtime portable"
        )
    target = origins.get(found[2], found[1])
    module = LocalStep(block, task).train()
    where = blame_operator(target, found[1], module, examples(((tuple(input_shape), dtype), target_spec(task))), block)
    return ExportError(
        f"{where} uses {target}: ONNX Runtime's training build has no gradient for its operator {found[1]}; export "
        "with --runtime portable, whose gradients are PyTorch's, or replace it in the network"
    )
