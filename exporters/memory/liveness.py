"""The order in which ONNX Runtime allocates and frees the values of a graph that runs in the order of its nodes.

As its planner does without memory reuse (`enable_mem_reuse=False`): a value is allocated when its node runs and freed
after its last use; reshapes share the memory of their input; the result of some kernels takes the place of their first
input, if nobody needs it any more. Inputs and outputs of the graph are the caller's memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
from onnx import numpy_helper

from edgelocal.exporters.memory.shapes import Typed

# Operators whose kernel on the CPU writes its result over its first input, if that is read no more and as large: found
# by running each between two others and measuring what was touched, with 1.17.3, 1.19.2 and 1.31.1. No other unary
# operator, sum, product, maximum, slice, pad or transposition does.
IN_PLACE = frozenset(
    (
        *("Relu", "Sigmoid", "Tanh", "LeakyRelu", "Elu", "Celu", "Selu", "ThresholdedRelu", "HardSigmoid", "Softplus"),
        *("Softsign", "Clip", "Softmax", "LogSoftmax", "Cast", "ScatterElements"),
    )
)
# The CUDA provider lets activations do so and no others of these (MayInplace in its kernels' definitions, 1.25).
IN_PLACE_CUDA = IN_PLACE - {"Celu", "Clip", "Softmax", "LogSoftmax", "Cast", "ScatterElements"}
ALIASES = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"))


@dataclass(frozen=True)
class Rules:
    """What differs from device to device: the operators that write over their input, and whether a chunk that is freed
    in a run joins the untouched rest of the arena's region. On a device it does not until the run ends: it belongs to
    the run's stream, the rest to none (BFCArena::Coalesce, 1.25)."""

    in_place: frozenset[str]
    joins_rest: bool


CPU_RULES, CUDA_RULES = Rules(IN_PLACE, True), Rules(IN_PLACE_CUDA, False)
RULES = {"cpu": CPU_RULES, "cuda": CUDA_RULES}


@dataclass(frozen=True)
class Op:
    """A node, taken apart once, because the search looks at it many times: `inputs` and `outputs` are what it has now,
    `proto` is the node as it was written."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    proto: onnx.NodeProto

    @classmethod
    def of(cls, node: onnx.NodeProto) -> Op:
        """The node's operator, inputs and outputs."""
        return cls(node.op_type, tuple(node.input), tuple(node.output), node)

    def node(self) -> onnx.NodeProto:
        """The node with the inputs and outputs of now."""
        node = onnx.NodeProto()
        node.CopyFrom(self.proto)
        for place, names in ((node.input, self.inputs), (node.output, self.outputs)):
            del place[:]
            place.extend(names)
        node.name = self.outputs[0]
        return node


@dataclass(frozen=True)
class Graph:
    """What liveness needs to know of a graph, in the order of execution."""

    ops: tuple[Op, ...]
    types: Mapping[str, Typed]
    outer: frozenset[str]  # inputs, outputs and constants: not allocated by a run
    ints: Mapping[str, tuple[int, ...]]  # the constants of whole numbers in one dimension: shapes, axes, bounds
    rules: Rules = CPU_RULES


def graph_of(model: onnx.ModelProto, types: Mapping[str, Typed], rules: Rules = CPU_RULES) -> Graph:
    """The graph of a model whose nodes are in the order of execution, where these rules hold."""
    graph = model.graph
    outer = frozenset(v.name for v in (*graph.input, *graph.output, *graph.initializer))
    ints = {i.name: tuple(map(int, numpy_helper.to_array(i))) for i in graph.initializer if _is_list(i)}
    return Graph(tuple(map(Op.of, graph.node)), types, outer, ints, rules)


def _is_list(constant: onnx.TensorProto) -> bool:
    return constant.data_type == onnx.TensorProto.INT64 and len(constant.dims) == 1


class Walk:
    """What is known of the buffers between two nodes of a run."""

    def __init__(self, graph: Graph) -> None:
        self._types, self._outer, self._in_place = graph.types, graph.outer, graph.rules.in_place
        self._uses = Counter(name for op in graph.ops for name in op.inputs)
        self._root: dict[str, str] = {}  # of values that live or lived: the buffer they lie in
        self._left: dict[str, int] = {}  # uses still to come

    def copy(self) -> Walk:
        """The same moment, to go on from in another way."""
        other = object.__new__(Walk)
        other._types, other._outer, other._uses = self._types, self._outer, self._uses
        other._in_place = self._in_place
        other._root, other._left = dict(self._root), dict(self._left)
        return other

    def step(self, op: Op) -> tuple[list[str], list[str]]:
        """The buffers that the node allocates, and those freed after it. A buffer is named by the first value in it."""
        root, left = self._root, self._left
        new = []
        for output in op.outputs:
            if not output or output in self._outer:
                continue
            shared = self._shared(op, output)
            if shared is None:
                new.append(output)
                shared = output
            root[output] = shared
            left[shared] = left.get(shared, 0) + self._uses[output]
        dead = []  # what nobody reads stays until the end
        for name in op.inputs:
            if name in root:
                buffer = root[name]
                left[buffer] -= 1
                if left[buffer] == 0:
                    dead.append(buffer)
        return new, dead

    def _shared(self, op: Op, output: str) -> str | None:
        """The buffer that `output` shares with an input, if it does."""
        if op.kind in ALIASES:
            return self._root.get(op.inputs[0], op.inputs[0])
        if op.kind in self._in_place:
            source = op.inputs[0]
            buffer = self._root.get(source)
            if buffer is not None and self._left[buffer] == 1 and _same(self._types[source], self._types[output]):
                return buffer
        return None


def buffers(graph: Graph) -> Iterator[tuple[int, list[str], list[str]]]:
    """For every node: its number, the buffers it allocates, and those freed after it."""
    walk = Walk(graph)
    for number, op in enumerate(graph.ops):
        yield number, *walk.step(op)


def _same(a: Typed, b: Typed) -> bool:
    return a.dims == b.dims and a.size == b.size


@dataclass(frozen=True)
class Living:
    """What lives in one run: the most bytes at once, the number of the node there, and a smooth stand-in for the most,
    that also falls when one of several peaks does."""

    most: int
    at: int
    smooth: float


_SHARPNESS = 24  # the larger, the closer the smooth stand-in is to the maximum


def living(graph: Graph, batch: int) -> Living:
    """What lives while the graph runs on `batch` samples."""
    live = most = at = 0
    total = 0.0
    sizes: dict[str, int] = {}
    for number, new, dead in buffers(graph):
        for name in new:
            sizes[name] = graph.types[name].size.at(batch)
            live += sizes[name]
        if live > most:
            most, at = live, number
        total += float(live) ** _SHARPNESS
        for name in dead:
            live -= sizes.pop(name, 0)
    return Living(most, at, total ** (1 / _SHARPNESS))


_ELEMENTWISE = frozenset(("Add", "Sub", "Mul", "Div"))


def overwritable(graph: Graph, pairs: Mapping[str, str]) -> tuple[str, ...]:
    """Those inputs of `pairs` (input -> output, its new value) that the output may be written over.

    In any order of execution: every op that reads the input is one that the output is computed from, or the op that
    writes it, element by element.
    """
    maker = {name: number for number, op in enumerate(graph.ops) for name in op.outputs}
    readers: dict[str, set[int]] = {name: set() for name in pairs}
    for number, op in enumerate(graph.ops):
        for name in op.inputs:
            if name in readers:
                readers[name].add(number)
    found = []
    for name, output in pairs.items():
        if output not in maker:
            continue
        last = maker[output]
        plain = graph.ops[last].kind in _ELEMENTWISE or last not in readers[name]
        if plain and readers[name] <= _ancestors(graph, last, maker) | {last}:
            found.append(name)
    return tuple(found)


def _ancestors(graph: Graph, number: int, maker: Mapping[str, int]) -> set[int]:
    """Numbers of the ops that op `number` is computed from."""
    found: set[int] = set()
    waiting = [number]
    while waiting:
        new = {maker[name] for name in graph.ops[waiting.pop()].inputs if name in maker} - found
        found |= new
        waiting += new
    return found
