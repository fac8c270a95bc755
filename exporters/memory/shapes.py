"""Sizes of every value of a graph as functions of the batch.

The graph is evaluated symbolically at two batches: ONNX's own shape inference, helped by computing what only depends on
the batch (shapes and numbers derived from them). From two sizes follow a fixed part and a part a sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from edgelocal.bundle.spec import BATCH
from edgelocal.errors import ExportError

# Two batches that no other size of a network is likely to be a multiple of: dimensions are told apart by them.
PROBES = (1009, 2003)
_SMALL = 1 << 16  # elements of a value that is computed to learn shapes

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Size:
    """Bytes of a value: fixed + per_sample * batch."""

    fixed: int
    per_sample: int

    def at(self, batch: int) -> int:
        """Bytes with `batch` samples."""
        return self.fixed + self.per_sample * batch


@dataclass(frozen=True)
class Typed:
    """Type and shape of a value: dims are numbers, "N", or multiples of the batch such as "64N"."""

    dtype: int
    dims: tuple[int | str, ...]
    size: Size

    def info(self, name: str) -> onnx.ValueInfoProto:
        """As the graph says it."""
        return helper.make_tensor_value_info(name, self.dtype, list(self.dims))


def value_types(model: onnx.ModelProto) -> dict[str, Typed]:
    """Type, shape and size of every value of the graph, by name.

    Raises:
        ExportError: a shape cannot be known before the graph runs.
    """
    first, second = (at_batch(model, batch)[1] for batch in PROBES)
    return {name: _typed(name, dtype, shape, second[name][1]) for name, (dtype, shape) in first.items()}


def _typed(name: str, dtype: int, small: tuple[int, ...], large: tuple[int, ...]) -> Typed:
    width = element_bytes(dtype)
    counts = math.prod(small) * width, math.prod(large) * width
    per_sample, rest = divmod(counts[1] - counts[0], PROBES[1] - PROBES[0])
    if rest or len(small) != len(large):
        raise ExportError(
            f"value {name} of the graph has shape {small} for a batch of {PROBES[0]}: not one row a sample"
        )
    dims = tuple(_dim(a, b) for a, b in zip(small, large, strict=True))
    return Typed(dtype, dims, Size(counts[0] - per_sample * PROBES[0], per_sample))


def element_bytes(dtype: int) -> int:
    """Bytes of an element; of bfloat16 2, which releases of ONNX without a NumPy type for it take for float32."""
    return 2 if dtype == onnx.TensorProto.BFLOAT16 else int(helper.tensor_dtype_to_np_dtype(dtype).itemsize)


def _dim(small: int, large: int) -> int | str:
    if small == large:
        return small
    times, rest = divmod(small, PROBES[0])
    if rest == 0 and times * PROBES[1] == large:
        return BATCH if times == 1 else f"{times}{BATCH}"
    slope = (large - small) // (PROBES[1] - PROBES[0])
    return f"{slope}{BATCH}{small - slope * PROBES[0]:+d}"


Found = dict[str, tuple[int, tuple[int, ...]]]


def at_batch(model: onnx.ModelProto, batch: int) -> tuple[onnx.ModelProto, Found]:
    """The model for one batch, in which small values that follow from sizes and constants are constants, and element
    type and shape of every value.

    Raises:
        ExportError: a shape cannot be known before the graph runs.
    """
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    graph = sized.graph
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = batch
    known: dict[str, Array] = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    while True:
        found = _infer(sized)
        if not _compute_small(sized, known, found):
            break
    missing = [o for node in model.graph.node for o in node.output if o and o not in found]
    if missing:
        raise ExportError(f"the shape of {missing[0]} cannot be known before the graph runs; please report this")
    return sized, found


def _infer(model: onnx.ModelProto) -> Found:
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    found: Found = {i.name: (i.data_type, tuple(i.dims)) for i in model.graph.initializer}
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            found[value.name] = kind.elem_type, tuple(d.dim_value for d in kind.shape.dim)
    return found


def _compute_small(model: onnx.ModelProto, known: dict[str, Array], found: Found) -> bool:
    """Replace nodes whose result follows from shapes and constants; whether there were any."""
    graph = model.graph
    kept, new = [], {}
    for node in graph.node:
        results = _evaluate(node, known, found)
        if results is None:
            kept.append(node)
        else:
            known.update(results)
            new.update(results)
    if new:
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(nodes)
        outputs = {o.name for o in graph.output}
        graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in new.items() if n not in outputs)
    return bool(new)


def _evaluate(node: onnx.NodeProto, known: Mapping[str, Array], found: Found) -> dict[str, Array] | None:
    if node.op_type == "Shape" and node.input[0] in found:
        bounds = {a.name: a.i for a in node.attribute}
        shape = np.asarray(found[node.input[0]][1], dtype=np.int64)
        return {node.output[0]: shape[bounds.get("start", 0) : bounds.get("end", len(shape))]}
    inputs = [name for name in node.input if name]
    if not inputs or any(name not in known for name in inputs):
        return None
    if node.op_type in ("Expand", "ConstantOfShape") and math.prod(int(v) for v in known[inputs[-1]]) > _SMALL:
        return None
    results = ReferenceEvaluator(node).run(None, {name: known[name] for name in inputs})
    if any(np.size(r) > _SMALL for r in results):
        return None
    return {name: np.asarray(value) for name, value in zip(node.output, results, strict=True)}
