"""The loaded graphs of a bundle: blocks of the same structure share one, and no more are kept than the plan allows."""

from __future__ import annotations

from edgelocal.bundle.folder import Bundle
from edgelocal.bundle.spec import GraphSpec
from edgelocal.memory.needs import loaded_bytes
from edgelocal.memory.peaks import SESSIONS
from edgelocal.memory.recency import Recency
from edgelocal.runtime.arena import give_back
from edgelocal.runtime.provider import CPU, Provider
from edgelocal.runtime.session import Graph


class GraphPool:
    """Graphs by structure, the least recently used dropped first. `limit_bytes` None keeps all.

    A graph that is shared takes tensors by position: the names in it are those of the block that came first.
    """

    def __init__(self, bundle: Bundle, threads: int, limit_bytes: int | None = None, provider: Provider = CPU) -> None:
        self.provider = provider
        self._times = SESSIONS if provider.fixed_batch else 1
        self.place = provider.place
        self.loads = 0
        self._bundle = bundle
        self._threads = threads
        self._keeps_all = limit_bytes is None
        self._recency = Recency(limit_bytes)
        self._graphs: dict[str, Graph] = {}

    def get(self, spec: GraphSpec, *, training: bool = False) -> Graph:
        """The graph of `spec`, or one of the same structure; with `training` one of ONNX Runtime's training artifacts.

        Raises:
            BundleError: the file is not what the manifest says.
            BudgetError: no memory to load it.
        """
        dropped = self._recency.use(spec.key, self._times * loaded_bytes(spec, self._threads))
        for key in dropped:
            del self._graphs[key]
        if dropped:
            give_back()
        if spec.key not in self._graphs:
            self._load(spec, training)
        return self._graphs[spec.key]

    def _load(self, spec: GraphSpec, training: bool) -> None:
        try:
            model = self._bundle.read(spec.file)
            self._graphs[spec.key] = Graph(spec, model, self._threads, provider=self.provider, training=training)
        except BaseException:
            self._recency.forget(spec.key)
            raise
        self.loads += 1

    def start_anew(self) -> None:
        """Drop all graphs if not all are kept: what is loaded later does not depend on what was used before."""
        if not self._keeps_all:
            self.release()

    def release(self) -> None:
        """Drop all graphs and what memory they hold."""
        self._graphs.clear()
        self._recency.clear()
        give_back()
