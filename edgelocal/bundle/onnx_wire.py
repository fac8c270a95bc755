"""The little of the ONNX file format that a device needs: join graphs, and put weights into one.

An ONNX file is a protobuf message. The fields used here (onnx.proto3): ModelProto.graph = 7; GraphProto.node = 1,
initializer = 5, input = 11, output = 12, value_info = 13; NodeProto.input = 1, output = 2, name = 3;
ValueInfoProto.name = 1; TensorProto.dims = 1, data_type = 2, name = 8, raw_data = 9; ModelProto.metadata_props = 14, of
StringStringEntryProto.key = 1, value = 2. All other fields are copied as they are, so the device does not depend on the
onnx package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from edgelocal.bundle.onnx_scan import scan
from edgelocal.bundle.protobuf import BYTES, VARINT, Field, as_bytes, fields, render
from edgelocal.errors import BundleError

MODEL_GRAPH, MODEL_METADATA = 7, 14
NODE, INITIALIZER, INPUT, OUTPUT, VALUE_INFO = 1, 5, 11, 12, 13
TENSOR_TYPES = {"float32": 1, "int64": 7, "bool": 9}


@dataclass(frozen=True)
class Graph:
    """A model taken apart: `shell` are the fields of the model around the graph, `rest` those of the graph."""

    shell: tuple[Field, ...]
    nodes: tuple[bytes, ...]
    initializers: tuple[bytes, ...]
    inputs: tuple[bytes, ...]
    outputs: tuple[bytes, ...]
    rest: tuple[Field, ...]


def take_apart(model: bytes) -> Graph:
    """Model bytes -> Graph.

    Raises:
        BundleError: no ONNX model with inputs and outputs, or one that holds what no bundle may.
    """
    scan(model)
    shell = tuple(fields(model))
    graphs = [as_bytes(f) for f in shell if f[0] == MODEL_GRAPH]
    if len(graphs) != 1:
        raise BundleError(f"an ONNX file holds {len(graphs)} graphs, expected one; export the bundle again")
    parts = tuple(fields(graphs[0]))

    def all_of(number: int) -> tuple[bytes, ...]:
        return tuple(as_bytes(f) for f in parts if f[0] == number)

    rest = tuple(f for f in parts if f[0] not in (NODE, INITIALIZER, INPUT, OUTPUT))
    around = tuple(f for f in shell if f[0] != MODEL_GRAPH)
    graph = Graph(around, all_of(NODE), all_of(INITIALIZER), all_of(INPUT), all_of(OUTPUT), rest)
    if not graph.inputs or not graph.outputs:
        raise BundleError("an ONNX file has no inputs or no outputs; export the bundle again")
    return graph


def put_together(graph: Graph) -> bytes:
    """Graph -> model bytes."""
    lists = ((NODE, graph.nodes), (INITIALIZER, graph.initializers), (INPUT, graph.inputs), (OUTPUT, graph.outputs))
    parts = [*graph.rest, *((number, BYTES, item) for number, items in lists for item in items)]
    return render([*graph.shell, (MODEL_GRAPH, BYTES, render(parts))])


def compose(models: Sequence[bytes], result: str = "logits") -> bytes:
    """Join models in a row: the first output of each is the first input of the next; `result` names the last output.

    Other inputs (weights) are kept, once each. What is inside a model gets the number of the model before its name;
    the types of inner values, which a runtime infers anyway, are left out.
    """
    graphs = [take_apart(model) for model in models]
    nodes: list[bytes] = []
    inputs: dict[str, bytes] = {}
    initializers: list[bytes] = []
    link = _name(graphs[0].inputs[0])
    inputs[link] = graphs[0].inputs[0]
    for index, graph in enumerate(graphs):
        end = result if index == len(graphs) - 1 else f"{result}/{index}"
        outer = {_name(i): _name(i) for i in graph.inputs}
        outer |= {_name(graph.inputs[0]): link, _name(graph.outputs[0]): end, "": ""}
        rename = partial(_renamed, outer=outer, prefix=f"{index}/")
        nodes += [_rename(node, (1, 2, 3), rename) for node in graph.nodes]
        initializers += [_rename(tensor, (8,), rename) for tensor in graph.initializers]
        inputs.update({_name(i): i for i in graph.inputs[1:]})
        link = end
    output = render((n, k, result.encode() if n == 1 else v) for n, k, v in fields(graphs[-1].outputs[0]))
    rest = tuple(f for f in graphs[0].rest if f[0] != VALUE_INFO)
    return put_together(
        Graph(graphs[0].shell, tuple(nodes), tuple(initializers), tuple(inputs.values()), (output,), rest)
    )


def bind(
    model: bytes, weights: Mapping[str, np.ndarray[Any, np.dtype[Any]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Make the inputs named in `weights` constants of the graph, and add `metadata` to the model's properties.

    Raises:
        BundleError: an input besides the first has no weight.
    """
    graph = take_apart(model)
    names = [_name(i) for i in graph.inputs[1:]]
    missing = [name for name in names if name not in weights]
    if missing:
        raise BundleError(f"the model wants {missing[0]!r} ({len(missing)} such), which the run does not hold")
    constants = tuple(_tensor(name, weights[name]) for name in names)
    entries = [render([(1, BYTES, k.encode()), (2, BYTES, v.encode())]) for k, v in (metadata or {}).items()]
    shell = (*graph.shell, *((MODEL_METADATA, BYTES, entry) for entry in entries))
    return put_together(
        Graph(shell, graph.nodes, graph.initializers + constants, graph.inputs[:1], graph.outputs, graph.rest)
    )


def _renamed(name: str, outer: Mapping[str, str], prefix: str) -> str:
    return outer.get(name, prefix + name)


def _rename(message: bytes, numbers: tuple[int, ...], rename: Callable[[str], str]) -> bytes:
    # Of a node its inputs, its outputs and its own name, which a runtime wants to be unique too; of a tensor its name.
    return render((f[0], f[1], rename(_text(f)).encode() if f[0] in numbers else f[2]) for f in fields(message))


def _name(value_info: bytes) -> str:
    return next((_text(f) for f in fields(value_info) if f[0] == 1), "")


def _text(field: Field) -> str:
    try:
        return as_bytes(field).decode()
    except UnicodeDecodeError:
        raise BundleError(f"damaged ONNX: {field[2][:32]!r} is no name; copy the bundle again") from None


def _tensor(name: str, array: np.ndarray[Any, np.dtype[Any]]) -> bytes:
    dims: list[Field] = [(1, VARINT, int(size)) for size in array.shape]
    data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return render([*dims, (2, VARINT, TENSOR_TYPES[array.dtype.name]), (8, BYTES, name.encode()), (9, BYTES, data)])
