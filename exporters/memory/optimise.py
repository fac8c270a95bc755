"""A finished graph -> the same graph that runs in less memory, and its memory model.

Blocks of equal structure have equal graphs but for the names of inputs and outputs, and are done once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import numpy_helper

from edgelocal.bundle.memory_spec import MemorySpec
from edgelocal.exporters.memory.liveness import CPU_RULES, Graph, Rules, graph_of, overwritable
from edgelocal.exporters.memory.merge import simplify
from edgelocal.exporters.memory.model import memory_model, scratch
from edgelocal.exporters.memory.narrow import narrow
from edgelocal.exporters.memory.order import queries_first, settle, sink
from edgelocal.exporters.memory.pocket import with_pocket
from edgelocal.exporters.memory.recompute import recompute
from edgelocal.exporters.memory.shapes import value_types
from edgelocal.exporters.memory.simulate import arena_peak
from edgelocal.exporters.memory.trade import computed_again, trade
from edgelocal.exporters.onnx_block import ExportedGraph

_ROUNDS = 2  # a value computed again may wait for two uses in turn
_DONE: dict[tuple[bytes, int, Rules], Lean] = {}
_SEARCHED = 2000  # nodes; for larger graphs it would take minutes
_MOST_DONE = 64  # bounds what a long process keeps


@dataclass(frozen=True)
class Lean:
    """A graph that runs in little memory. `structure` is equal for graphs that differ in names only, `in_place` are the
    inputs that their new values may overwrite, `recomputed` multiply-accumulates of a sample that are done twice."""

    model: onnx.ModelProto
    memory: MemorySpec
    structure: str
    in_place: tuple[str, ...]
    recomputed: int


def optimise(exported: ExportedGraph, batch: int, rules: Rules = CPU_RULES) -> Lean:
    """The graph with the lowest peak found for `batch` samples where these rules hold, and its memory model for any
    batch.

    What it computes stays the same, bit by bit but for large products in halves (narrow.py); the order of nodes and
    what is computed again differ.
    """
    names = {t.name: f"in/{i}" for i, t in enumerate(exported.inputs)}
    names |= {t.name: f"out/{i}" for i, t in enumerate(exported.outputs)}
    model = _renamed(exported.model, names)
    pairs = {names[t.name]: names[f"new/{t.name}"] for t in exported.inputs if f"new/{t.name}" in names}
    key = model.SerializeToString(deterministic=True), batch, rules
    if key not in _DONE:
        while len(_DONE) >= _MOST_DONE:
            del _DONE[next(iter(_DONE))]
        loss = next((names[t.name] for t in exported.outputs if t.name == "loss"), None)
        _DONE[key] = _optimised(model, batch, loss, pairs, rules)
    lean = _DONE[key]
    back = {new: old for old, new in names.items()}
    return replace(lean, model=_renamed(lean.model, back), in_place=tuple(back[name] for name in lean.in_place))


def _optimised(model: onnx.ModelProto, batch: int, loss: str | None, pairs: Mapping[str, str], rules: Rules) -> Lean:
    model = simplify(model)
    best = graph = queries_first(graph_of(model, value_types(model), rules))
    for _ in range(_ROUNDS):
        for trial in (sink(graph, batch), recompute(graph, batch, loss) if loss else graph):
            graph = trial
            best = min(best, graph, key=lambda g: (arena_peak(g, batch, scratch), len(g.ops)))
    best = min(best, sink(graph, batch), key=lambda g: (arena_peak(g, batch, scratch), len(g.ops)))
    if loss and len(best.ops) <= _SEARCHED:
        best = trade(best, batch, loss, lambda g: narrow(sink(g, batch), batch))
    best = _placed(narrow(sink(best, batch), batch), batch)
    model = model_of(model, best)
    onnx.checker.check_model(model)  # every value made once, and before its use
    digest = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    return Lean(model, memory_model(best, batch, loss), digest, overwritable(best, pairs), computed_again(best))


def _placed(graph: Graph, batch: int) -> Graph:
    """The graph in the order in which the arena wastes least, with a pocket for small values or without."""
    trials = [graph, *filter(None, [with_pocket(graph, batch)])]
    if len(graph.ops) <= _SEARCHED:
        trials = [settle(trial, batch, scratch) for trial in trials]
    return min(trials, key=lambda g: (arena_peak(g, batch, scratch), len(g.ops)))


def model_of(model: onnx.ModelProto, graph: Graph) -> onnx.ModelProto:
    """The model with the graph's nodes, and the type of every value, without which the runtime shares less memory."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    nodes = [op.node() for op in graph.ops]
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    used = {name for op in graph.ops for name in op.inputs}
    old = [i for i in model.graph.initializer if i.name in used]
    new = sorted(used.intersection(graph.ints).difference(i.name for i in old))
    del result.graph.initializer[:]
    result.graph.initializer.extend(old)
    result.graph.initializer.extend(numpy_helper.from_array(np.array(graph.ints[n], np.int64), n) for n in new)
    made = {name for op in graph.ops for name in op.outputs} - graph.outer
    del result.graph.value_info[:]
    result.graph.value_info.extend(graph.types[name].info(name) for name in sorted(made) if name)
    return result


def _renamed(model: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for value in (*result.graph.input, *result.graph.output):
        value.name = names.get(value.name, value.name)
    for node in result.graph.node:
        for place in (node.input, node.output):
            fresh = [names.get(name, name) for name in place]
            del place[:]
            place.extend(fresh)
        node.name = names.get(node.name, node.name)
    return result
