"""The partition search's question: what every possible block costs, and which partitions there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Table = NDArray[Any]
Level = int  # position in `Problem.depths`
Cell = tuple[Level, int, int]


@dataclass(frozen=True)
class Candidate:
    """A possible block: units start .. stop - 1 and behind them an auxiliary network of `depth`.

    None is no depth to choose: of the last block, which ends in the network's head, and of every block under a rule
    whose auxiliary networks have none.
    """

    start: int
    stop: int
    depth: int | None


@dataclass(frozen=True, eq=False)
class Problem:
    """Every possible block of a network of n units, and how the rule wants its auxiliary networks.

    `depths` are the auxiliary depths there are, ascending, or (None,) where there is none to choose. Tables have shape
    (len(depths), n, n + 1): [level, start, stop] is the block of units start .. stop - 1 whose auxiliary network has
    the depth depths[level]. The last block (stop = n) has level 0. Cells with start >= stop mean nothing.

    - `macs`: training MACs of a sample, integers;
    - `proxy`: bytes that roughly follow the working set, not known to be right; 0 where nothing is known;
    - `kinds`: integers, equal for blocks whose working sets are equal.

    `wanted[m - 1]` gives the depths that the rule wants for m blocks, all but the last one's; there are partitions of
    up to len(wanted) blocks. The last block has at least `least` units.
    """

    depths: tuple[int | None, ...]
    wanted: tuple[tuple[int | None, ...], ...]
    least: int
    macs: Table
    proxy: Table
    kinds: Table

    @property
    def units(self) -> int:
        """Number of units, n."""
        return int(self.macs.shape[1])

    def cell(self, candidate: Candidate) -> Cell:
        """Where the tables have `candidate`."""
        level = 0 if candidate.stop == self.units else self.depths.index(candidate.depth)
        return level, candidate.start, candidate.stop

    def candidate(self, cell: Cell) -> Candidate:
        """The block at `cell`."""
        level, start, stop = cell
        return Candidate(start, stop, None if stop == self.units else self.depths[level])

    def allowed(self, wanted: Level, stop: int) -> dict[Level, int]:
        """Levels a block that ends before unit `stop` may have where the rule wants `wanted`, with the depth each
        misses; ascending.

        Behind unit stop - 1 there are n - stop units to imitate: to want more is to want these, and that misses none.
        """
        most = self.depths[wanted]
        if most is None or stop == self.units:
            return {0: 0}
        most = min(most, self.units - stop)
        shallower = [(level, depth) for level, depth in enumerate(self.depths[:wanted]) if depth is not None]
        return {**{level: most - depth for level, depth in shallower if depth < most}, wanted: 0}

    def possible(self) -> Table:
        """Which cells are blocks of some partition: a mask of the tables' shape."""
        start, stop = np.indices(self.macs.shape[1:])
        last = stop == self.units
        mask = (start < stop) & np.where(last, start <= self.units - self.least, stop <= self.units - self.least)
        levels = np.arange(len(self.depths))[:, None, None]
        found: Table = mask & (~last | (levels == 0))
        return found
