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

from edgelocal.bundle.memory_spec import table_bytes
from edgelocal.bundle.spec import Manifest
from edgelocal.errors import BudgetError
from edgelocal.memory.peaks import Workload
from edgelocal.memory.planned import BlockPlan, DevicePlan, Plan
from edgelocal.memory.refusal import device_refusal, refusal

_IDLE_STEP, _IDLE_NOISE = 1 << 20, 128 << 10  # equal processes differ by 4 to 120 KiB

KINDS = (
    *("parameters", "optimizer", "buffers", "gradients", "activations", "workspace"),
    *("input", "output", "runtime", "pipeline"),
)


def has_model(manifest: Manifest) -> bool:
    """Whether the bundle says what it needs (those of schema 1 do not)."""
    return all(b.memory is not None and b.accumulation is not None for b in manifest.blocks)


@dataclass(frozen=True)
class Thresholds:
    """The smallest budgets, in bytes, from which on: everything is kept; only graphs are given up; only graphs and
    states; and the smallest that trains at all. None where the device is too small for it with any budget."""

    everything: int | None
    states: int | None
    batch: int | None
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
        raise BudgetError(_refusal(work.anywhere, budget_bytes))
    return plan


def make_thresholds(work: Workload) -> Thresholds:
    """The budgets at which the plan gives something up, in every start of the process."""
    work = work.anywhere
    plans = (_plan(work, work.uncut, mode, None, tight=True) for mode in (_ALL, _STATES, _NOTHING))
    kept, fewer, paged = (plan.peak_bytes if _device_holds(work, plan) else None for plan in plans)
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
    paging: str = "disk"  # where the others wait


_ALL, _STATES, _NOTHING = _Mode(True, True), _Mode(False, True), _Mode(False, False)
# Beside a device with memory of its own. To drop graphs, which are on the host, makes no room there.
_ON_HOST = (_Mode(True, False, "host"), _Mode(False, False, "host"))


def _modes(work: Workload) -> tuple[_Mode, ...]:
    """From the one that gives up least on."""
    own_memory = work.device is not None and not work.device.shared
    return (_ALL, _STATES, *(_ON_HOST if own_memory else ()), _NOTHING)


def _least_given_up(work: Workload, budget: int | None) -> Plan | None:
    """The best plan that fits, None where none does."""
    for mode in (_ALL, _STATES):
        plan = _plan(work, work.uncut, mode, budget)
        if _fits(work, plan):
            return plan
    choice = next((choice for choice in work.choices() if work.holds(choice, budget)), None)
    return None if choice is None else _with_micro(work, choice.micro, budget)


def _with_micro(work: Workload, micro: Sequence[int], budget: int | None) -> Plan | None:
    """The best plan that fits with these micro-batches, None where none does."""
    plans = (_plan(work, micro, mode, budget) for mode in _modes(work))
    return next((plan for plan in plans if _fits(work, plan)), None)


def _fits(work: Workload, plan: Plan) -> bool:
    """Whether the process fits its budget, and its part on a device what that has."""
    within = plan.budget_bytes is None or plan.peak_bytes <= plan.budget_bytes
    return within and _device_holds(work, plan)


def _device_holds(work: Workload, plan: Plan) -> bool:
    """Whether the part on a device is no more than that has, and what lies beside it no more than the host has."""
    if work.device is None or plan.device is None:
        return True
    most, host = work.device.most, work.device.host
    within = most is None or plan.device.peak <= most
    return within and (host is None or plan.peak_bytes - plan.device.peak <= host)


def _plan(work: Workload, micro: Sequence[int], mode: _Mode, budget: int | None, *, tight: bool = False) -> Plan:
    """The plan with these micro-batches, whether it fits or not; `tight` with nothing kept that the mode gives up."""
    graphs = work.graph_bytes(micro, every=mode.graphs)
    arena = work.arena(micro)
    resident: frozenset[int] = frozenset()
    if mode.states:
        resident = frozenset(range(len(work.needs)))
    elif not tight:
        bounded = budget is not None and mode.paging == "disk"  # states on the host count there
        resident = work.resident(micro, graphs, (budget or 0) - work.idle - arena.total if bounded else None)
    loaded = work.graphs_beside(micro, None if mode.graphs else graphs)
    blocks = _blocks(work, micro, resident, loaded, table_bytes(arena.region))
    beside = work.beside(micro, graphs, resident)
    peak = work.idle + arena.total + beside
    device = None
    if work.device is not None:
        there = work.on_device(micro, arena, beside, graphs)
        if mode.paging == "host":
            peak += sum(n.state_bytes for i, n in enumerate(work.needs) if i not in resident)
        device = _device_plan(work, there, None if budget is None else budget - peak, mode.paging)
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
        device=device,
    )


def _device_plan(work: Workload, peak: int, spare: int | None, paging: str) -> DevicePlan:
    """The part on a device; `spare` is what the budget leaves, None without one."""
    device = work.device
    assert device is not None, "there is one"
    left = [room for room in (spare, None if device.most is None else device.most - peak) if room is not None]
    limit = peak - device.context - work.handles + max(0, min(left)) if left else None
    return DevicePlan(peak, device.context, work.handles, device.workspace, limit, paging)


def _blocks(
    work: Workload, micro: Sequence[int], resident: frozenset[int], loaded: Sequence[int], table: int
) -> tuple[BlockPlan, ...]:
    batch = work.batch
    kept = _sum(work.needs[i].state for i in resident)
    frozen, blocks = 0, []
    for index, (needs, size) in enumerate(zip(work.needs, micro, strict=True)):
        way = work.way(needs, size)
        touched = max(work.taken(way.arena(size)).touched, frozen)
        if work.schedule == "sequential":
            frozen = max(frozen, work.taken(needs.forward_arena(batch)).touched)
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


def _refusal(work: Workload, budget: int | None) -> str:
    """Why nothing fits: the device, or the budget, is too small."""
    plan = _tightest(work)
    most = None if work.device is None else work.device.most
    if most is not None and not _device_holds(work, plan):
        return device_refusal(plan, most)
    assert budget is not None, "else everything is kept"
    return refusal(work, plan, budget)


def _tightest(work: Workload) -> Plan:
    """The plan that needs least."""
    least = min(work.possible(), key=lambda choice: choice.total)
    return _plan(work, least.micro, _NOTHING, None, tight=True)
