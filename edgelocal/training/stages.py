"""What a training does in which order: stages of epochs of batches, and where in them a run stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Position:
    """Where a run stands: stage, epoch in the stage and batch in the epoch to do next, and steps done before."""

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Stage:
    """Blocks that run frozen, then blocks that train, on every batch."""

    frozen: range
    trained: range


def stages(schedule: str, blocks: int) -> tuple[Stage, ...]:
    """The stages of a schedule over `blocks` blocks."""
    if schedule == "interleaved":
        return (Stage(range(0), range(blocks)),)
    return tuple(Stage(range(k), range(k, k + 1)) for k in range(blocks))
