"""Graphs of a few nodes, made on the spot: what the runtime loads with its first run is in memory afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgelocal.bundle.protobuf import BYTES, VARINT, render

Node = tuple[str, tuple[str, ...], str]  # operator, inputs, output
_IR, _OPSET, _FLOAT32 = 8, 13, 1


def tiny_model(
    nodes: Sequence[Node],
    inputs: Mapping[str, tuple[int, ...]],
    output: tuple[str, tuple[int, ...]],
    constants: Sequence[str] = (),
) -> bytes:
    """An ONNX model of these nodes, all tensors float32; `constants` are zeros of shape (1,)."""
    graph = render(
        [
            *((1, BYTES, _node(*node)) for node in nodes),
            (2, BYTES, b"first"),
            *((5, BYTES, _zero(name)) for name in constants),
            *((11, BYTES, _value(name, shape)) for name, shape in inputs.items()),
            (12, BYTES, _value(*output)),
        ]
    )
    return render([(1, VARINT, _IR), (7, BYTES, graph), (8, BYTES, render([(2, VARINT, _OPSET)]))])


def _zero(name: str) -> bytes:
    return render([(1, VARINT, 1), (2, VARINT, _FLOAT32), (8, BYTES, name.encode()), (9, BYTES, bytes(4))])


def _node(operator: str, inputs: Sequence[str], output: str) -> bytes:
    return render(
        [*((1, BYTES, name.encode()) for name in inputs), (2, BYTES, output.encode()), (4, BYTES, operator.encode())]
    )


def _value(name: str, shape: Sequence[int]) -> bytes:
    sizes = render([(1, BYTES, render([(1, VARINT, size)])) for size in shape])
    tensor = render([(1, VARINT, _FLOAT32), (2, BYTES, sizes)])
    return render([(1, BYTES, name.encode()), (2, BYTES, render([(1, BYTES, tensor)]))])
