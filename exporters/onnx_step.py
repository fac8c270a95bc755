"""A block in training as ONNX: step.onnx by the step contract, and what its second form (onnx_accumulate.py) shares.

The step graph does forward pass, local loss, backward pass and update. A parameter is updated as soon as its
gradient exists, so that no graph holds all gradients; this is exact because the block sees only detached input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from edgelocal.bundle.spec import TaskSpec, TensorSpec
from edgelocal.exporters.forms import CPU, Forms
from edgelocal.exporters.lowering import lower
from edgelocal.exporters.onnx_block import (
    ExportedGraph,
    Tensors,
    block_trace,
    finish,
    mask_specs,
    placeholders,
    tensor_spec,
)
from edgelocal.exporters.onnx_graph import GraphBuilder, Value
from edgelocal.exporters.optimizers import Optimizer
from edgelocal.exporters.rules import LocalBlock
from edgelocal.exporters.step import LocalStep
from edgelocal.exporters.trace import Traced

__all__ = ["ExportedGraph", "GradientUse", "Updates", "metric_names", "step_graph", "target_spec", "training_graph"]

STEP_COUNT = "opt/step"


def target_spec(task: TaskSpec) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape of one target and its dtype: class ids for cross entropy, a float vector otherwise."""
    return ((), torch.int64) if task.loss == "cross_entropy" else ((task.classes,), torch.float32)


def metric_names(task: TaskSpec) -> tuple[str, ...]:
    """The metric sums a training graph returns after h and loss."""
    return ("absolute_error",) if task.loss == "mse" else ("correct",)


def step_graph(
    block: LocalBlock,
    task: TaskSpec,
    optimizer: Optimizer,
    input_shape: Sequence[int],
    dtype: torch.dtype,
    forms: Forms = CPU,
) -> ExportedGraph:
    """The training step of `block` on inputs (N, *input_shape) of `dtype`, with gradients in these forms.

    Raises:
        ExportError: it cannot be written as ONNX; see `block_trace`.
    """
    return training_graph(block, task, input_shape, dtype, lambda builder: Updates(builder, optimizer), forms)


class GradientUse(Protocol):
    """What a training graph does with the gradients of the parameters, which it calls by their bare names."""

    scalars: tuple[str, ...]  # numbers it takes as graph inputs, () float32 each
    returned: tuple[str, ...]  # kinds of the tensors that the graph returns anew
    new: dict[str, str]  # the new value of every tensor it changes, by the tensor's name

    def state(self, trained: Sequence[TensorSpec]) -> list[TensorSpec]:
        """The tensors it keeps for the trained parameters."""
        ...

    def take(self, name: str, gradient: str) -> None:
        """Emit what becomes of a gradient; called as soon as it exists."""
        ...


def training_graph(
    block: LocalBlock,
    task: TaskSpec,
    input_shape: Sequence[int],
    dtype: torch.dtype,
    use: Callable[[GraphBuilder], GradientUse],
    forms: Forms,
) -> ExportedGraph:
    """Forward pass, local loss and backward pass of `block`, and what `use` makes of the gradients.

    Raises:
        ExportError: it cannot be written as ONNX; see `block_trace`.
    """
    module = LocalStep(block, task).train()
    arguments = ((tuple(input_shape), dtype), target_spec(task))
    builder = GraphBuilder(batch_of="x", forms=forms)
    gradients = use(builder)
    with block_trace(module, block, arguments, joint=True) as (traced, tensors):
        values = _lower(traced, tensors, builder, gradients)
    return _finish(traced, tensors, builder, gradients, values, metric_names(task))


def _lower(traced: Traced, tensors: Tensors, builder: GraphBuilder, gradients: GradientUse) -> dict[fx.Node, Any]:
    names = dict(zip(traced.user_inputs, ("x", "y"), strict=True)) | tensors.value_names()
    waiting: dict[fx.Node, list[str]] = {}
    for fqn, node in traced.gradients.items():
        waiting.setdefault(node, []).append(_bare(tensors.parameters[traced.parameters[fqn]]).name)

    def ready(node: fx.Node, gradient: Value) -> None:
        for name in waiting.get(node, ()):
            gradients.take(name, gradient.name)

    return lower(traced.graph, builder, names, ready)


def _finish(
    traced: Traced,
    tensors: Tensors,
    builder: GraphBuilder,
    gradients: GradientUse,
    values: Mapping[fx.Node, Value],
    metrics: Sequence[str],
) -> ExportedGraph:
    loss, h, *sums = traced.user_outputs
    outputs = {"h": h, "loss": loss, **dict(zip(metrics, sums, strict=True))}
    trained = [_bare(tensors.parameters[traced.parameters[fqn]]) for fqn in traced.gradients]
    state = [*tensors.parameters.values(), *gradients.state(trained), *tensors.buffers.values()]
    # A frozen parameter, and a buffer that training leaves alone, are returned as they came.
    new = {name: name for name in tensors.value_names().values()}
    new |= {tensors.buffers[traced.buffers[fqn]].name: values[node].name for fqn, node in traced.new_buffers.items()}
    new |= gradients.new
    results = [(tensor_spec(name, node), values[node].name) for name, node in outputs.items()]
    results += [new_tensor(t, new) for t in state if t.kind in gradients.returned]
    data = [tensor_spec(n, placeholders(traced)[p]) for n, p in zip("xy", traced.user_inputs, strict=True)]
    return finish(builder, [*data, *scalar_specs(gradients.scalars), *mask_specs(builder), *state], results)


def scalar_specs(names: Sequence[str]) -> list[TensorSpec]:
    """Numbers as graph inputs."""
    return [TensorSpec(name, (), "float32") for name in names]


def new_tensor(tensor: TensorSpec, new: Mapping[str, str]) -> tuple[TensorSpec, str]:
    """The output that holds a tensor's new value, and this value."""
    return TensorSpec(f"new/{tensor.name}", tensor.shape, tensor.dtype), new[tensor.name]


def _bare(tensor: TensorSpec) -> TensorSpec:
    """A tensor by its name in the original module."""
    return TensorSpec(tensor.name.partition("/")[2], tensor.shape, tensor.dtype)


class Updates:
    """The use of gradients in a step: the optimizer's update of parameters and slots."""

    returned: tuple[str, ...] = ("param", "opt", "buf")

    def __init__(self, builder: GraphBuilder, optimizer: Optimizer) -> None:
        self.scalars: tuple[str, ...] = ("lr", *optimizer.hyper)
        self.new: dict[str, str] = {}
        self._builder = builder
        self._optimizer = optimizer
        self._graph = _trace_update(optimizer)
        self._hyper = list(self.scalars)
        if optimizer.counts_steps:
            self.new[STEP_COUNT] = builder.op("Add", STEP_COUNT, builder.scalar(1.0, torch.float32))
            self._hyper.append(self.new[STEP_COUNT])

    def state(self, trained: Sequence[TensorSpec]) -> list[TensorSpec]:
        """opt/<slot>/<name> of a parameter's shape, and the number of updates so far if the optimizer counts them."""
        slots = [
            TensorSpec(f"opt/{slot}/{t.name}", t.shape, t.dtype) for slot in self._optimizer.slots for t in trained
        ]
        return [*slots, TensorSpec(STEP_COUNT, (), "float32")] if self._optimizer.counts_steps else slots

    def take(self, name: str, gradient: str) -> None:
        """Emit the update of one parameter."""
        changed = [f"param/{name}", *(f"opt/{slot}/{name}" for slot in self._optimizer.slots)]
        arguments = [changed[0], gradient, *changed[1:], *self._hyper]
        places = [n.name for n in self._graph.nodes if n.op == "placeholder"]
        values = lower(self._graph, self._builder, dict(zip(places, arguments, strict=True)))
        results = next(n for n in self._graph.nodes if n.op == "output").args[0]
        self.new |= {target: values[node].name for target, node in zip(changed, results, strict=True)}


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
