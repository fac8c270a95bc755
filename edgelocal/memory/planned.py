"""A plan as values: how each block trains, and what it holds in memory (made by plan.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgelocal.bundle.memory_spec import ARENA_TABLE


@dataclass(frozen=True)
class BlockPlan:
    """How one block trains. `predicted` are bytes by kind above the idle process while it works, `arena` those of them
    that the runtime's arena takes, the table of the process's region included."""

    name: str
    micro_batch: int
    accumulation: int
    resident: bool
    predicted: dict[str, int]
    arena: int

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(self.predicted.values())


@dataclass(frozen=True)
class DevicePlan:
    """What lies on a device, in bytes: `peak` in all, `context` before the plan, `handles` of libraries, `workspace` of
    kernels; the rest is `tensors`. `limit` is what its arena may take, None: what it gets. Paged states wait on "disk"
    or on the "host"."""

    peak: int
    context: int
    handles: int
    workspace: int
    limit: int | None
    paging: str

    @property
    def tensors(self) -> int:
        """What lies in the arena besides the workspace."""
        return self.peak - self.context - self.handles - self.workspace

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "peak_bytes": self.peak,
            "context_bytes": self.context,
            "handles_bytes": self.handles,
            "tensors_bytes": self.tensors,
            "workspace_bytes": self.workspace,
            "limit_bytes": self.limit,
            "paging": self.paging,
        }


@dataclass(frozen=True)
class Plan:
    """What the runner does with the memory it has. `graphs_bytes` bounds the loaded graphs; None keeps all of them. The
    arena takes `arena_bytes` in a region of `region_bytes`. The peak is that of the host and a `device` together."""

    batch: int
    schedule: str
    budget_bytes: int | None
    idle_bytes: int
    graphs_bytes: int | None
    blocks: tuple[BlockPlan, ...]
    arena_bytes: int
    region_bytes: int
    peak_bytes: int
    device: DevicePlan | None = None

    @property
    def region_limit(self) -> int | None:
        """What regions may take in all: this one, and with its table what the budget leaves."""
        if self.budget_bytes is None:
            return None
        return self.region_bytes + (self.budget_bytes - self.peak_bytes) * ARENA_TABLE // (ARENA_TABLE + 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "batch": self.batch,
            "schedule": self.schedule,
            "budget_bytes": self.budget_bytes,
            "idle_bytes": self.idle_bytes,
            "arena_bytes": self.arena_bytes,
            "region_bytes": self.region_bytes,
            "peak_bytes": self.peak_bytes,
            "graphs_bytes": self.graphs_bytes,
            "device": None if self.device is None else self.device.as_dict(),
            "blocks": [
                {
                    "name": b.name,
                    "micro_batch": b.micro_batch,
                    "accumulation": b.accumulation,
                    "resident": b.resident,
                    "predicted": {**b.predicted, "total": b.total},
                    "predicted_arena_bytes": b.arena,
                }
                for b in self.blocks
            ],
        }
