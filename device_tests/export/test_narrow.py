"""Weight gradients in halves, and a pocket for small values: the same bits in less memory."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from device_tests.export import helpers
from device_tests.export.accumulation import TASK, build
from device_tests.export.helpers import Arrays
from edgelocal.exporters.memory.liveness import Graph, graph_of, living
from edgelocal.exporters.memory.merge import simplify
from edgelocal.exporters.memory.model import scratch
from edgelocal.exporters.memory.narrow import narrow
from edgelocal.exporters.memory.optimise import model_of
from edgelocal.exporters.memory.order import queries_first
from edgelocal.exporters.memory.pocket import with_pocket
from edgelocal.exporters.memory.shapes import value_types
from edgelocal.exporters.memory.simulate import arena_peak
from edgelocal.exporters.onnx_block import ExportedGraph
from edgelocal.exporters.onnx_step import step_graph
from edgelocal.exporters.optimizers import sgd
from edgelocal.exporters.units import GlobalMean
from edgelocal.exporters.zoo.custom import from_module

SHAPE = (3, 16, 16)
BATCH = 32


def tail(channels: int) -> list[nn.Module]:
    return [GlobalMean(), nn.Linear(channels, 10)]


# One product a tap and sample, with a stride, and merged over the samples (128 x 128 channels).
NETWORKS = {
    "samples": lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), *tail(16)),
    "stride": lambda: nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, 2, padding=1), *tail(64)),
    "merged": lambda: nn.Sequential(nn.Conv2d(3, 128, 3, padding=1), nn.Conv2d(128, 128, 3, padding=1), *tail(128)),
}
# A channel apart from the others, an odd number of channels, and too few: nothing to halve.
WHOLE = {
    "depthwise": lambda: nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32), *tail(32)),
    "odd": lambda: nn.Sequential(nn.Conv2d(3, 33, 3, padding=1), nn.Conv2d(33, 33, 3, padding=1), *tail(33)),
    "few": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), *tail(8)),
}


@functools.cache
def step(name: str) -> tuple[ExportedGraph, onnx.ModelProto, Graph]:
    """The step graph of a whole network."""
    torch.manual_seed(0)
    network = from_module((NETWORKS | WHOLE)[name](), name.replace(" ", "_"), SHAPE, 10)
    (block,) = build(network, 1, "bp")
    exported = step_graph(block, TASK, sgd(), SHAPE, torch.float32)
    model = simplify(exported.model)
    return exported, model, queries_first(graph_of(model, value_types(model)))


def results(exported: ExportedGraph, model: onnx.ModelProto, batch: int) -> Arrays:
    rng = np.random.default_rng(batch)
    feeds = {}
    for t in exported.inputs:
        shape = t.resolve(batch)
        numbers = np.asarray(0.3 * rng.standard_normal(shape), np.float32)
        feeds[t.name] = rng.integers(0, 10, shape) if t.dtype == "int64" else numbers
    names = [t.name for t in exported.outputs]
    return dict(zip(names, helpers.session(model).run(names, feeds), strict=True))


@pytest.mark.parametrize("batch", [1, 5, BATCH])
@pytest.mark.parametrize("name", NETWORKS)
def test_halves_are_the_same_in_less_memory(name: str, batch: int) -> None:
    exported, model, graph = step(name)
    halved = narrow(graph, BATCH)
    onnx.checker.check_model(model_of(model, halved))
    products = [sum(op.kind in ("MatMul", "Gemm") for op in g.ops) for g in (graph, halved)]
    assert products[1] > products[0]
    assert living(halved, BATCH).most < 0.95 * living(graph, BATCH).most
    before, after = (results(exported, model_of(model, g), batch) for g in (graph, halved))
    if name == "merged":  # the runtime cuts the long sums of a narrower product at other places
        assert max(float(np.abs(after[key] - before[key]).max()) for key in before) < 1e-5
    else:
        assert [key for key in before if before[key].tobytes() != after[key].tobytes()] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_half_is_said_to_take_is_what_it_takes(name: str) -> None:
    """Against the shapes that ONNX infers in the new model."""
    _, model, graph = step(name)
    halved = narrow(graph, BATCH)
    inferred = value_types(model_of(model, halved))
    wrong = [value for value, found in inferred.items() if halved.types[value] != found]
    assert wrong == []


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_halved_stays(name: str) -> None:
    graph = step(name)[2]
    assert narrow(graph, BATCH) is graph


def test_halves_are_not_made_where_their_nodes_take_more_than_they_save() -> None:
    graph = step("samples")[2]
    assert narrow(graph, 1) is graph


def maps_and_means() -> onnx.ModelProto:
    """Means of maps that outlive them: the second takes the corner of the hole that the first map left."""
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("Exp", ["x"], ["b"]),
        helper.make_node("ReduceMean", ["b"], ["mean b"]),
        helper.make_node("ReduceMean", ["a"], ["mean a"]),
        helper.make_node("Exp", ["a"], ["c"]),
        helper.make_node("ReduceMean", ["c"], ["mean c"]),
        helper.make_node("ReduceMax", ["a"], ["max a"]),
        helper.make_node("Sum", ["mean a", "mean b", "mean c", "max a"], ["y"]),
    ]
    ends = ("x", [BATCH, 64, 64]), ("y", [1, 1, 1])
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in ends]
    graph = helper.make_graph(nodes, "maps_and_means", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_a_pocket_keeps_small_values_out_of_the_way_of_maps() -> None:
    model = maps_and_means()
    graph = graph_of(model, value_types(model))
    found = with_pocket(graph, BATCH)
    assert found is not None
    one = BATCH * 64 * 64 * 4
    assert 3 * one < arena_peak(graph, BATCH, scratch) < 3 * one + 2048
    assert 2 * one < arena_peak(found, BATCH, scratch) < 2 * one + 4096
    pocketed = model_of(model, found)
    onnx.checker.check_model(pocketed)
    inferred = value_types(pocketed)
    assert all(found.types[name] == inferred[name] for name in ("pocket", "pocket/read"))
    x = np.random.default_rng(0).standard_normal((BATCH, 64, 64), np.float32)
    before, after = (helpers.session(m).run(["y"], {"x": x})[0] for m in (model, pocketed))
    assert before.tobytes() == after.tobytes()


def test_a_graph_without_small_values_has_no_pocket() -> None:
    model = maps_and_means()
    graph = graph_of(model, value_types(model))
    assert with_pocket(replace(graph, ops=graph.ops[:2]), BATCH) is None
