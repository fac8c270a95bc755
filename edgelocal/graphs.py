"""The loaded graphs of a bundle: blocks of the same structure share one, and no more are kept than the plan allows."""

from __future__ import annotations

from collections import OrderedDict

from edgelocal.bundle import Bundle
from edgelocal.needs import loaded_bytes
from edgelocal.session import Graph, give_back
from edgelocal.spec import GraphSpec


class GraphPool:
    """Graphs by structure, the least recently used dropped first. `limit_bytes` None keeps all.

    A graph that is shared takes tensors by position: the names in it are those of the block that came first.
    """

    def __init__(self, bundle: Bundle, threads: int, limit_bytes: int | None = None) -> None:
        self.loads = 0
        self._bundle = bundle
        self._threads = threads
        self._limit = limit_bytes
        self._graphs: OrderedDict[str, Graph] = OrderedDict()

    def get(self, spec: GraphSpec) -> Graph:
        """The graph of `spec`, or one of the same structure.

        Raises:
            BundleError: the file is not what the manifest says.
            BudgetError: no memory to load it.
        """
        key = spec.key
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if self._limit is not None:
            self._make_room(loaded_bytes(spec, self._threads))
        graph = Graph(spec, self._bundle.read(spec.file), self._threads)
        self.loads += 1
        self._graphs[key] = graph
        return graph

    def release(self) -> None:
        """Drop all graphs and what memory they hold."""
        self._graphs.clear()
        give_back()

    def _make_room(self, size: int) -> None:
        assert self._limit is not None
        dropped = False
        while self._graphs and self._held() + size > self._limit:
            self._graphs.popitem(last=False)
            dropped = True
        if dropped:
            give_back()

    def _held(self) -> int:
        return sum(loaded_bytes(graph.spec, self._threads) for graph in self._graphs.values())
