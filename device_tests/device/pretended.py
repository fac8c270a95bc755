"""A device that every machine has: the CPU, whose tensors are in memory of the runtime and seen by address alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from edgelocal.commands import train as commands
from edgelocal.commands.on_device import DeviceRequest
from edgelocal.memory.needs import DeviceNeeds
from edgelocal.runtime.accelerator import Accelerator
from edgelocal.runtime.provider import Provider
from edgelocal.runtime.tensor import Place

CONTEXT, WORKSPACE = 1 << 20, 1 << 16
HANDLES = 1 << 14
NEEDS = DeviceNeeds(CONTEXT, None, WORKSPACE, HANDLES, shared=False)
PROVIDER = Provider(place=Place("cpu"), fixed_batch=True)


@dataclass
class Tally:
    """A meter that says what it is told; `takes` is added at every look."""

    held: int = CONTEXT
    takes: int = 0
    source: str = "pretended"
    counts_context: bool = True

    def used_bytes(self) -> int:
        """What was told, and more at every look."""
        self.held += self.takes
        return self.held

    def free_bytes(self) -> int:
        """Plenty."""
        return 1 << 40


@dataclass
class Pretended:
    """What happened on the device: limits of its arena, arrays in which states waited."""

    limits: list[int | None] = field(default_factory=list)
    waiting: list[tuple[int, ...]] = field(default_factory=list)
    meter: Tally = field(default_factory=Tally)
    needs: DeviceNeeds = NEEDS

    def accelerator(self) -> Accelerator:
        """As `open_device` gives it."""

        def prepare(limit: int | None) -> Provider:
            self.limits.append(limit)
            return replace(PROVIDER)

        def waiting(shape: tuple[int, ...], dtype: str) -> Any:
            self.waiting.append(shape)
            return np.empty(shape, dtype)

        return Accelerator("pretended", "a CPU", False, self.meter, self.needs, prepare, waiting)


def pretend(patch: pytest.MonkeyPatch, **values: Any) -> Pretended:
    """Have `train --device cuda`, in this process, work on such a device."""
    found = Pretended(**values)

    def open_device(request: DeviceRequest, *, bounded: bool) -> Accelerator | None:
        return None if request.name == "cpu" else found.accelerator()

    patch.setattr(commands, "open_device", open_device)
    return found
