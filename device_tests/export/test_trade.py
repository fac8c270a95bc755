"""Convolutions computed again: the same bits, less memory, at a price that is kept to."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from torch import nn

from device_tests.export.accumulation import TASK, build
from device_tests.export.test_narrow import SHAPE, results
from edgelocal.exporters.macs import block_macs
from edgelocal.exporters.memory import trade as trading
from edgelocal.exporters.memory.liveness import Graph, graph_of, living
from edgelocal.exporters.memory.merge import simplify
from edgelocal.exporters.memory.optimise import model_of, optimise
from edgelocal.exporters.memory.order import queries_first, sink
from edgelocal.exporters.memory.recompute import recompute
from edgelocal.exporters.memory.shapes import value_types
from edgelocal.exporters.memory.trade import computed_again, multiply_accumulates, trade
from edgelocal.exporters.onnx_block import ExportedGraph
from edgelocal.exporters.onnx_step import step_graph
from edgelocal.exporters.optimizers import sgd
from edgelocal.exporters.rules import LocalBlock
from edgelocal.exporters.units import GlobalMean
from edgelocal.exporters.zoo.custom import from_module

BATCH = 64


def wide_then_narrow() -> nn.Module:
    """Large maps from few products, then small maps from many: the first results wait for long and are cheap."""
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    second = [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    rest = [nn.Conv2d(16, 64, 3, 2, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    last = [nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*first, *second, *rest, *last, GlobalMean(), nn.Linear(64, 10))


@functools.cache
def case() -> tuple[LocalBlock, ExportedGraph, Graph]:
    torch.manual_seed(0)
    (block,) = build(from_module(wide_then_narrow(), "wide", SHAPE, 10), 1, "bp")
    exported = step_graph(block, TASK, sgd(), SHAPE, torch.float32)
    model = simplify(exported.model)
    return block, exported, queries_first(graph_of(model, value_types(model)))


def cheap_again() -> Graph:
    return recompute(sink(case()[2], BATCH), BATCH, "loss")


def plain(graph: Graph) -> Graph:
    return sink(graph, BATCH)


def test_what_is_traded_pays_and_changes_no_bit() -> None:
    block, exported, _ = case()
    before = cheap_again()
    after = trade(before, BATCH, "loss", plain)
    training = block_macs(block, SHAPE, torch.float32)
    cost = (computed_again(after) - computed_again(before)) / (3 * training.forward)
    most = [living(plain(g), BATCH).most for g in (before, after)]
    assert 0 < cost <= 0.1
    assert 1 - most[1] / most[0] > 1.5 * cost
    model = simplify(exported.model)
    for batch in (1, 6):
        old, new = (results(exported, model_of(model, g), batch) for g in (before, plain(after)))
        assert [key for key in old if old[key].tobytes() != new[key].tobytes()] == []


def test_nothing_is_traded_where_the_price_is_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cheap_again()
    monkeypatch.setattr(trading, "_LEAST_GAIN", 1000)
    assert trade(before, BATCH, "loss", plain) is before
    monkeypatch.setattr(trading, "_LEAST_GAIN", 1.5)
    monkeypatch.setattr(trading, "_MOST_ADDED", 0.0)
    assert trade(before, BATCH, "loss", plain) is before


def test_the_multiply_accumulates_are_those_that_pytorch_counts() -> None:
    block, _, graph = case()
    end = next(number for number, op in enumerate(graph.ops) if "loss" in op.outputs)
    forward = sum(multiply_accumulates(graph, op) for op in graph.ops[:end])
    assert forward == block_macs(block, SHAPE, torch.float32).forward - 64 * 10  # the linear layer is no convolution


def test_the_manifest_says_what_is_done_twice() -> None:
    """By the names of the convolutions in the graph that is written."""
    _, exported, _ = case()
    lean = optimise(exported, BATCH)
    types = value_types(lean.model)
    graph = graph_of(lean.model, types)
    again = [op for op in graph.ops if op.kind == "Conv" and re.search("/again", op.outputs[0])]
    assert lean.recomputed == sum(multiply_accumulates(graph, op) for op in again) > 0
