"""A block in inference mode as ONNX: forward.onnx and head.onnx."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgelocal.exporters.lowering import lower
from edgelocal.exporters.onnx_block import ExportedGraph, block_trace, finish, placeholders, tensor_spec
from edgelocal.exporters.onnx_graph import GraphBuilder
from edgelocal.exporters.rules import LocalBlock
from edgelocal.exporters.step import Forward, Head


def forward_graph(block: LocalBlock, input_shape: Sequence[int], dtype: torch.dtype) -> ExportedGraph:
    """The block in inference mode: x (N, *input_shape) -> h.

    Raises:
        ExportError: it cannot be written as ONNX; see `block_trace`.
    """
    return _inference_graph(block, Forward(block), "x", "h", input_shape, dtype)


def head_graph(block: LocalBlock, output_shape: Sequence[int]) -> ExportedGraph:
    """The block's auxiliary network in inference mode: h (N, *output_shape) -> logits.

    Raises:
        ExportError: it cannot be written as ONNX; see `block_trace`.
    """
    return _inference_graph(block, Head(block), "h", "logits", output_shape, torch.float32)


def _inference_graph(
    block: LocalBlock, module: nn.Module, source: str, result: str, shape: Sequence[int], dtype: torch.dtype
) -> ExportedGraph:
    builder = GraphBuilder(batch_of=source)
    with torch.no_grad(), block_trace(module.eval(), block, ((tuple(shape), dtype),), joint=False) as (traced, tensors):
        place = traced.user_inputs[0]
        values = lower(traced.graph, builder, {place: source, **tensors.value_names()})
    output = traced.user_outputs[0]
    value = values[output].name
    used = {value, *(name for node in builder.nodes for name in node.input)}
    weights = [*tensors.parameters.values(), *tensors.buffers.values()]
    inputs = [tensor_spec(source, placeholders(traced)[place]), *(t for t in weights if t.name in used)]
    return finish(builder, inputs, [(tensor_spec(result, output), value)])
