"""The memory model of a graph, as a bundle's manifest has it: bytes as functions of the batch."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

ARENA_MARGIN = 1.03
ARENA_TABLE = 32  # the runtime's arena fills a table of 8 bytes for every 256 bytes of its region: this part of it
REGION_SPARE = 32  # a region is larger by this part than needed: kernels of other versions take other workspace


@dataclass(frozen=True, slots=True)
class AffineSpec:
    """Bytes as a function of the batch: fixed + per_sample * N."""

    fixed: int
    per_sample: int

    def at(self, batch: int) -> int:
        """Bytes with `batch` samples."""
        return self.fixed + self.per_sample * batch


@dataclass(frozen=True, slots=True)
class PeakSpec:
    """What lives at one moment of a run, by kind; the peak of a run is the largest of a graph's moments.

    `activations` are values of the forward pass (kept, or computed again), `gradients` those of the backward pass and
    the update, `workspace` what single operators need besides.
    """

    activations: AffineSpec
    gradients: AffineSpec
    workspace: AffineSpec

    def at(self, batch: int) -> int:
        """Bytes of all kinds with `batch` samples."""
        return self.activations.at(batch) + self.gradients.at(batch) + self.workspace.at(batch)


def table_bytes(region: int) -> int:
    """Bytes of the table that the runtime's arena keeps for a region of so many bytes."""
    return -(-region // ARENA_TABLE)


@dataclass(frozen=True, slots=True)
class ArenaBytes:
    """What runs need of the runtime's arena: the bytes they touch, and those of the region they are a part of, in which
    values lie as foreseen (`edgelocal.runtime.arena.reserve`)."""

    touched: int
    region: int

    @property
    def total(self) -> int:
        """Bytes of memory: what is touched, and the region's table."""
        return self.touched + table_bytes(self.region)

    def joined(self, other: ArenaBytes) -> ArenaBytes:
        """What both need of one arena, one after the other."""
        return ArenaBytes(max(self.touched, other.touched), max(self.region, other.region))


@dataclass(frozen=True)
class MemorySpec:
    """The memory model of a graph: what a run allocates besides inputs, outputs and state.

    `peaks` say what lives, by kind; `arena` has for many batches (batch, bytes touched, bytes of region needed), found
    by running the allocator of the runtime's arena on the graph's sizes: what lives and what lies waste between, and
    the smallest region from which on values lie as in an endless one.
    """

    peaks: tuple[PeakSpec, ...]
    arena: tuple[tuple[int, ...], ...]

    def peak(self, batch: int) -> PeakSpec:
        """The moment at which most lives."""
        return max(self.peaks, key=lambda p: p.at(batch))

    def arena_at(self, batch: int) -> ArenaBytes:
        """What a run on `batch` samples needs of the arena; between and beyond the known batches with a margin, in a
        region of twice what is touched, where values always lie as foreseen."""
        above = bisect_left(self.arena, (batch,))
        if above < len(self.arena) and self.arena[above][0] == batch:
            _, touched, region = self.arena[above]
            touched = max(touched, self.peak(batch).at(batch))  # less than what lives it cannot be
            return ArenaBytes(touched, max(touched, region + region // REGION_SPARE))
        last = self.arena[-1]
        low, small, _ = last if above == len(self.arena) else self.arena[above - 1]
        high, large, _ = (2 * last[0], 2 * last[1], 0) if above == len(self.arena) else self.arena[above]
        between = small + (large - small) * (batch - low) / (high - low)
        touched = int(max(between, self.peak(batch).at(batch)) * ARENA_MARGIN)
        return ArenaBytes(touched, 2 * touched)

    def arena_bytes(self, batch: int) -> int:
        """Bytes of memory that the arena takes where it is made for runs of this graph on `batch` samples."""
        return self.arena_at(batch).total

    def region_bytes(self, batch: int) -> int:
        """Bytes of the region for these runs."""
        return self.arena_at(batch).region
