"""A place for small values, so that they do not lie in the way of large ones.

The arena gives a request the smallest free chunk that holds it. While the first maps are made there are only large
ones, and a vector of statistics that lives until the backward pass takes the corner of a hole into which a map would
have fitted to the byte. So a buffer as large as all small values together is allocated first, and freed as soon as the
first map lies behind it: from then on it is the smallest hole.
"""

from __future__ import annotations

from dataclasses import replace

from onnx import TensorProto, helper

from edgelocal.exporters.memory.arena import rounded
from edgelocal.exporters.memory.liveness import Graph, Op, buffers, living
from edgelocal.exporters.memory.shapes import Size, Typed

_SMALL = 1 << 15  # bytes
_LARGE = 0.02  # of the peak
_ITEM = 4  # bytes of a float32
_NAME, _READ, _SHAPE = "pocket", "pocket/read", "pocket/shape"


def with_pocket(graph: Graph, batch: int) -> Graph | None:
    """The graph with a pocket for its small values; None where it has none, or no large ones."""
    size = _most_small(graph, batch)
    least = _LARGE * living(graph, batch).most
    maps = (
        number
        for number, op in enumerate(graph.ops)
        if any(o and o not in graph.outer and graph.types[o].size.at(batch) >= least for o in op.outputs)
    )
    first = next(maps, None)
    if size == 0 or first is None:
        return None
    count = size // _ITEM
    types = {
        **graph.types,
        _NAME: Typed(TensorProto.FLOAT, (count,), Size(size, 0)),
        _READ: Typed(TensorProto.FLOAT, (), Size(_ITEM, 0)),
        _SHAPE: Typed(TensorProto.INT64, (1,), Size(8, 0)),
    }
    # A value lives until its last reader has run.
    make = Op.of(helper.make_node("ConstantOfShape", [_SHAPE], [_NAME], name=_NAME))
    read = Op.of(helper.make_node("ReduceMax", [_NAME], [_READ], name=_READ, keepdims=0))
    ops = (*graph.ops[:first], make, graph.ops[first], read, *graph.ops[first + 1 :])
    ints = {**graph.ints, _SHAPE: (count,)}
    return replace(graph, ops=ops, types=types, outer=graph.outer | {_SHAPE}, ints=ints)


def _most_small(graph: Graph, batch: int) -> int:
    """Bytes of small values that the arena holds at once, at most."""
    live: dict[str, int] = {}
    most = now = 0
    for _, new, dead in buffers(graph):
        for name in new:
            size = rounded(graph.types[name].size.at(batch))
            live[name] = size if size <= _SMALL else 0
            now += live[name]
        most = max(most, now)
        for name in dead:
            now -= live.pop(name, 0)
    return most
