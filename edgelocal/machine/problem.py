"""What the doctor says of anything that is wrong."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """What was found, and what to type or do about it."""

    found: str
    remedy: str
