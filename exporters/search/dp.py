"""Dynamic programming over the units: the cheapest partition of the blocks that fit, and the least that can fit.

The depth that a rule wants for a block depends on the block's number and on how many there are, so there is a pass for
every number of blocks; passes share the blocks they begin alike with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgelocal.exporters.search.problem import Cell, Level, Problem, Table

_FAR = 1 << 40  # more depth than can be missing: no such block
_NEVER = 1 << 62  # more MACs than any partition has


@dataclass(frozen=True)
class Partition:
    """Blocks in order as cells of the problem, the auxiliary depth they miss in all, and their training MACs."""

    cells: tuple[Cell, ...]
    missing: int
    macs: int


@dataclass(frozen=True)
class _Choice:
    """For a wanted level the best level of every block, [start, stop]: what it misses, its MACs, which level it is."""

    missing: Table
    macs: Table
    level: Table


@dataclass(frozen=True)
class _Step:
    """After some blocks, for every unit they may end at: depth missing and MACs so far, where the last one starts."""

    missing: Table
    macs: Table
    start: Table


def cheapest(problem: Problem, fits: Table) -> Partition | None:
    """The partition into blocks of the mask `fits` with the least (depth missing, training MACs); None: there is none.

    Of equal ones the one of the fewest blocks.
    """
    possible = fits & problem.possible()
    choices = [_choice(problem, possible, level) for level in range(len(problem.depths))]
    before: dict[tuple[Level, ...], _Step] = {(): _start(problem.units)}
    best: tuple[int, int, tuple[Level, ...]] | None = None
    for wanted in _levels(problem):
        for count in range(1, len(wanted) + 1):
            if wanted[:count] not in before:
                before[wanted[:count]] = _step(before[wanted[: count - 1]], choices[wanted[count - 1]])
        end = _step(before[wanted], choices[0])
        found = int(end.missing[-1]), int(end.macs[-1])
        if found[0] < _FAR and (best is None or found < best[:2]):
            best = *found, wanted
    return None if best is None else _traced(problem, choices, before, best)


def bottleneck(problem: Problem, size: Table) -> float:
    """The least that the largest block of a partition can have of `size`, a table of the problem's shape."""
    sizes = np.where(problem.possible(), size, np.inf)
    least = [_least(problem, sizes, level) for level in range(len(problem.depths))]
    before: dict[tuple[Level, ...], Table] = {(): np.array([0.0] + [np.inf] * problem.units)}
    best = np.inf
    for wanted in _levels(problem):
        for count in range(1, len(wanted) + 1):
            if wanted[:count] not in before:
                reached = before[wanted[: count - 1]][:-1, None]
                before[wanted[:count]] = np.maximum(reached, least[wanted[count - 1]]).min(0)
        best = min(best, np.maximum(before[wanted][:-1], least[0][:, -1]).min())
    return float(best)


def _levels(problem: Problem) -> list[tuple[Level, ...]]:
    return [tuple(problem.depths.index(depth) for depth in wanted) for wanted in problem.wanted]


def _choice(problem: Problem, possible: Table, wanted: Level) -> _Choice:
    """A block is as deep as it may: what it misses counts before its MACs."""
    missing = np.full(possible.shape[1:], _FAR)
    macs, chosen = np.zeros_like(missing), np.zeros_like(missing)
    for stop in range(1, problem.units + 1):
        for level, lacking in problem.allowed(wanted, stop).items():
            fits = possible[level, :, stop]
            missing[fits, stop] = lacking
            macs[fits, stop] = problem.macs[level, fits, stop]
            chosen[fits, stop] = level
    return _Choice(missing, macs, chosen)


def _least(problem: Problem, sizes: Table, wanted: Level) -> Table:
    """The least size of every block, [start, stop], over the levels it may have."""
    columns = [np.full(problem.units, np.inf)]
    columns += [sizes[[*problem.allowed(wanted, stop)], :, stop].min(0) for stop in range(1, problem.units + 1)]
    return np.stack(columns, 1)


def _start(units: int) -> _Step:
    missing = np.full(units + 1, _FAR)
    missing[0] = 0
    return _Step(missing, np.zeros_like(missing), np.zeros_like(missing))


def _step(before: _Step, choice: _Choice) -> _Step:
    """One block more."""
    missing = before.missing[:-1, None] + choice.missing
    least = missing.min(0)
    macs = np.where(missing == least, before.macs[:-1, None] + choice.macs, _NEVER)
    return _Step(least, macs.min(0), macs.argmin(0))


def _traced(
    problem: Problem,
    choices: list[_Choice],
    before: dict[tuple[Level, ...], _Step],
    best: tuple[int, int, tuple[Level, ...]],
) -> Partition:
    """The blocks of the pass that ended best, from the last to the first."""
    missing, macs, wanted = best
    stop, cells = problem.units, []
    start = int(_step(before[wanted], choices[0]).start[stop])
    cells.append((0, start, stop))
    for count in range(len(wanted), 0, -1):
        stop, start = start, int(before[wanted[:count]].start[start])
        cells.append((int(choices[wanted[count - 1]].level[start, stop]), start, stop))
    return Partition(tuple(reversed(cells)), missing, macs)
