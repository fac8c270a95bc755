"""The simulated arena: kernels that write over their inputs as measured, values that lie where it says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from device_tests.export.touched import touched
from edgelocal.bundle.memory_spec import table_bytes
from edgelocal.bundle.spec import GraphSpec, TensorSpec
from edgelocal.exporters.memory.arena import ALIGNMENT, Arena
from edgelocal.exporters.memory.liveness import IN_PLACE, RULES, Graph, Op, buffers, graph_of
from edgelocal.exporters.memory.model import scratch
from edgelocal.exporters.memory.shapes import Size, Typed, value_types
from edgelocal.exporters.memory.simulate import arena_after

MIB = 1 << 20
BATCH = 4
SHAPE = ("N", 512, 1024)
ONE = 8 * MIB  # bytes of such a map at that batch
CONSTANTS = {
    "zero": np.zeros(1, np.int64),
    "end": np.full(1, 1 << 40, np.int64),
    "two": np.float32(2),
    "indices": np.zeros((1, 1, 1024), np.int64),
    "updates": np.zeros((1, 1, 1024), np.float32),
}


def needed(nodes: list[onnx.NodeProto], work: Path) -> tuple[int, int]:
    """Bytes that nodes from a map `x` to a number `h` need of the arena: simulated, and measured."""
    x, h = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, d) for n, d in (("x", SHAPE), ("h", ())))
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in CONSTANTS.items()]
    graph = helper.make_graph(nodes, "small", [x], [h], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    types = value_types(model)
    made = [name for node in nodes for name in node.output if name != "h"]
    model.graph.value_info.extend(types[name].info(name) for name in made)
    found = arena_after(graph_of(model, types), BATCH, scratch)
    tensors = (TensorSpec("x", SHAPE, "float32"),), (TensorSpec("h", (), "float32"),)
    values = {"x": np.full((BATCH, *SHAPE[1:]), 0.5, np.float32)}  # type: ignore[arg-type]
    region = 8 * ONE
    grown = touched(work, GraphSpec("graph.onnx", *tensors), model, values, BATCH, region)
    return found.peak, grown - table_bytes(region)


OPERATORS = {
    **{kind: (("a",), {}) for kind in ("Relu", "Sigmoid", "Tanh", "Elu", "Celu", "Selu", "LeakyRelu", "Clip")},
    **{kind: (("a",), {}) for kind in ("ThresholdedRelu", "HardSigmoid", "Softplus", "Softsign")},
    "Cast": (("a",), {"to": onnx.TensorProto.INT32}),
    **{kind: (("a",), {"axis": -1}) for kind in ("Softmax", "LogSoftmax")},
    "ScatterElements": (("a", "indices", "updates"), {"axis": 1, "reduction": "add"}),
    **{kind: (("a",), {}) for kind in ("Sqrt", "Exp", "Erf", "Reciprocal", "Neg")},
    **{kind: (("a", "two"), {}) for kind in ("Add", "Mul", "Sub", "Div", "Max", "Pow")},
    "Slice": (("a", "zero", "end", "zero"), {}),
    "Transpose": (("a",), {"perm": [0, 1, 2]}),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_a_kernel_writes_over_its_input_where_the_model_says(kind: str, tmp_path: Path) -> None:
    """One map where it does, two where it does not; no value may be an input or output of the graph."""
    inputs, attributes = OPERATORS[kind]
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node(kind, inputs, ["b"], **attributes),
        helper.make_node("ReduceMax", ["b"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["h"], to=onnx.TensorProto.FLOAT),
    ]
    simulated, measured = needed(nodes, tmp_path)
    assert simulated == pytest.approx(ONE if kind in IN_PLACE else 2 * ONE, abs=MIB)
    assert measured == pytest.approx(simulated, abs=MIB)


def test_every_kernel_that_the_model_names_is_asked() -> None:
    assert OPERATORS.keys() >= IN_PLACE


def test_what_is_read_again_is_not_written_over(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("Softmax", ["a"], ["b"], axis=-1),
        helper.make_node("Mul", ["a", "b"], ["c"]),
        helper.make_node("ReduceMax", ["c"], ["h"], keepdims=0),
    ]
    simulated, measured = needed(nodes, tmp_path)
    assert simulated == pytest.approx(3 * ONE, abs=MIB)
    assert measured == pytest.approx(simulated, abs=MIB)


def test_what_nobody_reads_stays_until_the_end_of_a_run(tmp_path: Path) -> None:
    """A small value between two maps, never read: a value of twice their size does not fit where they were."""
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("ReduceMax", ["a"], ["unread"]),
        helper.make_node("Exp", ["x"], ["b"]),
        helper.make_node("Sum", ["a", "b"], ["c"]),
        helper.make_node("ReduceMean", ["c"], ["mean"], keepdims=0),
        helper.make_node("Concat", ["x", "x"], ["twice"], axis=1),
        helper.make_node("ReduceMax", ["twice"], ["most"], keepdims=0),
        helper.make_node("Add", ["mean", "most"], ["h"]),
    ]
    simulated, measured = needed(nodes, tmp_path)
    assert 3 * ONE < simulated < 4 * ONE
    assert measured == pytest.approx(simulated, abs=MIB)


@dataclass
class Region:
    """The runtime's allocator in one region, written down once more, as plainly as can be: `chunks` are (start, size,
    taken) in the order of addresses. A request takes the smallest free chunk of the lowest bin that has one large
    enough, and gives back what it does not need."""

    chunks: list[tuple[int, int, bool]]

    @staticmethod
    def bin_of(size: int) -> int:
        return min((size // ALIGNMENT).bit_length() - 1, 20)

    def allocate(self, size: int) -> int | None:
        size = max(1, -(-size // ALIGNMENT)) * ALIGNMENT
        free = [(self.bin_of(length), length, start) for start, length, taken in self.chunks if not taken]
        fitting = [chunk for chunk in free if chunk[1] >= size]
        if not fitting:
            return None
        _, length, start = min(fitting)
        at = self.chunks.index((start, length, False))
        rest = [(start + size, length - size, False)] if length > size else []
        self.chunks[at : at + 1] = [(start, size, True), *rest]
        return start

    def free(self, start: int) -> None:
        at = next(i for i, chunk in enumerate(self.chunks) if chunk[0] == start)
        first = last = at
        while first > 0 and not self.chunks[first - 1][2]:
            first -= 1
        while last + 1 < len(self.chunks) and not self.chunks[last + 1][2]:
            last += 1
        size = sum(chunk[1] for chunk in self.chunks[first : last + 1])
        self.chunks[first : last + 1] = [(self.chunks[first][0], size, False)]


# A request of so many bytes, or the return of one of those held (its number, modulo how many there are).
REQUESTS = st.lists(
    st.one_of(st.tuples(st.just("new"), st.integers(1, 40_000)), st.tuples(st.just("free"), st.integers(0, 99))),
    max_size=120,
)


@settings(max_examples=400)
@given(REQUESTS, st.integers(0, 9))
def test_in_a_region_with_room_values_lie_where_the_simulation_says(
    requests: list[tuple[str, int]], larger: int
) -> None:
    """In the smallest such region, and in larger ones."""
    endless, expected, held = Arena(), [], []
    for kind, number in requests:
        if kind == "new":
            held.append(endless.allocate(number))
            expected.append(held[-1])
        elif held:
            endless.free(held.pop(number % len(held)))
    room = max(endless.room, endless.peak)
    region, found, held = Region([(0, room + larger * ALIGNMENT, False)]), [], []
    for kind, number in requests:
        if kind == "new":
            start = region.allocate(number)
            assert start is not None
            held.append(start)
            found.append(start)
        elif held:
            region.free(held.pop(number % len(held)))
    assert found == expected


def test_a_region_just_as_large_as_the_peak_can_be_too_small() -> None:
    """Why it has room: its rest is taken before a larger hole, and what would have fitted there does not."""
    endless = Arena()
    requests = [6, 1, 2]  # KiB; the first is freed, a hole of 6 before 1 and 2
    starts = [endless.allocate(size << 10) for size in requests]
    endless.free(starts[0])
    assert [endless.allocate(size << 10) >> 10 for size in (3, 3, 4)] == [0, 3, 9]
    assert endless.peak == 13 << 10
    assert endless.room == 15 << 10  # 9 in use, when of the hole of 6 the first 3 are taken
    small = Region([(0, endless.peak, False)])
    starts = [small.allocate(size << 10) or 0 for size in requests]
    small.free(starts[0])
    assert [small.allocate(size << 10) for size in (3, 3, 4)] == [9 << 10, 0, None]


def test_on_a_device_what_is_freed_beside_the_rest_stays_apart() -> None:
    """Two of 4 KiB go, and 9 come: on the host they are a part of the rest again, on a device a hole of 8 before it."""
    ends = []
    for joins in (True, False):
        arena = Arena(joins_rest=joins)
        starts = [arena.allocate(4 << 10) for _ in range(2)]
        for start in starts:
            arena.free(start)
        assert arena.allocate(9 << 10) >> 10 == (0 if joins else 8)
        ends.append(arena.peak >> 10)
        assert arena.copy().allocate(2 << 10) >> 10 == (9 if joins else 0)
    assert ends == [9, 17]


def test_cuda_writes_fewer_results_over_their_inputs() -> None:
    nodes = [helper.make_node("Exp", ["x"], ["a"]), helper.make_node("Softmax", ["a"], ["b"])]
    nodes += [helper.make_node("Relu", ["b"], ["c"]), helper.make_node("Exp", ["c"], ["y"])]
    sizes = {name: Typed(onnx.TensorProto.FLOAT, ("N", 1000), Size(0, 4000)) for name in "xabcy"}
    found = {}
    for name, rules in RULES.items():
        graph = Graph(tuple(map(Op.of, nodes)), sizes, frozenset("xy"), {}, rules)
        found[name] = [new for _, new, _ in buffers(graph)]
    assert found == {"cpu": [["a"], [], [], []], "cuda": [["a"], ["b"], [], []]}
