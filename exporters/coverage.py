"""Whether all of a graph runs on a CUDA device: nodes that ONNX Runtime would give to the CPU.

On a device a session is made for one size of the batch, and what only depends on sizes is computed when it is loaded
(`edgelocal.runtime.provider`). What is left must have a kernel for its types, and a kernel must not wait for a number
that the device computes and the host reads. One node on the CPU can bring others there that have kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from edgelocal.exporters.cuda_kernels import DECIDING, KERNELS, ON_HOST
from edgelocal.exporters.memory.shapes import Found, at_batch, element_bytes

_NAMES: Mapping[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.DOUBLE: "float64",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT16: "float16",
    TensorProto.INT64: "int64",
    TensorProto.INT32: "int32",
    TensorProto.UINT8: "uint8",
    TensorProto.BOOL: "bool",
}


@dataclass(frozen=True)
class Stray:
    """A node that would not run on the device alone: its first output, its operator, the ONNX type of the input that
    decides, and why."""

    output: str
    operator: str
    dtype: int
    reason: str


def strays(model: onnx.ModelProto, batch: int) -> tuple[Stray, ...]:
    """The nodes of a graph, for batches of `batch` samples, that would need the CPU.

    Raises:
        ExportError: a shape cannot be known before the graph runs.
    """
    sized, found = at_batch(model, batch)
    constants = {i.name for i in sized.graph.initializer}
    left = _unfolded(sized, constants)
    made = {name for node in left for name in node.output}
    reasons = ((node, _reason(node, found, made)) for node in left)
    return tuple(
        Stray(node.output[0], node.op_type, _deciding(node, found), reason) for node, reason in reasons if reason
    )


def folded_bytes(model: onnx.ModelProto, batch: int) -> int:
    """Bytes of the values that the runtime computes when it loads the graph for this batch, and keeps."""
    sized, found = at_batch(model, batch)
    constants = {i.name for i in sized.graph.initializer}
    left = {name for node in _unfolded(sized, constants) for name in node.output}
    values = [name for node in sized.graph.node for name in node.output if name not in left]
    return sum(math.prod(found[name][1]) * element_bytes(found[name][0]) for name in values)


def _unfolded(sized: onnx.ModelProto, constants: set[str]) -> list[onnx.NodeProto]:
    """The nodes that depend on more than sizes and constants: the runtime folds values of any size."""
    known = set(constants)
    left = []
    for node in sized.graph.node:
        if all(name in known for name in node.input if name):
            known.update(node.output)
        else:
            left.append(node)
    return left


def _reason(node: onnx.NodeProto, found: Found, made: set[str]) -> str:
    """Why a node needs the CPU; empty if it does not."""
    kinds = KERNELS.get(node.op_type)
    if kinds is None:
        return "has no kernel"
    dtype = _deciding(node, found)
    name = _NAMES.get(dtype, f"type {dtype}")
    if name not in kinds:
        return f"has no kernel for {name}"
    waits = [node.input[i] for i in ON_HOST.get(node.op_type, ()) if i < len(node.input)]
    if any(value in made for value in waits):
        return "waits for a size that depends on the values of a tensor"
    return _refused({a.name: helper.get_attribute_value(a) for a in node.attribute}, node.op_type)


def _deciding(node: onnx.NodeProto, found: Found) -> int:
    """The type of the input by which a kernel is chosen; undefined for an operator that takes none."""
    place = DECIDING.get(node.op_type, 0)
    return found[node.input[place]][0] if place < len(node.input) else TensorProto.UNDEFINED


def _refused(attributes: Mapping[str, object], operator: str) -> str:
    """Why the provider leaves a node with these attributes to the CPU."""
    if operator == "ConvTranspose":
        pads = attributes.get("pads", ())
        assert isinstance(pads, (list, tuple))
        half = len(pads) // 2
        if pads[:half] != pads[half:] or attributes.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
            return "has no kernel for pads that are not symmetric"
    if operator in ("ArgMax", "ArgMin") and attributes.get("select_last_index", 0):
        return "has no kernel that finds the last of equal values"
    if operator == "Cast" and attributes.get("to") not in _NAMES:
        return "has no kernel for the type it casts to"
    if operator == "Pad" and attributes.get("mode") == b"wrap":
        return "has no kernel for mode wrap"
    return ""
