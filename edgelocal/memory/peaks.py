"""The peak of a training at one batch, as sums: what lies in the runtime's arena, and what beside it.

The arena once touched stays, and has one region for all graphs of the process. So the process's peak is the most that
any run touches of it, the table of the largest region that any run needs, and the most that lies beside.

Micro-batches are chosen by one bound on the arena, the same for all blocks, as if each had a region of its own. The
lower the bound, the smaller the micro-batches: under a budget they are the first, from no bound on downwards, with
which the whole process fits, and the smallest budget is the least that any of them needs.

On a device the same lies there, but for graphs and the data pipeline, which stay on the host. Its arena has no table,
kernels take more, and the next batch is there already while the current one computes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import groupby
from operator import itemgetter
from typing import TypeAlias

from edgelocal.bundle.memory_spec import ArenaBytes
from edgelocal.bundle.spec import GraphSpec, Manifest
from edgelocal.memory.needs import (
    BlockNeeds,
    DeviceNeeds,
    PipelineBytes,
    Way,
    block_needs,
    has_convolutions,
    loaded_bytes,
    rounding_bytes,
    runtime_bytes,
)
from edgelocal.memory.recency import Turns, held_at_most

SESSIONS = 2  # of a graph on a device: for the batch, and for what is left of an epoch
DEVICE_HOST_BYTES = 64 << 20  # of the host, that libraries of a device take once they meet real sizes: an assumption
UNFORESEEN = 5  # part by which a device's arena is fuller than one of the host: 1 to 16 % were found by simulation
ALL_TRIED = 512  # batches up to this are all tried for the largest that fits


Pipeline: TypeAlias = PipelineBytes | Callable[[int], PipelineBytes]  # known, or as a function of the batch


@dataclass(frozen=True)
class Choice:
    """Micro-batches of all blocks; what they need of the arena, and the bytes that lie beside it at most."""

    micro: tuple[int, ...]
    arena: ArenaBytes
    beside: int

    @property
    def total(self) -> int:
        """The peak above the idle process with nothing kept that could be given up."""
        return self.arena.total + self.beside


@dataclass(frozen=True)
class Workload:
    """What is to be planned: the blocks of a network with a batch, and what is around them, in bytes.

    `most` is the largest micro-batch, `idle` the process before it plans, `spare` what that may be more in another
    start of it, where a budget named in this one is to be enough too, `pipeline_at` what the data takes at a batch,
    `validates` whether batches also pass through the whole network in inference mode, `threads` those of each graph,
    `convolves` whether the network has convolutions, `device` where graphs run if not on the host, `foreseen` whether
    the bundle's memory models are those of such a device.
    """

    needs: tuple[BlockNeeds, ...]
    batch: int
    most: int  # samples at a time
    schedule: str
    idle: int
    spare: int
    pipeline_at: Callable[[int], PipelineBytes]
    validates: bool
    threads: int
    convolves: bool
    device: DeviceNeeds | None = None
    foreseen: bool = True

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        *,
        batch: int,
        schedule: str,
        idle_bytes: int,
        spare_bytes: int = 0,
        pipeline: Pipeline,
        validates: bool,
        micro_batch: int | None = None,
        threads: int = 1,
        device: DeviceNeeds | None = None,
    ) -> Workload:
        """The blocks of a bundle; `micro_batch` is an upper bound for all of them."""
        needs = tuple(block_needs(block) for block in manifest.blocks)
        most = min(batch, micro_batch or batch)

        def pipeline_at(samples: int) -> PipelineBytes:
            return pipeline(samples) if callable(pipeline) else pipeline

        convolves = has_convolutions(manifest.blocks)
        return cls(
            needs,
            batch,
            most,
            schedule,
            idle_bytes,
            spare_bytes,
            pipeline_at,
            validates,
            threads,
            convolves,
            device,
            foreseen=manifest.target == "cuda",
        )

    @property
    def anywhere(self) -> Workload:
        """The same in the largest start of the process."""
        return replace(self, idle=self.idle + self.spare, spare=0)

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
        return self.idle + min(choice.total for choice in self.possible())

    def fits(self, budget: int) -> bool:
        """Whether there is a plan at all."""
        return self.idle + self._held <= budget and any(self.holds(choice, budget) for choice in self.choices())

    def holds(self, choice: Choice, budget: int | None) -> bool:
        """Whether the process fits the budget, and its part on the device what that has."""
        within = budget is None or self.idle + choice.total <= budget
        return within and self.on_device_fits(choice.micro, choice.arena, choice.beside)

    def largest_batch(self, budget: int) -> int:
        """The largest smaller batch that fits, 0 if none does. What fits is not always less than what does not (the
        arena's table has exact entries and others), so that all are tried up to `ALL_TRIED`. Of larger batches some
        are, ever smaller ones until one fits, and then between it and the one before: one more sample than the answer
        does not fit, but a larger batch still may."""
        above = self.batch
        while above - 1 > ALL_TRIED:
            n = max(ALL_TRIED + 1, above * 4 // 5)
            if self._smaller(n).fits(budget):
                between = range(n + 1, above)
                return n + bisect_left(between, True, key=lambda m: not self._smaller(m).fits(budget))
            above = n
        return next((n for n in range(above - 1, 0, -1) if self._smaller(n).fits(budget)), 0)

    def _smaller(self, batch: int) -> Workload:
        """The same with a smaller batch."""
        return replace(self, batch=batch, most=min(self.most, batch))

    @property
    def _held(self) -> int:
        """Less than any plan needs, and quick: state, input and output of a block."""
        return max(n.state_bytes + n.input.at(self.batch) + n.output.at(self.batch) for n in self.needs)

    def choices(self) -> Iterator[Choice]:
        """The micro-batches under an ever lower bound on the arena: for every block the fewest parts of the batch with
        which it fits, or its smallest need where nothing does."""
        ladders = [self._ladder(needs) for needs in self.needs]
        # Where the bound falls below what a block needs: that need, the block, and how far it goes down its ladder.
        falls = ((a.total, i, k) for i, ladder in enumerate(ladders) for k, (_, a) in enumerate(ladder[:-1], start=1))
        micro = [ladder[0][0] for ladder in ladders]
        arenas = [*(ladder[0][1] for ladder in ladders), self.floor]
        touched, region = [a.touched for a in arenas], [a.region for a in arenas]
        beside = self._least_beside(micro)
        yield Choice(tuple(micro), ArenaBytes(max(touched), max(region)), beside)
        for _, together in groupby(sorted(falls, reverse=True), key=itemgetter(0)):
            cut = False
            for _, i, k in together:
                cut |= micro[i] >= self.batch
                micro[i], arena = ladders[i][k]
                touched[i], region[i] = arena.touched, arena.region
            beside = self._least_beside(micro) if cut else beside  # how small the parts are makes no difference
            yield Choice(tuple(micro), ArenaBytes(max(touched), max(region)), beside)

    def possible(self) -> list[Choice]:
        """The choices that the device has room for; all of them where it has room for none."""
        found = list(self.choices())
        return [c for c in found if self.on_device_fits(c.micro, c.arena, c.beside)] or found

    def _least_beside(self, micro: Sequence[int]) -> int:
        """What lies beside the arena with nothing kept that could be given up."""
        return self.beside(micro, self.graph_bytes(micro, every=False))

    def _ladder(self, needs: BlockNeeds) -> list[tuple[int, ArenaBytes]]:
        """Micro-batches of about one size, from the largest on, with what they need of the arena: those that need less
        than all larger ones."""
        sizes = sorted({self.most, *(-(-self.batch // parts) for parts in range(1, self.batch + 1))}, reverse=True)
        found: list[tuple[int, ArenaBytes]] = []
        for size in sizes:
            if size <= self.most:
                arena = self.taken(self.way(needs, size).arena(size))
                if not found or arena.total < found[-1][1].total:
                    found.append((size, arena))
        return found

    def arena(self, micro: Sequence[int]) -> ArenaBytes:
        """What all blocks and all passes need of the arena."""
        ways = (self.taken(self.way(n, size).arena(size)) for n, size in zip(self.needs, micro, strict=True))
        return reduce(ArenaBytes.joined, ways, self.floor)

    def taken(self, arena: ArenaBytes) -> ArenaBytes:
        """What runs take that need this of an arena: a device's arena has no table, and its kernels take more."""
        if self.device is None:
            return arena
        more = 0 if self.foreseen else arena.touched // UNFORESEEN
        return ArenaBytes(arena.touched + more + self.device.workspace, 0)

    def way(self, needs: BlockNeeds, micro: int) -> Way:
        """How a block takes the batch, so many samples at a time."""
        return needs.whole if micro >= self.batch else needs.parts

    @cached_property
    def floor(self) -> ArenaBytes:
        """What a batch that passes through the network in inference mode needs of the arena."""
        exits = [n.exit_arena(self.batch) for n in self.needs] if self.validates else []
        frozen = [n.forward_arena(self.batch) for n in self.needs[:-1]] if self.schedule == "sequential" else []
        return reduce(ArenaBytes.joined, [self.taken(a) for a in (*exits, *frozen)], ArenaBytes(0, 0))

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
        ahead = 0 if self.device is None else self.pipeline.making + self._uploads + self._apart
        return states + ahead + self._common(graphs) + max(working, self._between(resident))

    def _common(self, graphs: int) -> int:
        """What stays the same while a training runs: the runtime, graphs, and what the data keeps."""
        return self.runtime + graphs + self.pipeline.resident

    @property
    def _making(self) -> int:
        """A batch, and what making it takes."""
        return self.pipeline.making + self.needs[0].source.at(self.batch)

    @property
    def _uploads(self) -> int:
        """Memory of a device for the batch that computes and the one that is brought up meanwhile, used in turn."""
        first = self.needs[0].input.at(self.batch)  # with its labels
        if self.schedule == "interleaved":
            return 2 * first
        # From a cache come inputs of every block; one of them is the input of the block that works.
        return max(2 * first, *(n.input.at(self.batch) for n in self.needs))

    def _between(self, resident: frozenset[int]) -> int:
        """What else is there while a batch is made or passes through the network in inference mode."""
        making = self._making if self.device is None else 0  # on a device it is there besides
        if not (self.validates or self.schedule == "sequential"):
            return making
        paged = max((n.state_bytes for i, n in enumerate(self.needs) if i not in resident), default=0)
        return max(making, paged + max(self._passing(n) for n in self.needs))

    def on_device(self, micro: Sequence[int], arena: ArenaBytes, beside: int, graphs: int | None = None) -> int:
        """Of the arena and what lies `beside` it, with `graphs` bytes of graphs (None: the least), the part on the
        device, its context included; 0 where there is none."""
        if self.device is None:
            return 0
        graphs = self.graph_bytes(micro, every=False) if graphs is None else graphs
        there = arena.total + beside - self._common(graphs) - self.pipeline.making
        return self.device.context + there

    @cached_property
    def _apart(self) -> int:
        """What else a device holds: what lies waste between tensors, and handles of libraries."""
        return rounding_bytes(self.needs) + self.handles

    @cached_property
    def handles(self) -> int:
        """What the graphs of a run bring to a device outside of its arena, all of them loaded."""
        return 0 if self.device is None else self.device.handles * SESSIONS * len(self._graph_sizes(self.uncut))

    def on_device_fits(self, micro: Sequence[int], arena: ArenaBytes, beside: int, graphs: int | None = None) -> bool:
        """Whether that is no more than the device has."""
        most = None if self.device is None else self.device.most
        return most is None or self.on_device(micro, arena, beside, graphs) <= most

    def _passing(self, needs: BlockNeeds) -> int:
        """Input and output of a block; a cache in half precision holds an output in both for a moment."""
        output = needs.output.at(self.batch)
        return output + max(needs.source.at(self.batch), output // 2 if self.schedule == "sequential" else 0)

    def resident(self, micro: Sequence[int], graphs: int, room: int | None) -> frozenset[int]:
        """The blocks whose state stays in memory where there is `room` beside the arena (None: any): as many as can,
        the largest first, because each of them is in memory anyway when it works."""
        order = sorted(range(len(self.needs)), key=lambda i: -self.needs[i].state_bytes)
        arena = self.arena(micro)

        def too_many(count: int) -> bool:
            beside = self.beside(micro, graphs, frozenset(order[:count]))
            within = room is None or beside <= room
            return not (within and self.on_device_fits(micro, arena, beside, graphs))

        count = bisect_left(range(len(order) + 1), True, key=too_many) - 1
        return frozenset(order[: max(0, count)])

    @property
    def runtime(self) -> int:
        """What the runtime takes besides graphs and arena."""
        return runtime_bytes(self.convolves) + (0 if self.device is None else DEVICE_HOST_BYTES)

    def graph_bytes(self, micro: Sequence[int], *, every: bool) -> int:
        """Bytes of every graph that the run uses, or of the largest alone."""
        sizes = self._graph_sizes(micro).values()
        return sum(sizes) if every else max(sizes)

    def graphs_beside(self, micro: Sequence[int], limit: int | None) -> list[int]:
        """For every block the bytes of graphs that are loaded at most while it works, where no more than `limit` may
        be: what the pool of graphs (graphs.py) does, foreseen. With None it keeps them all, those of others too."""
        sizes = self._graph_sizes(micro)
        if limit is None:
            return [sum(sizes.values())] * len(self.needs)
        return held_at_most(self._rounds(micro), sizes, limit, len(self.needs))

    def _rounds(self, micro: Sequence[int]) -> list[Turns]:
        """What runs over and over before all graphs are dropped: blocks and the graphs they use."""
        ways = [self.way(needs, samples) for needs, samples in zip(self.needs, micro, strict=True)]
        if self.schedule == "interleaved":
            return [[(index, list(way.graphs)) for index, way in enumerate(ways)]]
        frozen = [needs.spec.forward for needs in self.needs]
        return [[(index, [*frozen[:index], *way.graphs])] for index, way in enumerate(ways)]

    def _graph_sizes(self, micro: Sequence[int]) -> dict[str, int]:
        """Bytes of every graph that the run uses, equal structures once."""
        used: list[GraphSpec] = []
        for needs, size in zip(self.needs, micro, strict=True):
            used += self.way(needs, size).graphs
            if self.validates or self.schedule == "sequential":
                used += needs.passes
        times = 1 if self.device is None else SESSIONS
        return {graph.key: times * loaded_bytes(graph, self.threads) for graph in used}
