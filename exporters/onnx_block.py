"""What every graph of a block is made of: its trace, the names of its tensors, and the finished model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from torch import fx, nn

from edgelocal.bundle.spec import BATCH, MaskSpec, TensorSpec
from edgelocal.errors import ExportError
from edgelocal.exporters.blame import blame
from edgelocal.exporters.lowering import UnsupportedOperatorError
from edgelocal.exporters.onnx_graph import GraphBuilder, expression, value_info
from edgelocal.exporters.rules import LocalBlock
from edgelocal.exporters.structure import structure
from edgelocal.exporters.trace import Batch, Traced, TraceError, trace

Shape = tuple[int | str, ...]
Arguments = tuple[tuple[tuple[int, ...], torch.dtype], ...]  # shape of a sample, and dtype, of every input


@dataclass(frozen=True)
class ExportedGraph:
    """A model with its signature in graph order, the random masks it wants, and the ATen operators that its values came
    from, by the value's name."""

    model: onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    masks: tuple[MaskSpec, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)

    def output(self, name: str) -> TensorSpec:
        """The output called `name`."""
        return next(t for t in self.outputs if t.name == name)


@dataclass(frozen=True)
class Tensors:
    """The tensors of a traced block by the placeholders that stand for them."""

    parameters: dict[str, TensorSpec]
    buffers: dict[str, TensorSpec]

    def value_names(self) -> dict[str, str]:
        """Placeholder -> name of the graph input."""
        return {place: tensor.name for place, tensor in (self.parameters | self.buffers).items()}


_TRACES: dict[Any, tuple[Batch, Traced]] = {}
_MOST_TRACES = 16  # a network has few kinds of blocks; bounds what a long process keeps


@contextlib.contextmanager
def block_trace(
    module: nn.Module, block: LocalBlock, arguments: Arguments, *, joint: bool
) -> Iterator[tuple[Traced, Tensors]]:
    """The trace of `module`, a view of `block`, to be lowered inside; with `joint` its gradients are traced too.

    Raises:
        ExportError: an operator of the block, or of its derivative, cannot be traced or (inside) written as ONNX, or
            the graph would not hold for every batch; the message names the operator and the module.
    """
    try:
        batch, traced = _trace(module, block, arguments, joint=joint)
        yield traced, _tensors(block, traced)
        batch.check()
    except (TraceError, UnsupportedOperatorError) as error:
        raise blame(error, module, examples(arguments), block) from error


def _trace(module: nn.Module, block: LocalBlock, arguments: Arguments, *, joint: bool) -> tuple[Batch, Traced]:
    """Trace `module`, or reuse the trace of a block of the same structure."""
    parts = structure((block.body, block.head, block.auxiliary))
    key = (type(module), getattr(module, "task", None), parts, arguments, joint)
    if parts is not None and key in _TRACES:
        return _TRACES[key]
    batch = Batch()
    traced = batch, trace(module, examples(arguments, batch), batch, joint=joint)
    if parts is not None:
        while len(_TRACES) >= _MOST_TRACES:
            del _TRACES[next(iter(_TRACES))]
        _TRACES[key] = traced
    return traced


def examples(arguments: Arguments, batch: Batch | None = None) -> tuple[torch.Tensor, ...]:
    """Fake tensors of these shapes, with the same free batch."""
    batch = batch or Batch()
    return tuple(batch.tensor(shape, dtype) for shape, dtype in arguments)


def _tensors(block: LocalBlock, traced: Traced) -> Tensors:
    names = {f"block.{local}": name for local, name in block.tensor_names().items()}

    def specs(kind: str, places: Mapping[str, str]) -> dict[str, TensorSpec]:
        return {p: tensor_spec(f"{kind}/{names[fqn]}", nodes[p]) for fqn, p in places.items()}

    nodes = placeholders(traced)
    return Tensors(specs("param", traced.parameters), specs("buf", traced.buffers))


def placeholders(traced: Traced) -> dict[str, fx.Node]:
    """The inputs of the trace by name."""
    return {node.name: node for node in traced.graph.nodes if node.op == "placeholder"}


def tensor_spec(name: str, node: fx.Node) -> TensorSpec:
    """What a bundle says of the tensor of a node.

    Raises:
        ExportError: a dtype no bundle holds, or a size that depends on the batch but is not the batch.
    """
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


def mask_specs(builder: GraphBuilder) -> list[TensorSpec]:
    """The random inputs of the graph."""
    return [TensorSpec(m.name, _dims(m.shape), "bool") for m in builder.masks]


def finish(
    builder: GraphBuilder, inputs: Sequence[TensorSpec], results: Sequence[tuple[TensorSpec, str]]
) -> ExportedGraph:
    """The graph with its outputs, each given with the value it is, in the order of `results`."""
    for tensor, value in results:
        builder.rename(value, tensor.name)
    masks = tuple(MaskSpec(m.name, m.keep) for m in builder.masks)
    return _export(builder, inputs, [tensor for tensor, _ in results], masks)


def _export(
    builder: GraphBuilder, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], masks: tuple[MaskSpec, ...]
) -> ExportedGraph:
    model = builder.model([_info(t) for t in inputs], [_info(t) for t in outputs], "edgelocal")
    named = ((name, builder.origins.get(node.name)) for node in model.graph.node for name in node.output)
    origins = {name: target for name, target in named if target is not None}
    return ExportedGraph(model, tuple(inputs), tuple(outputs), masks, origins)


def _info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    return value_info(tensor.name, tensor.shape, getattr(torch, tensor.dtype))
