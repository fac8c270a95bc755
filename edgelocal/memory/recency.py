"""Which graphs are loaded where not all may be: the least recently used are dropped first.

Pure, so that the planner foresees what the pool of graphs (graphs.py) will do.
"""

from __future__ import annotations

from collections import OrderedDict


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
