"""What is measured of a training: per block scores, memory and time; the process's memory over time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from edgelocal.scores import Score

_MOST_POINTS = 2000
_MOST_LATENCIES = 4096
MEASURE_EVERY = 100  # steps


def is_measured(number: int) -> bool:
    """Whether a block's own memory is measured at step `number` of a stage.

    Then the runtime gives its working memory back before and after, so that what a block takes is seen alone. That
    costs time (pages are taken anew), so it is done at the first two steps and then now and then. The first also loads
    the graph; what it shows is replaced by what the second does.
    """
    return number < 2 or number % MEASURE_EVERY == 0


@dataclass
class BlockMeasures:
    """Training score of the current epoch, and over the run memory and time.

    `peak_bytes` is the peak of the process while the block worked alone, `arena_bytes` what that peak was above the
    memory held before the step and the step's outputs. `latencies_s` are those of this process, evenly thinned out.
    """

    score: Score = field(default_factory=Score)
    peak_bytes: int = 0
    step_s: float = 0.0
    steps: int = 0
    arena_bytes: int = 0
    latencies_s: list[float] = field(default_factory=list)
    _stride: int = 1

    def add_memory(self, number: int, peak_bytes: int, arena_bytes: int) -> None:
        """Note what step `number` of the stage, a measured one, held."""
        first = number < 2
        self.peak_bytes = peak_bytes if first else max(self.peak_bytes, peak_bytes)
        self.arena_bytes = arena_bytes if first else max(self.arena_bytes, arena_bytes)

    def add_time(self, seconds: float) -> None:
        """Note the time of a step."""
        self.step_s += seconds
        if self.steps % self._stride == 0:
            self.latencies_s.append(seconds)
            if len(self.latencies_s) > _MOST_LATENCIES:
                del self.latencies_s[1::2]
                self._stride *= 2
        self.steps += 1

    def latency_s(self) -> dict[str, float] | None:
        """Percentiles of the time of a step, None before the first."""
        values = sorted(self.latencies_s)
        if not values:
            return None
        return {f"p{p}": round(values[min(len(values) - 1, len(values) * p // 100)], 6) for p in (50, 90, 99)}


class Timeline:
    """Peaks of resident memory since the start, by time and block; evenly thinned out to at most 2000 points."""

    def __init__(self) -> None:
        self.points: list[tuple[float, int, int]] = []
        self._start = time.monotonic()
        self._stride = 1
        self._seen = 0

    def add(self, resident_bytes: int, block: int) -> None:
        """Note the peak of a step of `block`, or of what lies between steps (-1)."""
        if self._seen % self._stride == 0:
            self.points.append((round(time.monotonic() - self._start, 3), resident_bytes, block))
            if len(self.points) > _MOST_POINTS:
                del self.points[1::2]
                self._stride *= 2
        self._seen += 1
