"""What is measured of a training: per block scores, memory and time; the process's memory over time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from random import Random

from edgelocal.training.scores import Score

_MOST_POINTS = 2000
_MOST_LATENCIES = 4096
MEASURE_EVERY = 100  # steps
BETWEEN = -1  # in the timeline: no block worked


def is_measured(number: int) -> bool:
    """Whether a block's own memory is measured at step `number` of a stage.

    Then the runtime gives its working memory back before and after, so that what a block takes is seen alone. That
    costs time (pages are taken anew), so it is done at the first two steps and then now and then. The first also loads
    the graph; what it shows is replaced by what the second does.
    """
    return number == 1 or (number >= 0 and number % MEASURE_EVERY == 0)


def releases(number: int) -> bool:
    """Whether step `number` gives the runtime's working memory back: those that are measured, and the one before."""
    return is_measured(number) or is_measured(number + 1)


def is_slowed(number: int) -> bool:
    """Whether measuring memory slows step `number`: it gives memory back, or takes anew what the one before gave."""
    return releases(number) or releases(number - 1)


@dataclass
class BlockMeasures:
    """Training score of the current epoch, and over the run memory and time.

    `peak_bytes` is the peak of the process while the block worked alone, `arena_bytes` what that peak was above the
    memory held before the step and the step's outputs, 0 where that is not known. `latencies_s` are times of steps of
    this process that measuring did not slow: all, or of many a sample of 4096 that favours none.
    """

    score: Score = field(default_factory=Score)
    peak_bytes: int = 0
    step_s: float = 0.0
    steps: int = 0
    arena_bytes: int = 0
    latencies_s: list[float] = field(default_factory=list)
    _timed: int = 0
    _random: Random = field(default_factory=lambda: Random(0))

    def add_memory(self, number: int, peak_bytes: int, arena_bytes: int | None) -> None:
        """Note what step `number` of the stage, a measured one, held; None where more than the arena grew."""
        first, arena = number < 2, arena_bytes or 0
        self.peak_bytes = peak_bytes if first else max(self.peak_bytes, peak_bytes)
        self.arena_bytes = arena if first else max(self.arena_bytes, arena)

    def add_time(self, seconds: float, *, slowed: bool) -> None:
        """Note the time of a step; one that was slowed by measuring counts in the total alone."""
        self.step_s += seconds
        self.steps += 1
        if slowed:
            return
        self._timed += 1
        if len(self.latencies_s) < _MOST_LATENCIES:
            self.latencies_s.append(seconds)
            return
        # Every step so far is kept with the same chance: a stride would meet the same step of every epoch.
        place = self._random.randrange(self._timed)
        if place < _MOST_LATENCIES:
            self.latencies_s[place] = seconds

    def latency_s(self) -> dict[str, float] | None:
        """Percentiles of the time of a step, None before the first."""
        values = sorted(self.latencies_s)
        if not values:
            return None
        return {f"p{p}": round(values[min(len(values) - 1, len(values) * p // 100)], 6) for p in (50, 90, 99)}


class Timeline:
    """Peaks of resident memory since the start, by time and block: of every block the highest in each stretch of time.

    Stretches double when there are more than 2000 points, so that no block and no maximum is ever lost; only with more
    than 1000 blocks can there be more points, two a block.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._stretch_s = 0.001
        self._highest: dict[tuple[int, int], tuple[float, int, int]] = {}

    @property
    def points(self) -> list[tuple[float, int, int]]:
        """Rows of seconds, resident bytes and block, or -1 for what lies between steps; by time."""
        return sorted(self._highest.values())

    def add(self, resident_bytes: int, block: int) -> None:
        """Note the peak of a step of `block`, or of what lies between steps (-1)."""
        seconds = round(time.monotonic() - self._start, 3)
        self._keep((seconds, resident_bytes, block))
        while len(self._highest) > _MOST_POINTS and seconds >= self._stretch_s:
            self._stretch_s *= 2
            points, self._highest = self.points, {}
            for point in points:
                self._keep(point)

    def _keep(self, point: tuple[float, int, int]) -> None:
        key = int(point[0] / self._stretch_s), point[2]
        if key not in self._highest or point[1] > self._highest[key][1]:
            self._highest[key] = point
