"""Convolutions computed again where little compute saves much memory.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", for single convolutions: the result of one that many
steps of the backward pass have to wait beside is dropped after the forward pass, and computed again from what is kept
anyway. Unlike the recomputation of cheap maps this costs time, so that it has to pay.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from edgelocal.exporters.memory.liveness import Graph, Op, buffers, living
from edgelocal.exporters.memory.recompute import AGAIN, gap_of, readers, rewritten

_LEAST_GAIN = 1.5  # parts of the peak for each part of the training's multiply-accumulates
_MOST_ADDED = 0.1  # of the training's multiply-accumulates, in all
_TRIED = 3  # largest results first
_PASSES = 3  # of the forward pass make one training step: forward, gradients of inputs, gradients of weights
_SMALL = 0.02  # of the peak, as in recompute


def trade(graph: Graph, batch: int, loss: str, settled: Callable[[Graph], Graph]) -> Graph:
    """The graph with those convolutions computed again whose results lower the peak enough.

    Args:
        loss: the value that ends the forward pass.
        settled: what is done to a graph afterwards, which decides what its peak is.
    """
    forward = graph.ops[: 1 + next(number for number, op in enumerate(graph.ops) if loss in op.outputs)]
    training = _PASSES * sum(multiply_accumulates(graph, op) for op in forward)
    peak, added = living(settled(graph), batch).most, 0
    while True:
        trials = []
        for op in _waiting(graph, batch, loss):
            cost = multiply_accumulates(graph, op)
            if added + cost > _MOST_ADDED * training:
                continue
            small = max(1, int(_SMALL * peak) // batch)
            trial = rewritten(graph, frozenset(op.outputs), small)
            trials.append((living(settled(trial), batch).most, cost, trial))
        lowest, cost, trial = min(trials, key=lambda t: t[:2], default=(peak, 0, graph))
        if peak - lowest <= _LEAST_GAIN * peak * cost / max(1, training):
            return graph
        graph, peak, added = trial, lowest, added + cost


def _waiting(graph: Graph, batch: int, loss: str) -> list[Op]:
    """Convolutions of the forward pass whose results live at the peak, for a use long after; the largest first."""
    at = living(graph, batch).at
    live: set[str] = set()
    for number, new, dead in buffers(graph):
        live.update(new)
        if number == at:
            break
        live.difference_update(dead)
    end = next(number for number, op in enumerate(graph.ops) if loss in op.outputs)
    uses = readers(graph.ops)
    found = [
        op
        for number, op in enumerate(graph.ops[:end])
        if op.kind == "Conv" and op.outputs[0] in live and gap_of(number, uses[op.outputs[0]]) is not None
    ]
    return sorted(found, key=lambda op: -graph.types[op.outputs[0]].size.at(batch))[:_TRIED]


def multiply_accumulates(graph: Graph, op: Op) -> int:
    """Of a convolution, for one sample; 0 for other ops."""
    if op.kind != "Conv":
        return 0
    result = graph.types[op.outputs[0]]
    kernel = math.prod(int(d) for d in graph.types[op.inputs[1]].dims[1:])
    return kernel * math.prod(d for d in result.dims if isinstance(d, int))


def computed_again(graph: Graph) -> int:
    """Multiply-accumulates for one sample of the convolutions that are computed again."""
    return sum(multiply_accumulates(graph, op) for op in graph.ops if op.outputs[0].endswith(AGAIN))
