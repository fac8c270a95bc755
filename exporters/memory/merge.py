"""Equal nodes on equal inputs are computed once, and what depends on constants only is computed now.

The runtime would do both, but its own passes are off where a graph is trained: they also undo recomputation and
change the order of the nodes, on which the memory plan rests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

_LARGEST_CONSTANT = 1024  # elements


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with constants folded and common subexpressions merged; outputs keep their names."""
    return _merged(_folded(model))


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = model.graph
    known = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    outputs = {o.name for o in graph.output}
    kept: list[onnx.NodeProto] = []
    folded: dict[str, np.ndarray[Any, np.dtype[Any]]] = {}
    for node in graph.node:
        inputs = [name for name in node.input if name]
        if not inputs or any(name not in known for name in inputs) or outputs.intersection(node.output):
            kept.append(node)
            continue
        results = [np.asarray(r) for r in ReferenceEvaluator(node).run(None, {name: known[name] for name in inputs})]
        if any(r.size > _LARGEST_CONSTANT for r in results):
            kept.append(node)
            continue
        folded.update(zip(node.output, results, strict=True))
        known.update(folded)
    used = {name for node in kept for name in node.input}
    constants = [i for i in graph.initializer if i.name in used]
    constants += [numpy_helper.from_array(a, name) for name, a in folded.items() if name in used]
    return _rebuilt(model, kept, constants)


def _merged(model: onnx.ModelProto) -> onnx.ModelProto:
    outputs = {o.name for o in model.graph.output}
    seen: dict[bytes, tuple[str, ...]] = {}
    same: dict[str, str] = {}
    kept = []
    for original in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        del node.input[:]
        node.input.extend(same.get(name, name) for name in original.input)
        key = _key(node)
        if key in seen and not outputs.intersection(node.output):
            same.update(zip(node.output, seen[key], strict=True))
            continue
        seen.setdefault(key, tuple(node.output))
        kept.append(node)
    return _rebuilt(model, kept, list(model.graph.initializer))


def _key(node: onnx.NodeProto) -> bytes:
    """What a node computes: everything but its name and those of its results."""
    bare = onnx.NodeProto()
    bare.CopyFrom(node)
    bare.name = ""
    count = len(bare.output)
    del bare.output[:]
    bare.output.extend([""] * count)
    result: bytes = bare.SerializeToString(deterministic=True)
    return result


def _rebuilt(model: onnx.ModelProto, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del result.graph.node[:]
    result.graph.node.extend(copies)
    values = [onnx.TensorProto.FromString(c.SerializeToString()) for c in constants]
    del result.graph.initializer[:]
    result.graph.initializer.extend(values)
    return result
