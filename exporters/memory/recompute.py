"""Which values to keep from the forward for the backward pass, and which to compute again.

Of convolution, normalisation and activation only the convolution's output need be kept: the maps between are cheap to
compute from it (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", where they are called low-cost
operations). Here the choice is made by trial: with every cheap map recomputed, then with each of them kept in turn, the
peak of the arena decides.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from edgelocal.exporters.memory.liveness import Graph, Op, living

CHEAP = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal", "Relu", "Sigmoid", "Tanh", "LeakyRelu", "Elu"),
        *("HardSigmoid", "Softplus", "Clip", "Erf", "Exp", "Log", "Abs", "Cast", "Where", "Not", "And", "Equal"),
        *("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Reshape", "Identity", "Unsqueeze"),
        *("Squeeze", "Expand"),
    )
)
_FEW_PRODUCTS = 32  # for each element of a convolution's result
_EFFORT = 1_500_000  # nodes looked at, so that a network of thousands of nodes is done in minutes
_WORTH = 0.02  # of the peak: smaller values stay as they are
AGAIN = "/again"


def recompute(graph: Graph, batch: int, loss: str) -> Graph:
    """The graph in which those cheap values are computed again for the backward pass that make the peak lowest.

    `loss` is the value that ends the forward pass.
    """
    least = int(_WORTH * living(graph, batch).most)
    candidates = [v for v in _candidates(graph, loss) if graph.types[v].size.at(batch) >= least]
    small = max(1, least // batch)
    best = min(
        (_descend(graph, batch, candidates, start, small) for start in (frozenset(candidates), frozenset[str]())),
        key=lambda found: found[0],
    )
    return rewritten(graph, best[1], small)


def _descend(
    graph: Graph, batch: int, candidates: Sequence[str], chosen: frozenset[str], small: int
) -> tuple[tuple[float, int], frozenset[str]]:
    """Change one choice after the other while the peak falls."""
    best = _cost(rewritten(graph, chosen, small), batch)
    improved, left = True, _EFFORT // len(graph.ops)
    while improved and left > 0:
        improved = False
        for value in candidates[:left]:
            left -= 1
            changed = chosen ^ {value}
            cost = _cost(rewritten(graph, changed, small), batch)
            if cost < best:
                best, chosen, improved = cost, changed, True
    return best, chosen


def _cost(graph: Graph, batch: int) -> tuple[float, int]:
    return living(graph, batch).smooth, len(graph.ops)


def _candidates(graph: Graph, loss: str) -> list[str]:
    """Cheap values of the forward pass, or recomputed ones, that wait a while between two uses."""
    uses = readers(graph.ops)
    forward = next(number for number, op in enumerate(graph.ops) if loss in op.outputs)
    return [
        output
        for number, op in enumerate(graph.ops)
        if _is_cheap(op, graph) and (number < forward or op.outputs[0].endswith(AGAIN))
        for output in op.outputs
        if output not in graph.outer and gap_of(number, uses[output]) is not None
    ]


def _is_cheap(op: Op, graph: Graph) -> bool:
    """Element by element, or a convolution with few products: depthwise, or pointwise on few channels."""
    if op.kind != "Conv":
        return op.kind in CHEAP
    weight = graph.types[op.inputs[1]].dims
    return all(isinstance(d, int) for d in weight) and math.prod(map(int, weight[1:])) <= _FEW_PRODUCTS


_FAR = 12  # nodes between two uses that belong together


def gap_of(made: int, uses: Sequence[int]) -> int | None:
    """The number of the first use after the longest wait, or None if there is no long one."""
    points = [made, *uses]
    wait, after = max(((b - a, b) for a, b in pairwise(points)), default=(0, 0))
    return after if wait > _FAR else None


def readers(ops: Iterable[Op]) -> dict[str, list[int]]:
    uses: dict[str, list[int]] = defaultdict(list)
    for number, op in enumerate(ops):
        for name in dict.fromkeys(op.inputs):
            uses[name].append(number)
    return uses


def rewritten(graph: Graph, values: frozenset[str], least: int) -> Graph:
    """The graph with `values` computed again for the uses behind their longest wait.

    What they are computed from is computed again too, if it is cheap, has at least `least` bytes a sample and is not
    needed itself by then.
    """
    uses = readers(graph.ops)
    made = {output: number for number, op in enumerate(graph.ops) for output in op.outputs}
    start = {v: gap for v in values if (gap := gap_of(made[v], uses[v])) is not None}
    types = dict(graph.types)
    done: dict[str, str] = {}
    result: list[Op] = []

    def dead(value: str, number: int) -> bool:
        """Whether keeping the value until op `number` would lengthen its life."""
        if value in graph.outer or value in start or types[value].size.per_sample < least:
            return value in start
        return _is_cheap(graph.ops[made[value]], graph) and max(uses[value]) < number

    def again(value: str, number: int) -> str:
        """Emit the recomputation of a value, after that of what it needs, and return its new name."""
        if value not in done:
            op = graph.ops[made[value]]
            inputs = {i: again(i, number) for i in dict.fromkeys(op.inputs) if dead(i, number)}
            name = value + AGAIN
            while name in types:  # recomputed before, for another use
                name += AGAIN
            types[name] = types[value]
            done[value] = name
            result.append(_copy(op, inputs, {value: name}))
        return done[value]

    for number, op in enumerate(graph.ops):
        late = {i: again(i, number) for i in dict.fromkeys(op.inputs) if i in start and number >= start[i]}
        result.append(_copy(op, late, {}) if late else op)
    return replace(graph, ops=tuple(_used(result, graph.outer)), types=types)


def _copy(op: Op, inputs: dict[str, str], outputs: dict[str, str]) -> Op:
    return replace(
        op,
        inputs=tuple(inputs.get(name, name) for name in op.inputs),
        outputs=tuple(outputs.get(name, name) for name in op.outputs),
    )


def _used(ops: list[Op], outer: frozenset[str]) -> list[Op]:
    """Without ops whose results nobody uses."""
    wanted = set(outer)
    kept = []
    for op in reversed(ops):
        if wanted.intersection(op.outputs):
            wanted.update(op.inputs)
            kept.append(op)
    return kept[::-1]
