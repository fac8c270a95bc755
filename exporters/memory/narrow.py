"""A weight gradient in two halves of the input's channels, where its workspace makes the peak.

The gradient of a convolution's weight is a product for every tap of the kernel (exporters/lowering/convolution.py); the
input laid out for them, and the piece of it that a tap meets, are maps as large as the input. Half of the channels at a
time take half of that. Every element is the same sum, but for rounding where samples are merged into it; slicing costs
some time (docs/decisions/0012), so that it is done only there.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import TensorProto, helper

from edgelocal.bundle.spec import NODE_BYTES
from edgelocal.exporters.memory.liveness import Graph, Op, living
from edgelocal.exporters.memory.shapes import Size, Typed

_FEWEST_CHANNELS = 8  # in a half: with fewer columns the kernel of the product idles
_MOST_ROUNDS = 16


def narrow(graph: Graph, batch: int) -> Graph:
    """The graph with as many weight gradients in halves as lower what lives at once by more than their nodes take.

    One after the other, always the one at the peak: there may be several as high, so that the first alone helps little.
    """
    best, least = graph, _bytes(graph, batch)
    for _ in range(_MOST_ROUNDS):
        at = living(graph, batch).at
        part = next((p for p in _products(graph) if p.numbers[0] <= at <= p.numbers[-1]), None)
        if part is None:
            break
        graph = _halved(graph, part)
        size = _bytes(graph, batch)
        if size < least:
            best, least = graph, size
    return best


def _bytes(graph: Graph, batch: int) -> int:
    return living(graph, batch).most + NODE_BYTES * len(graph.ops)


@dataclass(frozen=True)
class _Part:
    """The ops between a map and products of it, each of which handles channels apart: `axes` says along which axis the
    channels of a value lie, `source` is the map, `results` are the products."""

    source: str
    results: tuple[str, ...]
    numbers: tuple[int, ...]
    axes: Mapping[str, int]


def _products(graph: Graph) -> list[_Part]:
    """The products that could be halved, those of one map and layout together."""
    made = {name: number for number, op in enumerate(graph.ops) for name in op.outputs}
    readers: dict[str, set[int]] = defaultdict(set)
    for number, op in enumerate(graph.ops):
        for name in op.inputs:
            readers[name].add(number)
    chains: dict[int, list[list[tuple[str, int]]]] = defaultdict(list)
    for op in graph.ops:
        if op.kind in ("ReduceSum", "Gemm") and op.outputs[0] not in graph.outer:
            chain = _chain(graph, op.outputs[0], made)
            if any(graph.ops[made[value]].kind in ("MatMul", "Gemm") for value, _ in chain[:-1]):
                chains[made[chain[-2][0]]].append(chain)
    found = []
    for together in chains.values():
        axes = {value: axis for chain in together for value, axis in chain}
        source = together[0][-1][0]
        numbers = sorted({made[value] for value in axes if value != source})
        results = tuple(chain[0][0] for chain in together)
        inner = set(axes) - {source, *results}
        divisible = _divisible(graph, source, axes[source], made)
        if divisible and all(readers[value] <= set(numbers) for value in inner):
            found.append(_Part(source, results, tuple(numbers), axes))
    return found


def _divisible(graph: Graph, source: str, axis: int, made: Mapping[str, int]) -> bool:
    """Whether the map has channels enough for two halves and is not a half itself."""
    channels = graph.types[source].dims[axis]
    maker = graph.ops[made[source]] if source in made else None
    if maker is not None and maker.kind == "Slice" and axis in graph.ints.get(maker.inputs[3], (axis,)):
        return False
    return isinstance(channels, int) and channels % 2 == 0 and channels // 2 >= _FEWEST_CHANNELS


def _chain(graph: Graph, value: str, made: Mapping[str, int]) -> list[tuple[str, int]]:
    """From a result back to the map it is made of: values and the axis of each along which the channels lie."""
    axis = len(graph.types[value].dims) - 1
    chain = [(value, axis)]
    while value in made and value not in graph.outer:
        step = _before(graph, graph.ops[made[value]], axis)
        if step is None:
            break
        value, axis = step
        chain.append(step)
    return chain


def _before(graph: Graph, op: Op, axis: int) -> tuple[str, int] | None:
    """The input that has the channels of the result, and their axis there; None if the op mixes them."""
    ints = graph.ints
    attributes = {a.name: helper.get_attribute_value(a) for a in op.proto.attribute}
    match op.kind:
        case "MatMul" if axis == len(graph.types[op.outputs[0]].dims) - 1:
            return op.inputs[1], len(graph.types[op.inputs[1]].dims) - 1
        case "Gemm" if axis == 1 and attributes.get("transB") and len(op.inputs) == 2:
            return op.inputs[1], 0
        case "ReduceSum" if attributes.get("keepdims", 1) == 1 and ints.get(op.inputs[1]) == (0,):
            return op.inputs[0], axis
        case "Slice" if len(op.inputs) == 4 and axis not in ints.get(op.inputs[3], (axis,)):
            return op.inputs[0], axis
        case "Cast" if TensorProto.BFLOAT16 in (attributes["to"], graph.types[op.inputs[0]].dtype):
            return op.inputs[0], axis
        case "Pad" if _untouched(ints.get(op.inputs[1]), axis):
            return op.inputs[0], axis
        case "Transpose":
            return op.inputs[0], attributes["perm"][axis]
        case "Reshape":
            before = _reshaped(graph.types[op.inputs[0]].dims, graph.types[op.outputs[0]].dims, axis)
            shape = ints.get(op.inputs[1])
            if before is not None and shape is not None and shape[axis] > 0:
                return op.inputs[0], before
    return None


def _untouched(pads: Sequence[int] | None, axis: int) -> bool:
    return pads is not None and pads[axis] == 0 and pads[axis + len(pads) // 2] == 0


def _reshaped(old: Sequence[int | str], new: Sequence[int | str], axis: int) -> int | None:
    """The axis of `old` that is axis `axis` of `new`: as long, and with as many elements before it."""
    for place, length in enumerate(old):
        if length == new[axis] and _count(old[:place]) == _count(new[:axis]):
            return place
    return None


def _count(dims: Sequence[int | str]) -> tuple[int, Counter[str]]:
    return math.prod(d for d in dims if isinstance(d, int)), Counter(d for d in dims if isinstance(d, str))


def _halved(graph: Graph, part: _Part) -> Graph:
    """The graph with the products made in two halves, one after the other, and put together.

    What runs between them stays before the second half, unless it reads a product.
    """
    first, last = part.numbers[0], part.numbers[-1]
    inside = set(part.numbers)
    halves = [_Half(graph, part, which) for which in (0, 1)]
    span: list[Op] = [half.start for half in halves]  # both at once, so that the map can go
    late, waiting = set(part.results), []
    for number in range(first, last + 1):
        op = graph.ops[number]
        if number in inside:
            span.append(halves[0].op(op))
        elif late.intersection(op.inputs):
            late.update(op.outputs)
            waiting.append(op)
        else:
            span.append(op)
    span += [halves[1].op(graph.ops[number]) for number in part.numbers]
    for name in part.results:
        inputs = [half.name(name) for half in halves]
        span.append(Op.of(helper.make_node("Concat", inputs, [name], name=name, axis=part.axes[name])))
    types = {**graph.types, **halves[0].types, **halves[1].types}
    constants = {**graph.ints, **halves[0].ints, **halves[1].ints}
    ops = (*graph.ops[:first], *span, *waiting, *graph.ops[last + 1 :])
    return replace(graph, ops=ops, types=types, ints=constants, outer=graph.outer | constants.keys())


class _Half:
    """One half of the channels: the ops of a part, their values renamed and narrower."""

    def __init__(self, graph: Graph, part: _Part, which: int) -> None:
        self._graph, self._part, self._which = graph, part, which
        self.types: dict[str, Typed] = {self.name(value): self._type(value) for value in part.axes}
        self.ints: dict[str, tuple[int, ...]] = {}
        source, axis = part.source, part.axes[part.source]
        middle = int(graph.types[source].dims[axis]) // 2
        bounds = [self._constant((n,)) for n in (which * middle, (which + 1) * middle, axis)]
        name = self.name(source)
        self.start = Op.of(helper.make_node("Slice", [source, *bounds], [name], name=name))

    def name(self, value: str) -> str:
        """Of the half of a value."""
        return f"{value}/{self._part.results[0]}/{self._which}"

    def op(self, op: Op) -> Op:
        """The op that makes half of what `op` makes."""
        inputs = [self.name(name) if name in self._part.axes else name for name in op.inputs]
        if op.kind == "Reshape":
            shape = list(self._graph.ints[op.inputs[1]])
            shape[self._part.axes[op.outputs[0]]] //= 2
            inputs[1] = self._constant(shape)
        return replace(op, inputs=tuple(inputs), outputs=tuple(map(self.name, op.outputs)))

    def _type(self, value: str) -> Typed:
        whole, axis = self._graph.types[value], self._part.axes[value]
        dims = (*whole.dims[:axis], int(whole.dims[axis]) // 2, *whole.dims[axis + 1 :])
        return Typed(whole.dtype, dims, Size(whole.size.fixed // 2, whole.size.per_sample // 2))

    def _constant(self, values: Sequence[int]) -> str:
        """The name of a constant; equal ones have one name."""
        name = "ints/" + "_".join(map(str, values))
        self.ints[name] = tuple(values)
        self.types[name] = Typed(TensorProto.INT64, (len(values),), Size(8 * len(values), 0))
        return name
