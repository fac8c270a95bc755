"""Cuts and auxiliary depths for a memory limit: the least training work whose every block fits.

    1. least auxiliary depth missing: depth is given up only where a block would not fit otherwise
    2. least training MACs

over the partitions whose blocks' working sets are all at most the limit. The true working set of a block takes seconds
to learn, and there are thousands of possible blocks; so blocks are believed to be as small as what is known allows,
only those of the best partition so far are asked for, the largest first, and the search runs again with the answer,
until the best partition is of known blocks. What is known allows:

- a block of the same kind needs the same;
- a block needs at least its proxy, scaled by the smallest ratio of truth to proxy seen so far, less a margin;
- a block that holds another, and whose proxy is no smaller, needs at least as much, and the scaled proxy's difference.

A working set below these beliefs may be overlooked: then the partition is not the cheapest, but its blocks are known to
fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgelocal.exporters.search.dp import Partition, bottleneck, cheapest
from edgelocal.exporters.search.problem import Candidate, Cell, Problem, Table

Truth = Callable[[Candidate], int]

MARGIN = 0.95
POINTS = 7


@dataclass(frozen=True)
class Found:
    """A partition: its blocks in order, the working set of each in bytes, the training MACs of all for one sample.

    `missing` is the auxiliary depth given up in all, `asked` how many working sets had to be learned for it; `known`
    holds these and those known before.
    """

    blocks: tuple[Candidate, ...]
    working_sets: tuple[int, ...]
    macs: int
    missing: int
    asked: int
    known: Mapping[Candidate, int]

    @property
    def cut(self) -> tuple[range, ...]:
        """Ranges of unit indices, one a block."""
        return tuple(range(block.start, block.stop) for block in self.blocks)

    @property
    def depths(self) -> tuple[int, ...] | None:
        """Auxiliary depth of every block but the last, as `build_blocks` takes it; None where there is none to give."""
        return tuple(block.depth for block in self.blocks[:-1] if block.depth is not None) or None

    @property
    def largest(self) -> int:
        """Bytes of the largest block's working set."""
        return max(self.working_sets)


def search(
    problem: Problem, truth: Truth, limit: float, known: Mapping[Candidate, int] | None = None, margin: float = MARGIN
) -> Found:
    """The best partition whose blocks need at most `limit` bytes; see the module.

    If there is none, the best of those whose largest block is as small as can be: its `largest` exceeds `limit`, and
    is the smallest limit for which there is one. `truth` gives a block's working set in bytes; `known` are working sets
    learned before. `margin` is the part of the scaled proxy that is believed in. With 0 the best partition of all is
    found, as long as no block needs less than one that it holds and whose proxy is no larger.
    """
    asking = _Asking(problem, truth, known or {}, margin)
    return asking.report(asking.best(limit))


def frontier(
    problem: Problem,
    truth: Truth,
    known: Mapping[Candidate, int] | None = None,
    points: int = POINTS,
    margin: float = MARGIN,
) -> tuple[Found, ...]:
    """Memory against compute: the best partitions for `points` limits, from the smallest possible to that of one block.

    The limits form a geometric series. In the order of their largest blocks; partitions that another one beats, or
    equals, in memory, missing depth and MACs at once are left out.
    """
    asking = _Asking(problem, truth, known or {}, margin)
    whole = asking.report(asking.best(math.inf))
    least = asking.report(asking.best(0))
    ratio = whole.largest / max(least.largest, 1)
    steps = [least.largest * ratio ** (step / (points - 1)) for step in range(1, points - 1)]
    return _unbeaten([least, *(asking.report(asking.best(limit)) for limit in steps), whole])


class _Asking:
    """What is known so far, and what follows from it."""

    def __init__(self, problem: Problem, truth: Truth, known: Mapping[Candidate, int], margin: float) -> None:
        self._problem = problem
        self._truth = truth
        self._margin = margin
        self._known = dict(known)
        self._before = len(known)
        self._by_kind = {int(problem.kinds[problem.cell(block)]): size for block, size in known.items()}

    def best(self, limit: float) -> Partition:
        """The best partition within `limit` bytes; if there is none, of those of the smallest possible limit."""
        found = self.within(limit)
        if found is None:
            smallest = self.smallest()
            # What was learned on the way may have shown that beliefs were too high, and that something fits.
            found = self.within(max(limit, *self.sizes(smallest))) or smallest
        return found

    def within(self, limit: float) -> Partition | None:
        """The best partition of known blocks of at most `limit` bytes, None if even by belief there is none."""
        while True:
            believed = self._believed()
            best = cheapest(self._problem, believed <= limit)
            unknown = [] if best is None else [cell for cell in best.cells if self._size(cell) is None]
            if not unknown:
                return best
            self._ask(max(unknown, key=lambda cell: believed[cell]))

    def smallest(self) -> Partition:
        """The best partition of known blocks of those whose largest is as small as can be."""
        best: Partition | None = None
        while True:
            limit = bottleneck(self._problem, self._believed())
            if best is not None and max(self.sizes(best)) <= limit:
                return best
            best = self.within(limit) or best

    def sizes(self, partition: Partition) -> tuple[int, ...]:
        """Working sets of the blocks of a partition, all known."""
        return tuple(self._by_kind[int(self._problem.kinds[cell])] for cell in partition.cells)

    def report(self, partition: Partition) -> Found:
        """`partition`, all of whose blocks are known, for the caller."""
        blocks = tuple(self._problem.candidate(cell) for cell in partition.cells)
        asked = len(self._known) - self._before
        return Found(blocks, self.sizes(partition), partition.macs, partition.missing, asked, dict(self._known))

    def _size(self, cell: Cell) -> int | None:
        return self._by_kind.get(int(self._problem.kinds[cell]))

    def _ask(self, cell: Cell) -> None:
        block = self._problem.candidate(cell)
        size = self._truth(block)
        self._known[block] = size
        self._by_kind[int(self._problem.kinds[cell])] = size

    def _believed(self) -> Table:
        """Bytes that every block needs at least, as far as is known: exact where it is known itself."""
        problem = self._problem
        cells = np.argwhere(np.isin(problem.kinds, [*self._by_kind]) & problem.possible())
        sizes = [self._by_kind[int(problem.kinds[tuple(cell)])] for cell in cells]
        scaled = problem.proxy * (self._margin * self._ratio())
        believed = scaled.astype(np.float64)
        _, starts, stops = np.indices(problem.proxy.shape)
        for (level, start, stop), size in zip(cells, sizes, strict=True):
            larger = problem.proxy >= problem.proxy[level, start, stop]
            holds = (starts <= start) & (stops >= stop) & larger
            more = scaled[holds] - scaled[level, start, stop]
            believed[holds] = np.maximum(believed[holds], size + more)
        believed[tuple(cells.T)] = sizes
        return believed

    def _ratio(self) -> float:
        """The smallest ratio of truth to proxy seen so far; 0 before the first."""
        cells = map(self._problem.cell, self._known)
        pairs = [(self._problem.proxy[cell], size) for cell, size in zip(cells, self._known.values(), strict=True)]
        return min((size / float(proxy) for proxy, size in pairs if proxy), default=0.0)


def _unbeaten(found: list[Found]) -> tuple[Found, ...]:
    kept: list[Found] = []
    for point in sorted(found, key=lambda f: (f.largest, f.missing, f.macs)):
        if not any(k.missing <= point.missing and k.macs <= point.macs for k in kept):
            kept.append(point)
    return tuple(kept)
