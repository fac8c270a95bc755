"""bundle + budget + device -> Plan: arithmetic on the manifest's memory model, no graph is loaded.

What a process holds while block b works, above the idle process:

    state       parameters, optimizer slots and buffers: of all blocks, or of b alone where they are paged
    copies      what a step writes anew beside them (parameters that are still read, sums of gradients)
    graphs      loaded graphs, of all blocks (equal structures once) or the largest alone
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

from edgelocal.budget import format_size
from edgelocal.errors import BudgetError
from edgelocal.needs import block_needs
from edgelocal.peaks import ALL_TRIED, RUNTIME_BYTES, Network, Pipeline, PipelineBytes
from edgelocal.spec import ARENA_TABLE, Manifest, table_bytes

__all__ = [
    "RUNTIME_BYTES",
    "BlockPlan",
    "PipelineBytes",
    "Plan",
    "Thresholds",
    "has_model",
    "make_plan",
    "make_thresholds",
    "steady_idle",
]

_IDLE_STEP, _IDLE_SLACK = 1 << 20, 128 << 10  # equal processes differ by 4 to 120 KiB

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


def make_plan(
    manifest: Manifest,
    *,
    batch: int,
    schedule: str,
    idle_bytes: int,
    pipeline: Pipeline,
    budget_bytes: int | None,
    validates: bool,
    micro_batch: int | None = None,
    wanted: Sequence[int] | None = None,
    threads: int = 1,
) -> Plan:
    """The plan that gives up least; where `wanted` fits, the one of those with these micro-batches.

    Args:
        micro_batch: an upper bound for all blocks.
        wanted: a micro-batch for each block, lowered to what the bound and the batch allow.
        validates: whether the run also passes samples through the whole network.
        threads: of each loaded graph.

    Raises:
        BudgetError: no plan fits; the message names the block, what it needs and the smallest budget that would do.
    """
    network = _network(manifest, batch, schedule, idle_bytes, pipeline, validates, micro_batch, threads)
    plan = None
    if wanted is not None and len(wanted) == len(network.needs):
        plan = _with_micro(network, [min(size, network.most) for size in wanted], budget_bytes)
    plan = plan or _least_given_up(network, budget_bytes)
    if plan is None:
        assert budget_bytes is not None, "without a budget everything is kept"
        raise BudgetError(_refusal(network, budget_bytes))
    return plan


def steady_idle(measured_bytes: int) -> int:
    """What counts as the idle process of `measured_bytes`: whole MiB, at least 128 KiB more than was measured. So plans
    and thresholds are the same in every start, but where the noise lies just at a step."""
    return -(-(measured_bytes + _IDLE_SLACK) // _IDLE_STEP) * _IDLE_STEP


def make_thresholds(
    manifest: Manifest,
    *,
    batch: int,
    schedule: str,
    idle_bytes: int,
    pipeline: Pipeline,
    validates: bool,
    micro_batch: int | None = None,
    threads: int = 1,
) -> Thresholds:
    """The budgets at which the plan gives something up; arguments as of `make_plan`."""
    network = _network(manifest, batch, schedule, idle_bytes, pipeline, validates, micro_batch, threads)
    kept, fewer, paged = (_plan(network, network.uncut, mode, None).peak_bytes for mode in (_ALL, _STATES, _NOTHING))
    return Thresholds(kept, fewer, paged, network.least)


@dataclass(frozen=True)
class _Mode:
    graphs: bool  # all graphs stay loaded
    states: bool  # all states stay in memory


_ALL, _STATES, _NOTHING = _Mode(True, True), _Mode(False, True), _Mode(False, False)


def _network(
    manifest: Manifest,
    batch: int,
    schedule: str,
    idle: int,
    pipeline: Pipeline,
    validates: bool,
    micro_batch: int | None,
    threads: int,
) -> Network:
    needs = tuple(block_needs(block) for block in manifest.blocks)
    most = min(batch, micro_batch or batch)

    def pipeline_at(samples: int) -> PipelineBytes:
        return pipeline(samples) if callable(pipeline) else pipeline

    return Network(needs, batch, most, schedule, idle, pipeline_at, validates, threads)


def _least_given_up(network: Network, budget: int | None) -> Plan | None:
    """The best plan that fits, None where none does."""
    for mode in (_ALL, _STATES):
        plan = _plan(network, network.uncut, mode, budget)
        if budget is None or plan.peak_bytes <= budget:
            return plan
    fitting = (choice for choice in network.choices() if network.idle + choice.total <= (budget or 0))
    choice = next(fitting, None)
    return None if choice is None else _plan(network, choice.micro, _NOTHING, budget)


def _with_micro(network: Network, micro: Sequence[int], budget: int | None) -> Plan | None:
    """The best plan that fits with these micro-batches, None where none does."""
    plans = (_plan(network, micro, mode, budget) for mode in (_ALL, _STATES, _NOTHING))
    return next((plan for plan in plans if budget is None or plan.peak_bytes <= budget), None)


def _plan(network: Network, micro: Sequence[int], mode: _Mode, budget: int | None) -> Plan:
    """The plan with these micro-batches, whether it fits or not."""
    graphs = network.graph_bytes(micro, every=mode.graphs)
    arena = network.arena(micro)
    resident: frozenset[int] = frozenset()
    if mode.states:
        resident = frozenset(range(len(network.needs)))
    elif budget is not None:
        resident = network.resident(micro, graphs, budget - network.idle - arena.total)
    blocks = _blocks(network, micro, resident, graphs, table_bytes(arena.region))
    peak = network.idle + arena.total + network.beside(micro, graphs, resident)
    return Plan(
        batch=network.batch,
        schedule=network.schedule,
        budget_bytes=budget,
        idle_bytes=network.idle,
        graphs_bytes=None if mode.graphs else graphs,
        blocks=blocks,
        arena_bytes=arena.total,
        region_bytes=arena.region,
        peak_bytes=peak,
    )


def _blocks(
    network: Network, micro: Sequence[int], resident: frozenset[int], graphs: int, table: int
) -> tuple[BlockPlan, ...]:
    batch = network.batch
    kept = _sum(network.needs[i].state for i in resident)
    # The region is that of the graph that needs the largest, and so is its table, whichever block works.
    runtime = {"runtime": RUNTIME_BYTES + graphs + table, "pipeline": network.pipeline.resident}
    frozen, blocks = 0, []
    for index, (needs, size) in enumerate(zip(network.needs, micro, strict=True)):
        way = network.way(needs, size)
        touched = max(way.arena(size).touched, frozen)
        if network.schedule == "sequential":
            frozen = max(frozen, needs.forward_arena(batch).touched)
        peak = way.model.peak(size)
        inside = {"activations": peak.activations.at(size), "gradients": peak.gradients.at(size)}
        # The rest of the arena is what kernels need and what lies waste between values.
        inside["workspace"] = touched - sum(inside.values())
        ends = {"input": needs.input.at(batch), "output": needs.output.at(batch)}
        own = {} if index in resident else needs.state
        predicted = _sum((kept, own, way.written, inside, ends, runtime))
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


def _refusal(network: Network, budget: int) -> str:
    """Why nothing fits, and what would."""
    least = min(network.choices(), key=lambda choice: choice.total)
    plan = _plan(network, least.micro, _NOTHING, None)
    worst = max(plan.blocks, key=lambda b: b.total)
    need = network.idle + worst.total
    apart = f"{format_size(network.idle)} of it the idle process"
    if plan.peak_bytes > need:
        apart += f", and {format_size(plan.peak_bytes - need)} more to make a batch or pass it through the network"
    fitting = network.largest_batch(budget)
    # Of very large batches not all were tried.
    which = "the largest" if network.batch - 1 <= ALL_TRIED else "a"
    advice = f"{which} --batch that fits is {fitting}" if fitting else "not even a batch of one sample fits"
    at_once = "the whole batch" if worst.accumulation == 1 else f"{worst.micro_batch} of {network.batch} samples"
    return (
        f"block {worst.name} needs {format_size(need)} with {at_once} at a time ({apart}), the budget is "
        f"{format_size(budget)}; {advice}, and the smallest budget for this batch is {format_size(plan.peak_bytes)} "
        f"({plan.peak_bytes} bytes); raise --memory-budget, lower --batch, or export more blocks"
    )
