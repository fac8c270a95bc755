"""One run of a graph in the arena, node by node, from the start or from a moment on the way.

The search for an order of the nodes looks at thousands of runs. Most differ from the one before only behind some node,
and most can be given up as soon as they need no less than the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from edgelocal.exporters.memory.arena import Arena
from edgelocal.exporters.memory.liveness import Graph, Op, Walk

Workspace = Callable[[Op], int]  # bytes that an op needs while it runs
_EVERY = 32  # nodes between moments that are kept


class Run:
    """A run on `batch` samples under way."""

    def __init__(self, graph: Graph, batch: int, workspace: Workspace) -> None:
        self.arena = Arena(joins_rest=graph.rules.joins_rest)
        self._types, self._batch, self._workspace = graph.types, batch, workspace
        self._walk = Walk(graph)
        self._places: dict[str, int] = {}

    def copy(self) -> Run:
        """The same moment, to go on from in another way."""
        other = object.__new__(Run)
        other.arena = self.arena.copy()
        other._types, other._batch, other._workspace = self._types, self._batch, self._workspace
        other._walk = self._walk.copy()
        other._places = dict(self._places)
        return other

    def step(self, op: Op) -> None:
        """Run one more node."""
        new, dead = self._walk.step(op)
        for name in new:
            self._places[name] = self.arena.allocate(self._types[name].size.at(self._batch))
        extra = self._workspace(op)
        if extra:
            self.arena.free(self.arena.allocate(extra))
        for name in dead:
            if name in self._places:
                self.arena.free(self._places.pop(name))


def arena_after(graph: Graph, batch: int, workspace: Workspace) -> Arena:
    """The arena after a run on `batch` samples."""
    run = Run(graph, batch, workspace)
    for op in graph.ops:
        run.step(op)
    return run.arena


def arena_peak(graph: Graph, batch: int, workspace: Workspace) -> int:
    """Bytes that the arena touches while the graph runs."""
    return arena_after(graph, batch, workspace).peak


class Rehearsal:
    """A graph's run with moments kept on the way, against which other orders of the same ops are tried."""

    def __init__(self, graph: Graph, batch: int, workspace: Workspace) -> None:
        self.graph = graph
        run = Run(graph, batch, workspace)
        self._moments: list[Run] = []
        for number, op in enumerate(graph.ops):
            if number % _EVERY == 0:
                self._moments.append(run.copy())
            run.step(op)
        self.peak = run.arena.peak

    def peak_of(self, other: Graph, first: int) -> float:
        """The arena's peak for the same ops in an order that differs from op number `first` on; infinite if it is not
        lower than this one's."""
        run = self._moments[first // _EVERY].copy()
        for op in other.ops[first // _EVERY * _EVERY :]:
            run.step(op)
            if run.arena.peak >= self.peak:
                return math.inf
        return run.arena.peak
