"""The peak of a network at one batch, as sums: what lies in the runtime's arena, and what beside it.

The arena once touched stays, so the process's peak is the arena's largest use by any block plus the most that lies
beside it. What lies beside depends only on which blocks take the batch whole and which in parts, not on how small the
parts are. So there are few cases, ordered by the bound on the arena down to which they hold: the smallest budget is
the least of them, and under a budget the micro-batches are the largest that one bound on the arena, the same for all
blocks, allows.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

from edgelocal.needs import BlockNeeds, Way, loaded_bytes
from edgelocal.spec import GraphSpec

RUNTIME_BYTES = 11 << 19  # code and tables of the runtime that its first steps touch (measured, docs/promises.md)


@dataclass(frozen=True)
class PipelineBytes:
    """What the data pipeline holds: all the time, and at most while a batch is made (without the batch itself)."""

    resident: int
    making: int


Pipeline: TypeAlias = PipelineBytes | Callable[[int], PipelineBytes]  # known, or as a function of the batch


@dataclass(frozen=True)
class Case:
    """Micro-batches that differ only within the arena, of which each block may take up to `ceiling` bytes. The smallest
    of them make the arena `least` bytes large; `beside` lies beside it."""

    beside: int
    least: int
    ceiling: float

    @property
    def total(self) -> int:
        """The smallest peak of this case above the idle process."""
        return self.beside + self.least


@dataclass(frozen=True)
class Network:
    """The blocks of a network with a batch: sums of bytes. `most` is the largest micro-batch, `pipeline_at` what the
    data takes at a batch, `validates` whether batches also pass through the whole network in inference mode."""

    needs: tuple[BlockNeeds, ...]
    batch: int
    most: int  # samples at a time
    schedule: str
    idle: int
    pipeline_at: Callable[[int], PipelineBytes]
    validates: bool
    threads: int

    @cached_property
    def pipeline(self) -> PipelineBytes:
        """What the data takes at this batch."""
        return self.pipeline_at(self.batch)

    @property
    def uncut(self) -> list[int]:
        """As many samples at a time as may be, in every block."""
        return [self.most] * len(self.needs)

    @property
    def least(self) -> int:
        """The smallest budget."""
        return self.idle + min(case.total for case in self.cases())

    def fits(self, budget: int) -> bool:
        """Whether there is a plan at all."""
        return self.idle + self._held <= budget and any(self.idle + case.total <= budget for case in self.cases())

    def largest_batch(self, budget: int) -> int:
        """The largest smaller batch that fits, 0 if none does. What fits is not always less than what does not (the
        arena's table has exact entries and others), so that all are tried."""
        smaller = (replace(self, batch=n, most=min(self.most, n)) for n in range(self.batch - 1, 0, -1))
        return next((network.batch for network in smaller if network.fits(budget)), 0)

    @property
    def _held(self) -> int:
        """Less than any plan needs, and quick: state, input and output of a block."""
        return max(n.state_bytes + n.input.at(self.batch) + n.output.at(self.batch) for n in self.needs)

    def cases(self) -> Iterator[Case]:
        """The cases, those that give up less first: ever more blocks take the batch in parts, the neediest first."""
        wholes = [n.whole.arena(self.batch) if self.most == self.batch else math.inf for n in self.needs]
        ceiling = math.inf
        for bound in [*sorted({w for w in wholes if w < math.inf}, reverse=True), 0]:
            micro = [self.batch if w <= bound else 1 for w in wholes]
            if self._working_arena(micro) <= ceiling:
                beside = self.beside(micro, self.graph_bytes(micro, every=False))
                yield Case(beside, self.arena(micro), ceiling)
            ceiling = bound - 1

    def arena(self, micro: Sequence[int]) -> int:
        """Bytes of the arena that all blocks and all passes need."""
        return max(self.floor, self._working_arena(micro))

    def _working_arena(self, micro: Sequence[int]) -> int:
        return max(self.way(n, size).arena(size) for n, size in zip(self.needs, micro, strict=True))

    def micro_batches(self, arena: float) -> list[int]:
        """For every block the fewest parts of the batch with which it needs at most `arena`."""
        sizes = sorted({self.most, *(-(-self.batch // parts) for parts in range(1, self.batch + 1))}, reverse=True)
        sizes = [size for size in sizes if size <= self.most]
        return [next(n for n in sizes if self.way(needs, n).arena(n) <= arena) for needs in self.needs]

    def way(self, needs: BlockNeeds, micro: int) -> Way:
        """How a block takes the batch, so many samples at a time."""
        return needs.whole if micro >= self.batch else needs.parts

    @cached_property
    def floor(self) -> int:
        """Bytes of the arena while a batch passes through the network in inference mode."""
        exits = [n.exit_arena(self.batch) for n in self.needs] if self.validates else []
        frozen = [n.forward_arena(self.batch) for n in self.needs[:-1]] if self.schedule == "sequential" else []
        return max([0, *exits, *frozen])

    def beside(self, micro: Sequence[int], graphs: int, resident: frozenset[int] = frozenset()) -> int:
        """What lies beside the arena at most, with the states of `resident` blocks always in memory."""
        states = sum(self.needs[i].state_bytes for i in resident)
        working = max(
            (0 if i in resident else n.state_bytes)
            + sum(self.way(n, size).written.values())
            + n.input.at(self.batch)
            + n.output.at(self.batch)
            for i, (n, size) in enumerate(zip(self.needs, micro, strict=True))
        )
        common = RUNTIME_BYTES + graphs + self.pipeline.resident
        return states + common + max(working, self._between(resident))

    def _between(self, resident: frozenset[int]) -> int:
        """What else is there while a batch is made or passes through the network in inference mode."""
        making = self.pipeline.making + self.needs[0].source.at(self.batch)
        if not (self.validates or self.schedule == "sequential"):
            return making
        paged = max((n.state_bytes for i, n in enumerate(self.needs) if i not in resident), default=0)
        return max(making, paged + max(self._passing(n) for n in self.needs))

    def _passing(self, needs: BlockNeeds) -> int:
        """Input and output of a block; a cache in half precision holds an output in both for a moment."""
        output = needs.output.at(self.batch)
        return output + max(needs.source.at(self.batch), output // 2 if self.schedule == "sequential" else 0)

    def resident(self, micro: Sequence[int], graphs: int, room: int) -> frozenset[int]:
        """The blocks whose state stays in memory where there is `room` beside the arena: as many as can, the largest
        first, because each of them is in memory anyway when it works."""
        order = sorted(range(len(self.needs)), key=lambda i: -self.needs[i].state_bytes)
        first = range(len(order) + 1)
        count = bisect_right(first, room, key=lambda k: self.beside(micro, graphs, frozenset(order[:k]))) - 1
        return frozenset(order[: max(0, count)])

    def graph_bytes(self, micro: Sequence[int], *, every: bool) -> int:
        """Bytes of every graph that the run uses, or of the largest alone."""
        used: list[GraphSpec] = []
        for needs, size in zip(self.needs, micro, strict=True):
            used += self.way(needs, size).graphs
            if self.validates or self.schedule == "sequential":
                used += needs.passes
        sizes = {graph.structure or graph.file: loaded_bytes(graph, self.threads) for graph in used}
        return sum(sizes.values()) if every else max(sizes.values())
