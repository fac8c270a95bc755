"""Matrix products of a finished graph in bfloat16: what goes in is rounded, what comes out is float32 again.

Parameters, state, statistics, sums and losses stay float32. A Gemm's bias is added in float32. Left as they are:
products with a constant (average pooling), and convolutions, for which ONNX Runtime's CUDA provider has no kernel in
bfloat16. bfloat16 has the exponents of float32 and 8 bits of fraction, so a rounded value is off by at most 1/256 of
itself and nothing overflows that did not before: losses need no scaling. The device adds up in float32 and rounds the
sum to bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import onnx
from onnx import TensorProto, helper, shape_inference

from edgelocal.exporters.onnx_block import ExportedGraph

ROUNDED = "/bfloat16"  # behind the name of a value
PRODUCTS = ("MatMul", "Gemm")


def in_bfloat16(exported: ExportedGraph) -> ExportedGraph:
    """The graph with its products in bfloat16; inputs and outputs stay the same."""
    model = onnx.ModelProto()
    model.CopyFrom(exported.model)
    types = _types(model)
    constants = {i.name for i in model.graph.initializer}
    rounded: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in exported.model.graph.node:
        fits = node.op_type in PRODUCTS and all(types.get(name) == TensorProto.FLOAT for name in node.input)
        if fits and constants.isdisjoint(node.input[:2]):
            nodes += _product(node, rounded)
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    origins = {name: exported.origins.get(name.partition(ROUNDED)[0]) for node in nodes for name in node.output}
    return replace(exported, model=model, origins={name: target for name, target in origins.items() if target})


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types by name."""
    graph = shape_inference.infer_shapes(model).graph
    found = {i.name: i.data_type for i in graph.initializer}
    values = (*graph.value_info, *graph.input, *graph.output)
    return found | {value.name: value.type.tensor_type.elem_type for value in values}


def _product(node: onnx.NodeProto, rounded: set[str]) -> Iterator[onnx.NodeProto]:
    """The nodes that stand for a product; `rounded` are the values whose rounding exists, and those of this one."""
    for name in dict.fromkeys(node.input[:2]):
        if name not in rounded:
            rounded.add(name)
            yield _cast(name, name + ROUNDED, TensorProto.BFLOAT16)
    output, biased = node.output[0], len(node.input) > 2
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    beta = attributes.pop("beta", 1.0)
    inputs = [name + ROUNDED for name in node.input[:2]]
    yield helper.make_node(node.op_type, inputs, [f"{output}{ROUNDED}/sum"], f"{output}{ROUNDED}/sum", **attributes)
    yield _cast(f"{output}{ROUNDED}/sum", f"{output}{ROUNDED}/wide" if biased else output, TensorProto.FLOAT)
    if biased:
        bias = node.input[2]
        if beta != 1:
            scale = helper.make_tensor(f"{output}/beta", TensorProto.FLOAT, [], [beta])
            yield helper.make_node("Constant", [], [f"{output}/beta"], f"{output}/beta", value=scale)
            yield helper.make_node("Mul", [bias, f"{output}/beta"], [f"{output}/bias"], f"{output}/bias")
            bias = f"{output}/bias"
        yield helper.make_node("Add", [f"{output}{ROUNDED}/wide", bias], [output], output)


def _cast(source: str, name: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [name], name, to=to)
