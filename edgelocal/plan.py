"""bundle + budget + device -> Plan: arithmetic on the manifest's memory model, no graph is loaded.

What a process holds while block b works, above the idle process:

    state       parameters, optimizer slots and buffers: of all blocks, or of b alone where they are paged
    copies      what a step writes anew beside them (parameters that are still read, sums of gradients)
    graphs      loaded graphs, of all blocks (equal structures once) or of as many as there is room for
    arena       activations, gradients, workspace: the memory model at the micro-batch
    in and out  the batch and the block's output for the next block
    data        what the data pipeline keeps

If not everything fits, the plan gives up, in this order: graphs that stay loaded, state that stays in memory, and last
the whole batch at once (micro-batches, whose gradients add up; exact but for batch statistics).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from edgelocal.budget import format_size
from edgelocal.errors import BudgetError
from edgelocal.spec import AccumulationSpec, BlockMemorySpec, BlockSpec, GraphSpec, Manifest, TensorSpec, graph_bytes

RUNTIME_BYTES = 8 << 20  # code and tables of the runtime that its first steps touch (measured, docs/memory.md)
ITEM_BYTES = {"float32": 4, "int64": 8, "bool": 1}
KINDS = (
    *("parameters", "optimizer", "buffers", "gradients", "activations", "workspace"),
    *("input", "output", "runtime", "pipeline"),
)


@dataclass(frozen=True)
class PipelineBytes:
    """What the data pipeline holds: all the time, and at most while a batch is made (without the batch itself)."""

    resident: int
    making: int


@dataclass(frozen=True)
class BlockPlan:
    """How one block trains. `predicted` are bytes by kind above the idle process while it works, `arena` those of them
    that the runtime's arena takes."""

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
    """What the runner does with the memory it has. `graphs_bytes` bounds the loaded graphs; None keeps all of them."""

    batch: int
    schedule: str
    budget_bytes: int | None
    idle_bytes: int
    graphs_bytes: int | None
    blocks: tuple[BlockPlan, ...]
    arena_bytes: int
    peak_bytes: int

    @property
    def arena_limit(self) -> int | None:
        """What the arena may take at most: the budget without everything else."""
        return None if self.budget_bytes is None else self.arena_bytes + self.budget_bytes - self.peak_bytes

    def halved(self) -> Plan | None:
        """The plan with every micro-batch halved; None where all are single samples."""
        if all(block.micro_batch == 1 for block in self.blocks):
            return None
        blocks = []
        for block in self.blocks:
            micro = -(-block.micro_batch // 2)
            blocks.append(replace(block, micro_batch=micro, accumulation=-(-self.batch // micro)))
        return replace(self, blocks=tuple(blocks))

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "batch": self.batch,
            "schedule": self.schedule,
            "budget_bytes": self.budget_bytes,
            "idle_bytes": self.idle_bytes,
            "arena_bytes": self.arena_bytes,
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


def make_plan(
    manifest: Manifest,
    *,
    batch: int,
    schedule: str,
    idle_bytes: int,
    pipeline: PipelineBytes,
    budget_bytes: int | None,
    validates: bool,
    micro_batch: int | None = None,
) -> Plan:
    """The plan that gives up least.

    Args:
        micro_batch: an upper bound for all blocks.
        validates: whether the run also passes samples through the whole network.

    Raises:
        BudgetError: no plan fits; the message names the block, what it needs and the smallest budget that would do.
    """
    most = min(batch, micro_batch or batch)
    maker = _Maker(manifest.blocks, batch, schedule, idle_bytes, pipeline, budget_bytes, validates)
    for mode in _MODES:
        plan = maker.plan(mode, [most] * len(manifest.blocks))
        if plan is not None:
            return plan
    micro = [_largest(partial(maker.fits, index), most) for index in range(len(manifest.blocks))]
    # Blocks that fit alone may not fit in what the arena of another leaves: then all give way together.
    for shrink in (1, 2, 4, 8, 16, 32, 64, most):
        plan = maker.plan(_TIGHT, [max(1, n // shrink) for n in micro])
        if plan is not None:
            return plan
    raise BudgetError(maker.refusal())


@dataclass(frozen=True)
class _Mode:
    graphs: bool  # all graphs stay loaded
    states: bool  # all states stay in memory


_TIGHT = _Mode(graphs=False, states=False)
_MODES = (_Mode(True, True), _Mode(False, True), _TIGHT)


@dataclass(frozen=True)
class _Maker:
    """The arithmetic for one network, batch and budget."""

    blocks: tuple[BlockSpec, ...]
    batch: int
    schedule: str
    idle: int
    pipeline: PipelineBytes
    budget: int | None
    validates: bool

    def plan(self, mode: _Mode, micro: Sequence[int]) -> Plan | None:
        """The plan of a mode, or None where it does not fit."""
        graphs = self._graph_bytes(mode, micro)
        resident = self._resident(mode, micro, graphs)
        blocks = tuple(self._block(i, n, resident, graphs) for i, n in enumerate(micro))
        arena = self._arena(blocks)
        # What the arena once touched stays: a batch is made, and a smaller block works, beside it.
        beside = max(max(b.total - b.arena for b in blocks), self._between(resident, graphs))
        peak = self.idle + arena + beside
        if self.budget is not None and peak > self.budget:
            return None
        kept = None if mode.graphs else graphs
        return Plan(self.batch, self.schedule, self.budget, self.idle, kept, blocks, arena, peak)

    def fits(self, index: int, micro: int) -> bool:
        """Whether a block fits with nothing else in memory."""
        graphs = self._graph_bytes(_TIGHT, [micro] * len(self.blocks))
        return self.budget is None or self.idle + self._block(index, micro, frozenset(), graphs).total <= self.budget

    def refusal(self) -> str:
        """Why nothing fits, and what would."""
        assert self.budget is not None
        singly = [1] * len(self.blocks)
        least = replace(self, budget=None).plan(_TIGHT, singly)
        assert least is not None, "without a budget everything fits"
        worst = max(least.blocks, key=lambda b: b.total)
        smaller = _largest(lambda n: replace(self, batch=n).plan(_TIGHT, singly) is not None, self.batch)
        advice = f"the largest --batch that fits is {smaller}" if smaller else "not even a single sample fits"
        return (
            f"block {worst.name} needs {format_size(self.idle + worst.total)} even if the batch of {self.batch} goes "
            f"through it sample by sample ({format_size(self.idle)} of it the idle process), the budget is "
            f"{format_size(self.budget)}; {advice}, and the smallest budget for this batch is "
            f"{format_size(least.peak_bytes)} ({least.peak_bytes} bytes); raise --memory-budget, or export more blocks"
        )

    def _resident(self, mode: _Mode, micro: Sequence[int], graphs: int) -> frozenset[int]:
        """Blocks whose state stays in memory: all, or the largest for which there is room beside the neediest block."""
        if mode.states:
            return frozenset(range(len(self.blocks)))
        if self.budget is None:
            return frozenset()
        blocks = tuple(self._block(i, n, frozenset(), graphs) for i, n in enumerate(micro))
        beside = max(max(b.total - b.arena for b in blocks), self._between(frozenset(), graphs))
        room = self.budget - self.idle - self._arena(blocks) - beside
        kept = set()
        for index in sorted(range(len(self.blocks)), key=lambda i: -_state_bytes(self.blocks[i])):
            if _state_bytes(self.blocks[index]) <= room:
                kept.add(index)
                room -= _state_bytes(self.blocks[index])
        return frozenset(kept)

    def _block(self, index: int, micro: int, resident: frozenset[int], graphs: int) -> BlockPlan:
        spec = self.blocks[index]
        memory, second = _model(spec)
        whole = micro >= self.batch
        model = memory.step if whole else memory.gradient
        arena = model.arena_bytes(micro) if whole else max(model.arena_bytes(micro), memory.apply.arena_bytes(1))
        if self.schedule == "sequential":
            arena = max(arena, *(_model(b)[0].forward.arena_bytes(self.batch) for b in self.blocks[:index]), 0)
        predicted = dict.fromkeys(KINDS, 0)
        for number in {index, *resident}:
            for tensor in self.blocks[number].state():
                predicted[_STATE[tensor.kind]] += _bytes(tensor)
        for tensor in _copies(spec.step if whole else second.gradient):
            predicted[_STATE[tensor.name.split("/")[1]]] += _bytes(tensor)
        if not whole:
            predicted["gradients"] += sum(_bytes(t) for t in second.gradient.inputs if t.kind == "acc")
        peak = model.peak(micro)
        predicted["activations"] += peak.activations.at(micro)
        predicted["gradients"] += peak.gradients.at(micro)
        # The rest of the arena is what kernels need and what lies waste between values.
        predicted["workspace"] += arena - peak.activations.at(micro) - peak.gradients.at(micro)
        predicted["input"] = sum(_bytes(t, self.batch) for t in spec.step.inputs if t.kind in ("", "rand"))
        predicted["output"] = _bytes(spec.step.outputs[0], self.batch)
        predicted["runtime"] = RUNTIME_BYTES + graphs
        predicted["pipeline"] = self.pipeline.resident
        return BlockPlan(
            spec.name, min(micro, self.batch), -(-self.batch // micro), index in resident, predicted, arena
        )

    def _between(self, resident: frozenset[int], graphs: int) -> int:
        """What is held, besides the arena, while a batch is made or passes through the network in inference mode."""
        states = sum(_state_bytes(self.blocks[i]) for i in resident)
        passing = 0
        if self.validates or self.schedule == "sequential":
            paged = [_state_bytes(b) for i, b in enumerate(self.blocks) if i not in resident]
            ends = [(b.forward.inputs[0], b.forward.outputs[0]) for b in self.blocks]
            passing = max(_bytes(x, self.batch) + _bytes(h, self.batch) for x, h in ends) + max(paged, default=0)
        making = self.pipeline.making + _bytes(self.blocks[0].step.inputs[0], self.batch)
        return states + RUNTIME_BYTES + graphs + self.pipeline.resident + max(making, passing)

    def _arena(self, blocks: Sequence[BlockPlan]) -> int:
        inference = 0
        if self.validates:
            models = [m for b in self.blocks for m in (_model(b)[0].forward, _model(b)[0].head) if m is not None]
            inference = max(m.arena_bytes(self.batch) for m in models)
        return max(inference, *(b.arena for b in blocks))

    def _graph_bytes(self, mode: _Mode, micro: Sequence[int]) -> int:
        """Bytes of the graphs that are loaded at once: all that the run uses, or the largest alone."""
        used: list[GraphSpec] = []
        for block, n in zip(self.blocks, micro, strict=True):
            second = _model(block)[1]
            used += [block.step] if n >= self.batch else [second.gradient, second.apply]
            if self.validates or self.schedule == "sequential":
                used += [block.forward, *([block.head] if block.head is not None else [])]
        sizes = {graph.structure or graph.file: graph_bytes(graph) for graph in used}
        return sum(sizes.values()) if mode.graphs else max(sizes.values())


_STATE = {"param": "parameters", "opt": "optimizer", "buf": "buffers"}


def _model(block: BlockSpec) -> tuple[BlockMemorySpec, AccumulationSpec]:
    assert block.memory is not None and block.accumulation is not None, "plans are for bundles with a memory model"
    return block.memory, block.accumulation


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest n of 1 .. most for which it holds, 0 if for none; it holds for all smaller ones."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _copies(graph: GraphSpec) -> list[TensorSpec]:
    """New values that a run writes beside the old ones."""
    safe = {f"new/{name}" for name in graph.in_place or ()}
    return [t for t in graph.outputs if t.name.startswith("new/") and t.name not in safe]


def _state_bytes(block: BlockSpec) -> int:
    return sum(_bytes(t) for t in block.state())


def _bytes(tensor: TensorSpec, batch: int = 1) -> int:
    return math.prod(tensor.resolve(batch)) * ITEM_BYTES[tensor.dtype]
