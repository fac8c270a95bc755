"""Which graphs are loaded where not all may be: the least recently used are dropped first.

Pure, so that the planner foresees what the pool of graphs (graphs.py) will do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from edgelocal.bundle.spec import GraphSpec

Turns: TypeAlias = list[tuple[int, list[GraphSpec]]]  # blocks by number, and the graphs they use, in their order
_REPEATED = 3  # rounds after which no more graphs are loaded at once than before


class Recency:
    """Keys in the order of their last use, each with its size; they add up to `limit` bytes at most, unless a single
    one is larger. `limit` None drops none."""

    def __init__(self, limit: int | None) -> None:
        self.held = 0
        self._limit = limit
        self._sizes: OrderedDict[str, int] = OrderedDict()

    def use(self, key: str, size: int) -> list[str]:
        """Count `key` as used now; the keys that must be dropped before it is loaded."""
        if key in self._sizes:
            self._sizes.move_to_end(key)
            return []
        dropped = []
        while self._limit is not None and self._sizes and self.held + size > self._limit:
            old, freed = self._sizes.popitem(last=False)
            self.held -= freed
            dropped.append(old)
        self._sizes[key] = size
        self.held += size
        return dropped

    def forget(self, key: str) -> None:
        """It was not loaded after all, or is gone."""
        self.held -= self._sizes.pop(key)

    def clear(self) -> None:
        """All are gone."""
        self._sizes.clear()
        self.held = 0


def held_at_most(rounds: Sequence[Turns], sizes: Mapping[str, int], limit: int, blocks: int) -> list[int]:
    """For every block the bytes of graphs that are loaded at most while it works, where no more than `limit` may be;
    each of `rounds` is run over and over, and begins with none."""
    found = [0] * blocks
    for turns in rounds:
        recency = Recency(limit)
        for index, graphs in turns * _REPEATED:
            for graph in graphs:
                recency.use(graph.key, sizes[graph.key])
                found[index] = max(found[index], recency.held)
    return found
