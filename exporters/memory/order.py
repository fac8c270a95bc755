"""The order of the nodes, which is the order of execution.

The runtime runs nodes in the order of the file, but for shape queries, which it puts first; they are put first here, so
that file and execution agree. A large value that waits for its use is computed just before it, if the peak falls.
"""

from __future__ import annotations

from edgelocal.exporters.memory.liveness import Graph, Op, living

FIRST = frozenset(("Shape", "Size"))
_FAR = 4  # nodes between making a value and using it
_WORTH = 0.02  # of the peak


def queries_first(graph: Graph) -> Graph:
    """The graph with shape queries at the start, where the runtime runs them.

    Only those of graph inputs are written by the lowering; any other stays where its input is made.
    """
    first = [op for op in graph.ops if op.kind in FIRST]
    rest = [op for op in graph.ops if op.kind not in FIRST]
    return Graph((*first, *rest), graph.types, graph.outer)


def sink(graph: Graph, batch: int) -> Graph:
    """The graph with large values made as late as lowers the peak of the arena."""
    best = living(graph, batch)
    least = _WORTH * best.most
    names = [
        output
        for op in graph.ops
        for output in op.outputs
        if output in graph.types and output not in graph.outer and graph.types[output].size.at(batch) >= least
    ]
    for name in names:
        moved = _moved(graph, name)
        if moved is None:
            continue
        trial = living(moved, batch)
        if trial.smooth < best.smooth:
            graph, best = moved, trial
    return graph


def _moved(graph: Graph, name: str) -> Graph | None:
    """The graph with the op that makes `name`, and what only it needs, just before the first use."""
    ops = graph.ops
    made = next(i for i, op in enumerate(ops) if name in op.outputs)
    use = next((i for i in range(made + 1, len(ops)) if _uses(ops[i], ops[made])), None)
    if use is None or use - made < _FAR:
        return None
    chain = [made]
    outputs = set(ops[made].inputs)
    for number in range(made - 1, -1, -1):  # its private inputs go with it
        op = ops[number]
        if not outputs.intersection(op.outputs) or graph.outer.intersection(op.outputs):
            continue
        readers = [i for i in range(number + 1, use) if _uses(ops[i], op)]
        if set(readers) <= set(chain):
            chain.append(number)
            outputs.update(op.inputs)
    late = set(chain)
    order = [i for i in range(use) if i not in late] + sorted(late) + list(range(use, len(ops)))
    return Graph(tuple(ops[i] for i in order), graph.types, graph.outer)


def _uses(op: Op, maker: Op) -> bool:
    return any(name in op.inputs for name in maker.outputs)
