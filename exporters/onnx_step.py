"""A block as ONNX: step.onnx by the step contract, forward.onnx and head.onnx.

The step graph does forward pass, local loss, backward pass and update. A parameter is updated as soon as its
gradient exists, so that no graph holds all gradients; this is exact because the block sees only detached input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from edgelocal.errors import ExportError
from edgelocal.exporters.blame import blame
from edgelocal.exporters.lowering import UnsupportedOperatorError, lower
from edgelocal.exporters.onnx_graph import GraphBuilder, Value, expression, value_info
from edgelocal.exporters.optimizers import Optimizer
from edgelocal.exporters.rules import LocalBlock
from edgelocal.exporters.step import Forward, Head, LocalStep
from edgelocal.exporters.structure import structure
from edgelocal.exporters.trace import Batch, Traced, TraceError, trace
from edgelocal.spec import BATCH, MaskSpec, TaskSpec, TensorSpec

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class ExportedGraph:
    """A model with its signature in graph order, and the random masks it wants."""

    model: onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    masks: tuple[MaskSpec, ...] = ()

    def output(self, name: str) -> TensorSpec:
        """The output called `name`."""
        return next(t for t in self.outputs if t.name == name)


def target_spec(task: TaskSpec) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape of one target and its dtype: class ids for cross entropy, a float vector otherwise."""
    return ((), torch.int64) if task.loss == "cross_entropy" else ((task.classes,), torch.float32)


def metric_names(task: TaskSpec) -> tuple[str, ...]:
    """The metric sums a step graph returns after h and loss."""
    return ("absolute_error",) if task.loss == "mse" else ("correct",)


def step_graph(
    block: LocalBlock, task: TaskSpec, optimizer: Optimizer, input_shape: Sequence[int], dtype: torch.dtype
) -> ExportedGraph:
    """The training step of `block` on inputs (N, *input_shape) of `dtype`.

    Raises:
        ExportError: an operator of the block, or of its derivative, cannot be written as ONNX; the message names the
            operator and the module.
    """
    module = LocalStep(block, task).train()
    arguments = ((tuple(input_shape), dtype), target_spec(task))
    try:
        batch, traced = _trace(module, block, arguments, task)
        exported = _StepWriter(block, optimizer, traced).write(("h", "loss", *metric_names(task)))
        batch.check()
    except (TraceError, UnsupportedOperatorError) as error:
        raise blame(error, module, _examples(Batch(), arguments), block) from error
    return exported


Arguments = tuple[tuple[tuple[int, ...], torch.dtype], ...]  # shape of a sample, and dtype, of every input

_TRACES: dict[Any, tuple[Batch, Traced]] = {}
_MOST_TRACES = 16  # a network has few kinds of blocks; bounds what a long process keeps


def _trace(module: nn.Module, block: LocalBlock, arguments: Arguments, task: TaskSpec | None) -> tuple[Batch, Traced]:
    """Trace `module`, a view of `block`, or reuse the trace of a block of the same structure."""
    parts = structure((block.body, block.head, block.auxiliary))
    key = (type(module), parts, arguments, task)
    if parts is not None and key in _TRACES:
        return _TRACES[key]
    batch = Batch()
    traced = batch, trace(module, _examples(batch, arguments), batch, joint=task is not None)
    if parts is not None:
        while len(_TRACES) >= _MOST_TRACES:
            del _TRACES[next(iter(_TRACES))]
        _TRACES[key] = traced
    return traced


def _examples(batch: Batch, arguments: Arguments) -> tuple[torch.Tensor, ...]:
    return tuple(batch.tensor(shape, dtype) for shape, dtype in arguments)


class _StepWriter:
    """Emits one step graph; holds what its stages share."""

    def __init__(self, block: LocalBlock, optimizer: Optimizer, traced: Traced) -> None:
        self.names = {f"block.{local}": name for local, name in block.tensor_names().items()}
        self.optimizer = optimizer
        self.traced = traced
        self.builder = GraphBuilder(batch_of="x")
        self.parameters = {fqn: self._node(p) for fqn, p in traced.parameters.items()}
        self.buffers = {fqn: self._node(p) for fqn, p in traced.buffers.items()}
        self.updated: dict[str, str] = {}
        self.hyper: dict[str, str] = {}
        self.step_count = "opt/step"

    def write(self, user_outputs: Sequence[str]) -> ExportedGraph:
        traced, builder = self.traced, self.builder
        self._prepare_optimizer()
        inputs = dict(zip(traced.user_inputs, ("x", "y"), strict=True))
        inputs |= {p: f"param/{self.names[fqn]}" for fqn, p in traced.parameters.items()}
        inputs |= {p: f"buf/{self.names[fqn]}" for fqn, p in traced.buffers.items()}
        waiting: dict[fx.Node, list[str]] = {}
        for fqn, node in traced.gradients.items():
            waiting.setdefault(node, []).append(fqn)

        def ready(node: fx.Node, grad: Value) -> None:
            for fqn in waiting.get(node, ()):
                self._update(fqn, grad.name)

        values = lower(traced.graph, builder, inputs, ready)
        named = dict(zip(user_outputs, (traced.user_outputs[i] for i in self._user_order(user_outputs)), strict=True))
        outputs = [self._emit(name, values[node].name, _spec(name, node)) for name, node in named.items()]
        return self._finish(outputs, values)

    @staticmethod
    def _user_order(user_outputs: Sequence[str]) -> list[int]:
        """The traced module returns (loss, h, ...); the contract wants h first."""
        return [1, 0, *range(2, len(user_outputs))]

    def _finish(self, outputs: list[TensorSpec], values: Mapping[fx.Node, Value]) -> ExportedGraph:
        state = self._state()
        for tensor in state:
            result = self.updated.get(tensor.name)
            if result is None:
                result = self._new_buffer(tensor.name, values)
            new = TensorSpec(f"new/{tensor.name}", tensor.shape, tensor.dtype)
            outputs.append(self._emit(new.name, result, new))
        x, y = (_spec(n, self._node(p)) for n, p in zip("xy", self.traced.user_inputs, strict=True))
        scalars = [TensorSpec(name, (), "float32") for name in ("lr", *self.optimizer.hyper)]
        masks = [TensorSpec(m.name, _dims(m.shape), "bool") for m in self.builder.masks]
        inputs = [x, y, *scalars, *masks, *state]
        keeps = tuple(MaskSpec(m.name, m.keep) for m in self.builder.masks)
        return _export(self.builder, inputs, outputs, keeps)

    def _state(self) -> list[TensorSpec]:
        parameters = [_spec(f"param/{self.names[fqn]}", node) for fqn, node in self.parameters.items()]
        trained = [_spec(self.names[fqn], self.parameters[fqn]) for fqn in self.traced.gradients]
        slots = [TensorSpec(f"opt/{slot}/{t.name}", t.shape, t.dtype) for slot in self.optimizer.slots for t in trained]
        if self.optimizer.counts_steps:
            slots.append(TensorSpec(self.step_count, (), "float32"))
        return [*parameters, *slots, *(_spec(f"buf/{self.names[fqn]}", node) for fqn, node in self.buffers.items())]

    def _new_buffer(self, name: str, values: Mapping[fx.Node, Value]) -> str:
        """The mutated buffer, or the tensor itself where training does not change it."""
        by_name = {f"buf/{self.names[fqn]}": node for fqn, node in self.traced.new_buffers.items()}
        return values[by_name[name]].name if name in by_name else name

    def _prepare_optimizer(self) -> None:
        builder = self.builder
        self.hyper = {name: name for name in ("lr", *self.optimizer.hyper)}
        if self.optimizer.counts_steps:
            self.hyper["step"] = builder.op("Add", self.step_count, builder.scalar(1.0, torch.float32))
            self.updated[self.step_count] = self.hyper["step"]
        self.update_graph = _trace_update(self.optimizer)

    def _update(self, fqn: str, grad: str) -> None:
        """Emit the update of one parameter."""
        name = self.names[fqn]
        slots = {slot: f"opt/{slot}/{name}" for slot in self.optimizer.slots}
        arguments = [f"param/{name}", grad, *slots.values(), *self.hyper.values()]
        placeholders = [n.name for n in self.update_graph.nodes if n.op == "placeholder"]
        values = lower(self.update_graph, self.builder, dict(zip(placeholders, arguments, strict=True)))
        results = next(n for n in self.update_graph.nodes if n.op == "output").args[0]
        for target, node in zip([f"param/{name}", *slots.values()], results, strict=True):
            self.updated[target] = values[node].name

    def _emit(self, name: str, value: str, spec: TensorSpec) -> TensorSpec:
        self.builder.rename(value, name)
        return spec

    def _node(self, placeholder: str) -> fx.Node:
        nodes = self.traced.graph.nodes
        found: fx.Node = next(n for n in nodes if n.op == "placeholder" and n.name == placeholder)
        return found


def _trace_update(optimizer: Optimizer) -> fx.Graph:
    """The optimizer's update on scalars; element by element, so the graph fits any shape."""
    names = ["lr", *optimizer.hyper, *(["step"] if optimizer.counts_steps else [])]
    count = 2 + len(optimizer.slots)

    def update(*values: torch.Tensor) -> list[torch.Tensor]:
        slots = dict(zip(optimizer.slots, values[2:count], strict=True))
        hyper = dict(zip(names, values[count:], strict=True))
        param, new_slots = optimizer.update(values[0], values[1], slots, hyper)
        return [param, *(new_slots[s] for s in optimizer.slots)]

    graph: fx.Graph = make_fx(update, tracing_mode="fake")(*(torch.ones(()) for _ in range(count + len(names)))).graph
    return graph


def forward_graph(block: LocalBlock, input_shape: Sequence[int], dtype: torch.dtype) -> ExportedGraph:
    """The block in inference mode: x (N, *input_shape) -> h."""
    return _inference_graph(block, Forward(block), "x", "h", input_shape, dtype)


def head_graph(block: LocalBlock, output_shape: Sequence[int]) -> ExportedGraph:
    """The block's auxiliary network in inference mode: h (N, *output_shape) -> logits."""
    return _inference_graph(block, Head(block), "h", "logits", output_shape, torch.float32)


def _inference_graph(
    block: LocalBlock, module: nn.Module, source: str, result: str, shape: Sequence[int], dtype: torch.dtype
) -> ExportedGraph:
    names = {f"block.{local}": name for local, name in block.tensor_names().items()}
    arguments = ((tuple(shape), dtype),)
    # A prefix of its own keeps the names of several blocks apart when they are joined into one model.
    builder = GraphBuilder(batch_of=source, prefix=f"{block.name}/{result}/")
    module = module.eval()
    try:
        with torch.no_grad():
            batch, traced = _trace(module, block, arguments, None)
        inputs = {traced.user_inputs[0]: source}
        inputs |= {p: f"param/{names[fqn]}" for fqn, p in traced.parameters.items()}
        inputs |= {p: f"buf/{names[fqn]}" for fqn, p in traced.buffers.items()}
        values = lower(traced.graph, builder, inputs)
        batch.check()
    except (TraceError, UnsupportedOperatorError) as error:
        raise blame(error, module, _examples(Batch(), arguments), block) from error
    placeholders = {n.name: n for n in traced.graph.nodes if n.op == "placeholder"}
    output = traced.user_outputs[0]
    builder.rename(values[output].name, result)
    used = {name for node in builder.nodes for name in node.input}
    specs = [_spec(name, placeholders[p]) for p, name in inputs.items() if name == source or name in used]
    return _export(builder, specs, [_spec(result, output)], ())


def _export(
    builder: GraphBuilder, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], masks: tuple[MaskSpec, ...]
) -> ExportedGraph:
    model = builder.model([_info(t) for t in inputs], [_info(t) for t in outputs], "edgelocal")
    return ExportedGraph(model, tuple(inputs), tuple(outputs), masks)


def _info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    return value_info(tensor.name, tensor.shape, getattr(torch, tensor.dtype))


def _spec(name: str, node: fx.Node) -> TensorSpec:
    fake = node.meta["val"]
    dtype = str(fake.dtype).removeprefix("torch.")
    if dtype not in ("float32", "int64", "bool"):
        raise ExportError(f"tensor {name} has dtype {dtype}; a bundle holds float32, int64 and bool")
    return TensorSpec(name, _dims(fake.shape), dtype)


def _dims(shape: Sequence[int | torch.SymInt]) -> Shape:
    dims: list[int | str] = []
    for size in shape:
        formula = expression(size)
        if formula.free_symbols and not formula.is_Symbol:
            raise ExportError(f"a tensor of shape {tuple(shape)} is not one row a sample; blocks pass (N, ...) tensors")
        dims.append(BATCH if formula.free_symbols else int(size))
    return tuple(dims)
