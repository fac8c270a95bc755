"""Learning rate as a function of the epoch, counted from 1 to E.

    constant   lr
    step       lr * 0.1 for each of the epochs floor(E/2) and floor(3E/4) that is behind
    cosine     c(e) = lr / 2 * (1 + cos(pi e / E)), which reaches 0 at e = E

With a warm-up of W epochs the rate for e <= W is  r(e) (e - 1) / W + s (W + 1 - e) / W : a line from s = 0.01, or from
lr where that is smaller, to the schedule r (AugLocal's recipe has W = 10 and cosine, with lr above 0.01).
"""

from __future__ import annotations

import math

from edgelocal.errors import UsageError

SCHEDULES = ("constant", "step", "cosine")
WARMUP_START = 0.01


def learning_rate(schedule: str, base: float, epoch: int, epochs: int, warmup: int) -> float:
    """The rate of `epoch` (1..epochs).

    Raises:
        UsageError: an unknown schedule.
    """
    if schedule == "constant":
        rate = base
    elif schedule == "step":
        rate = base * 0.1 ** ((epoch > epochs // 2) + (epoch > epochs * 3 // 4))
    elif schedule == "cosine":
        rate = base * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    else:
        raise UsageError(f"there is no learning-rate schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if epoch <= warmup:
        return rate * (epoch - 1) / warmup + min(WARMUP_START, base) * (warmup + 1 - epoch) / warmup
    return rate


def trains_nothing(schedule: str, base: float, epochs: int, warmup: int) -> bool:
    """Whether a positive `base` comes to a rate of 0 in every epoch, as a cosine of one epoch does."""
    return base > 0 and not any(learning_rate(schedule, base, e, epochs, warmup) > 0 for e in range(1, epochs + 1))
