"""A device with an execution provider of its own, as a training uses it: what it is, its memory, and how graphs get
there. What CUDA is in particular is in cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from edgelocal.memory.needs import DEVICE_ALIGNMENT, DeviceNeeds
from edgelocal.memory.planned import DevicePlan
from edgelocal.runtime.library import runtime_info
from edgelocal.runtime.provider import Provider
from edgelocal.runtime.tensor import DeviceTensor
from edgelocal.storage.tensors import Array

# In plans: what kernels take of the arena, and what every graph brings of handles with their own memory. Both are
# assumptions, beside which reports show what it was.
WORKSPACE_BYTES, HANDLES_BYTES = 64 << 20, 8 << 20


class Meter(Protocol):
    """Memory of a device, in bytes."""

    @property
    def source(self) -> str:
        """Who says so: "nvml" or "driver"."""

    @property
    def counts_context(self) -> bool:
        """Whether the process's context is part of what it is said to hold."""

    def used_bytes(self) -> int:
        """What this process holds there; where only the device as a whole can be seen, what it became fuller by."""

    def free_bytes(self) -> int:
        """What there is to have, for all processes."""


@dataclass(frozen=True)
class Accelerator:
    """A device that is ready to work. `model` is its own name for itself; `needs` is what plans must know, as it was
    when the device became ready.

    `prepare` sets up the arena for at most so many bytes (None: what the device has), once in a process, and gives the
    provider. `waiting` gives memory of the host in which states wait.
    """

    name: str
    model: str
    tf32: bool
    meter: Meter
    needs: DeviceNeeds
    prepare: Callable[[int | None], Provider]
    waiting: Callable[[tuple[int, ...], str], Array]

    def runtime_info(self) -> dict[str, str]:
        """What the bits of a run depend on."""
        found = runtime_info().as_dict()
        return {**found, "provider": self.name, "graph_level": "constants", "gpu": self.model, "tf32": str(self.tf32)}

    def provider(self, plan: DevicePlan | None, limit_bytes: int | None) -> Provider:
        """The provider, with the region that is planned in the arena; `limit_bytes` bounds it where nothing is.

        Raises:
            OverBudgetError: the device does not have the region any more.
        """
        provider = self.prepare(limit_bytes if plan is None else plan.limit)
        if plan is not None and provider.one_arena:
            reserve(provider, plan.tensors)
        return provider


def reserve(provider: Provider, region_bytes: int) -> None:
    """Have the arena take one region of so many bytes, in which tensors then lie as foreseen.

    The arena grows by what is asked for and keeps it when it is freed: a tensor that comes and goes leaves a region.

    Raises:
        OverBudgetError: the device does not have it.
    """
    if provider.place.device is not None:
        size = -(-region_bytes // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT
        DeviceTensor(provider.place.device, (size,), "uint8")
