"""The order of the nodes, which is the order of execution.

The runtime runs nodes in the order of the file, but for shape queries, which it puts first; they are put first here, so
that file and execution agree. A large value that waits for its use is computed just before it, if the peak falls.
"""

from __future__ import annotations

from dataclasses import replace

from edgelocal.exporters.memory.liveness import Graph, Op, living
from edgelocal.exporters.memory.simulate import Rehearsal, Workspace

FIRST = frozenset(("Shape", "Size"))
_FAR = 4  # nodes between making a value and using it
_WORTH = 0.02  # of the peak
_TIGHT = 1.02  # of what lives: no arena does much better


def queries_first(graph: Graph) -> Graph:
    """The graph with queries of its inputs' shapes at the start, where the runtime runs them; any other stays where its
    input is made."""
    asks_input = [op.kind in FIRST and graph.outer.issuperset(op.inputs) for op in graph.ops]
    first = [op for op, asks in zip(graph.ops, asks_input, strict=True) if asks]
    rest = [op for op, asks in zip(graph.ops, asks_input, strict=True) if not asks]
    return replace(graph, ops=(*first, *rest))


def sink(graph: Graph, batch: int) -> Graph:
    """The graph with large values made as late as lowers the peak of the arena."""
    best = living(graph, batch)
    least = _WORTH * best.most
    for name in _large(graph, batch, least):
        moved = _moved(graph, name)
        if moved is None:
            continue
        trial = living(moved, batch)
        if trial.smooth < best.smooth:
            graph, best = moved, trial
    return graph


def settle(graph: Graph, batch: int, workspace: Workspace, rounds: int = 2) -> Graph:
    """The graph with ops moved where the arena wastes less between values: the same values live, but where they lie
    depends on the order in which they came.

    Each op that makes a large value is tried as early as its inputs allow, as late as its first use does, and between.
    """
    most = living(graph, batch).most
    least, enough = _WORTH * most, _TIGHT * most
    best = Rehearsal(graph, batch, workspace)
    for _ in range(rounds):
        before = best
        for name in _large(best.graph, batch, least):
            if best.peak <= enough:
                return best.graph
            best = _tried(best, name, batch, workspace)
        if best is before:
            break
    return best.graph


def _tried(best: Rehearsal, name: str, batch: int, workspace: Workspace) -> Rehearsal:
    """The first place of the op that makes `name` that lowers the peak; as it was if there is none."""
    made = next(i for i, op in enumerate(best.graph.ops) if name in op.outputs)
    for place in _places(best.graph, made):
        trial = _placed(best.graph, made, place)
        if best.peak_of(trial, min(made, place)) < best.peak:
            return Rehearsal(trial, batch, workspace)
    return best


def _large(graph: Graph, batch: int, least: float) -> list[str]:
    """Values of at least `least` bytes that a run allocates."""
    made = (output for op in graph.ops for output in op.outputs if output and output not in graph.outer)
    return [name for name in made if graph.types[name].size.at(batch) >= least]


def _places(graph: Graph, made: int) -> list[int]:
    """Where op number `made` could run instead, as positions in front of ops."""
    ops = graph.ops
    needed = set(ops[made].inputs)
    early = 1 + max((i for i in range(made) if needed.intersection(ops[i].outputs)), default=-1)
    late = next((i for i in range(made + 1, len(ops)) if _uses(ops[i], ops[made])), len(ops))
    wanted = (late, (made + late) // 2, early, (early + made) // 2)
    return [place for place in dict.fromkeys(wanted) if place not in (made, made + 1)]


def _placed(graph: Graph, made: int, place: int) -> Graph:
    rest = [op for i, op in enumerate(graph.ops) if i != made]
    at = place - (place > made)
    return replace(graph, ops=(*rest[:at], graph.ops[made], *rest[at:]))


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
    return replace(graph, ops=tuple(ops[i] for i in order))


def _uses(op: Op, maker: Op) -> bool:
    return any(name in op.inputs for name in maker.outputs)
