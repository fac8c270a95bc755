"""workload + budget -> Plan: arithmetic on the manifest's memory model, no graph is loaded.

What a process holds while block b works, above the idle process:

    state       parameters, optimizer slots and buffers: of all blocks, or of b alone where they are paged
    copies      what a step writes anew beside them (parameters that are still read, sums of gradients)
    graphs      loaded graphs, of all blocks (equal structures once) or as much as the largest takes; while b works only
                those that fit beside its own
    arena       activations, gradients, workspace: the memory model at the micro-batch; and its region's table
    in and out  the batch and the block's output for the next block
    data        what the data pipeline keeps

The arena once touched stays, and has one region, so the process's peak is its largest use by any block, the table of
the largest region, and the most that lies beside it:

    arena = max over blocks (touched) + max over blocks (region) / 32
    peak = idle + arena + max(max over blocks (all but the arena), making a batch, passing one on)

If not everything fits, the plan gives up, in this order: graphs that stay loaded, state that stays in memory, and last
the whole batch at once (micro-batches, whose gradients add up; exact but for batch statistics). More memory never gives
up more. The sums are in peaks.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelocal.bundle.memory_spec import ARENA_TABLE, table_bytes
from edgelocal.bundle.spec import Manifest
from edgelocal.errors import BudgetError
from edgelocal.machine.budget import format_size, size_up
from edgelocal.memory.peaks import ALL_TRIED, Workload

_IDLE_STEP, _IDLE_NOISE = 1 << 20, 128 << 10  # equal processes differ by 4 to 120 KiB

KINDS = (
    *("parameters", "optimizer", "buffers", "gradients", "activations", "workspace"),
    *("input", "output", "runtime", "pipeline"),
)


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
class Plan:
    """What the runner does with the memory it has. `graphs_bytes` bounds the loaded graphs; None keeps all of them. The
    arena takes `arena_bytes` in a region of `region_bytes`."""

    batch: int
    schedule: str
    budget_bytes: int | None
    idle_bytes: int
    graphs_bytes: int | None
    blocks: tuple[BlockPlan, ...]
    arena_bytes: int
    region_bytes: int
    peak_bytes: int

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


def has_model(manifest: Manifest) -> bool:
    """Whether the bundle says what it needs (those of schema 1 do not)."""
    return all(b.memory is not None and b.accumulation is not None for b in manifest.blocks)


@dataclass(frozen=True)
class Thresholds:
    """The smallest budgets, in bytes, from which on: everything is kept; only graphs are given up; only graphs and
    states; and the smallest that trains at all."""

    everything: int
    states: int
    batch: int
    least: int


def make_plan(work: Workload, budget_bytes: int | None, wanted: Sequence[int] | None = None) -> Plan:
    """The plan that gives up least; where it fits, the one of those with the micro-batches `wanted`, one for each
    block, lowered to what the workload allows.

    Raises:
        BudgetError: no plan fits; the message names the block, what it needs and the smallest budget that would do.
    """
    plan = None
    if wanted is not None and len(wanted) == len(work.needs):
        plan = _with_micro(work, [min(size, work.most) for size in wanted], budget_bytes)
    plan = plan or _least_given_up(work, budget_bytes)
    if plan is None:
        assert budget_bytes is not None, "without a budget everything is kept"
        raise BudgetError(_refusal(work.anywhere, budget_bytes))
    return plan


def make_thresholds(work: Workload) -> Thresholds:
    """The budgets at which the plan gives something up, in every start of the process."""
    work = work.anywhere
    kept, fewer, paged = (_plan(work, work.uncut, mode, None).peak_bytes for mode in (_ALL, _STATES, _NOTHING))
    return Thresholds(kept, fewer, paged, work.least)


def idle_range(measured_bytes: int) -> tuple[int, int]:
    """The idle process of `measured_bytes`, and what it may be more in another start.

    The first is what to plan with, a little more than was measured. With both, in whole MiB, any other start of
    about `measured_bytes` is covered, so that a budget named with both is enough in each.
    """
    idle = measured_bytes + _IDLE_NOISE
    return idle, -(-(idle + 3 * _IDLE_NOISE) // _IDLE_STEP) * _IDLE_STEP - idle


@dataclass(frozen=True)
class _Mode:
    graphs: bool  # all graphs stay loaded
    states: bool  # all states stay in memory


_ALL, _STATES, _NOTHING = _Mode(True, True), _Mode(False, True), _Mode(False, False)


def _least_given_up(work: Workload, budget: int | None) -> Plan | None:
    """The best plan that fits, None where none does."""
    for mode in (_ALL, _STATES):
        plan = _plan(work, work.uncut, mode, budget)
        if budget is None or plan.peak_bytes <= budget:
            return plan
    fitting = (choice for choice in work.choices() if work.idle + choice.total <= (budget or 0))
    choice = next(fitting, None)
    return None if choice is None else _plan(work, choice.micro, _NOTHING, budget)


def _with_micro(work: Workload, micro: Sequence[int], budget: int | None) -> Plan | None:
    """The best plan that fits with these micro-batches, None where none does."""
    plans = (_plan(work, micro, mode, budget) for mode in (_ALL, _STATES, _NOTHING))
    return next((plan for plan in plans if budget is None or plan.peak_bytes <= budget), None)


def _plan(work: Workload, micro: Sequence[int], mode: _Mode, budget: int | None) -> Plan:
    """The plan with these micro-batches, whether it fits or not."""
    graphs = work.graph_bytes(micro, every=mode.graphs)
    arena = work.arena(micro)
    resident: frozenset[int] = frozenset()
    if mode.states:
        resident = frozenset(range(len(work.needs)))
    elif budget is not None:
        resident = work.resident(micro, graphs, budget - work.idle - arena.total)
    loaded = work.graphs_beside(micro, None if mode.graphs else graphs)
    blocks = _blocks(work, micro, resident, loaded, table_bytes(arena.region))
    peak = work.idle + arena.total + work.beside(micro, graphs, resident)
    return Plan(
        batch=work.batch,
        schedule=work.schedule,
        budget_bytes=budget,
        idle_bytes=work.idle,
        graphs_bytes=None if mode.graphs else graphs,
        blocks=blocks,
        arena_bytes=arena.total,
        region_bytes=arena.region,
        peak_bytes=peak,
    )


def _blocks(
    work: Workload, micro: Sequence[int], resident: frozenset[int], loaded: Sequence[int], table: int
) -> tuple[BlockPlan, ...]:
    batch = work.batch
    kept = _sum(work.needs[i].state for i in resident)
    frozen, blocks = 0, []
    for index, (needs, size) in enumerate(zip(work.needs, micro, strict=True)):
        way = work.way(needs, size)
        touched = max(way.arena(size).touched, frozen)
        if work.schedule == "sequential":
            frozen = max(frozen, needs.forward_arena(batch).touched)
        peak = way.model.peak(size)
        inside = {"activations": peak.activations.at(size), "gradients": peak.gradients.at(size)}
        # The rest of the arena is what kernels need and what lies waste between values.
        inside["workspace"] = touched - sum(inside.values())
        ends = {"input": needs.input.at(batch), "output": needs.output.at(batch)}
        own = {} if index in resident else needs.state
        # The region is that of the graph that needs the largest, and so is its table, whichever block works.
        around = {"runtime": work.runtime + loaded[index] + table, "pipeline": work.pipeline.resident}
        predicted = _sum((kept, own, way.written, inside, ends, around))
        blocks.append(
            BlockPlan(needs.spec.name, size, -(-batch // size), index in resident, predicted, touched + table)
        )
    return tuple(blocks)


def _sum(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Bytes by kind, of every kind."""
    total = dict.fromkeys(KINDS, 0)
    for part in parts:
        for kind, size in part.items():
            total[kind] += size
    return total


def _refusal(work: Workload, budget: int) -> str:
    """Why nothing fits, and what would."""
    plan = _tightest(work)
    worst = max(plan.blocks, key=lambda b: b.total)
    others = plan.peak_bytes - work.idle - worst.total
    parts = f"{size_up(work.idle)} idle, {size_up(worst.total)} for the block"
    advice = "lower --batch, or export more blocks"
    if others:
        parts += f", {size_up(others)} more {_what_else(work)}"
        advice = "lower --batch"
    fitting = work.largest_batch(budget)
    # Of very large batches not all were tried.
    which = "the largest" if work.batch - 1 <= ALL_TRIED else "a"
    fits = f"{which} --batch that fits is {fitting}" if fitting else "not even a batch of one sample fits"
    if work.idle >= budget:
        fits += ", as the process takes more before it has loaded anything"
    at_once = "the whole batch" if worst.accumulation == 1 else f"{worst.micro_batch} of {work.batch} samples"
    return (
        f"the process needs {size_up(plan.peak_bytes)} while block {worst.name} trains {at_once} at a time ({parts}), "
        f"the budget is {format_size(budget)}; {fits}, and the smallest budget for this batch is "
        f"{size_up(plan.peak_bytes)} ({plan.peak_bytes} bytes); raise --memory-budget, {advice}"
    )


def _what_else(work: Workload) -> str:
    """What takes the memory that no block at work does."""
    validating = ["to validate with the whole batch"] * work.validates
    frozen = ["to pass the whole batch through frozen blocks"] * (work.schedule == "sequential")
    return " or ".join(["to make a batch", *validating, *frozen])


def _tightest(work: Workload) -> Plan:
    """The plan that needs least."""
    least = min(work.choices(), key=lambda choice: choice.total)
    return _plan(work, least.micro, _NOTHING, None)
