"""`export --memory-budget`: the partition that fits the budget with the least compute, and where it stands.

The working set of a block is learned as the device will have it: its step graph is written, made lean, and its memory
added up (parameters, new values, arena, batch, output, the loaded graph). The search (`edgelocal.exporters.search`)
asks for few of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from edgelocal.budget import format_size
from edgelocal.errors import BudgetError
from edgelocal.exporters.macs import Counter
from edgelocal.exporters.memory.optimise import optimise
from edgelocal.exporters.onnx_step import step_graph
from edgelocal.exporters.partition import per_unit
from edgelocal.exporters.request import ExportRequest
from edgelocal.exporters.rules import LocalBlock, build_blocks
from edgelocal.exporters.search import Found, frontier, search
from edgelocal.exporters.search_costs import make_problem
from edgelocal.exporters.search_problem import Candidate, Problem
from edgelocal.exporters.units import Network, output_shapes
from edgelocal.needs import loaded_bytes, tensor_bytes
from edgelocal.peaks import RUNTIME_BYTES
from edgelocal.profiles import idle_process_bytes
from edgelocal.spec import FrontierSpec, GraphSpec, MemorySpec, RuleSpec

IDLE_BYTES = idle_process_bytes(560 << 10)  # of the device, with the manifest of some 20 blocks
THREADS = 4  # of the device, for the size of a loaded graph

Say = Callable[[str], None]


@dataclass(frozen=True)
class Fit:
    """What the search chose: cuts, depths of the auxiliaries (None: as the rule has them), and the trade-off."""

    cut: tuple[range, ...]
    depths: tuple[int, ...] | None
    frontier: tuple[FrontierSpec, ...]


def fit(network: Network, request: ExportRequest, budget_bytes: int, say: Say) -> Fit:
    """The partition of least training compute whose every block fits `budget_bytes`, the device's process included.

    Raises:
        BudgetError: none fits; the message gives the smallest budget that would do.
        ExportError: a block cannot be exported.
    """
    limit = budget_bytes - IDLE_BYTES
    counter = Counter()
    learner = _Learner(network, request, say)
    problem = make_problem(network, request.rule, request.defaults.batch, counter)
    found = search(problem, learner.truth(request.rule), limit)
    if found.largest > limit:
        raise BudgetError(
            f"no partition of {network.name} fits {format_size(budget_bytes)} with batches of "
            f"{request.defaults.batch}: the smallest budget that would do is {format_size(found.largest + IDLE_BYTES)} "
            f"({found.largest + IDLE_BYTES} bytes, {format_size(IDLE_BYTES)} of it the idle process); raise "
            "--memory-budget, lower --batch, --aux-depth or --aux-depth-min, or let the device use micro-batches "
            "(export with --blocks per-unit)"
        )
    say(f"{len(found.blocks)} blocks chosen after looking at {found.asked}")
    if not request.frontier:
        return Fit(found.cut, found.depths, ())
    say("now the trade-off around them")
    points = frontier(problem, learner.truth(request.rule), found.known)
    return Fit(found.cut, found.depths, (*_partitions(points, found), *learner.comparisons(problem, found, counter)))


def _partitions(points: tuple[Found, ...], chosen: Found) -> list[FrontierSpec]:
    """The trade-off, the chosen partition among it."""
    own = FrontierSpec("partition", len(chosen.blocks), chosen.largest, chosen.macs, True)
    others = [FrontierSpec("partition", len(p.blocks), p.largest, p.macs, False) for p in points]
    distinct = [p for p in others if replace(p, chosen=True) != own]
    return sorted([own, *distinct], key=lambda p: p.working_set_bytes)


class _Learner:
    """Finds the working sets of blocks, each once."""

    def __init__(self, network: Network, request: ExportRequest, say: Say) -> None:
        self._network = network
        self._request = request
        self._say = say
        self._shapes = [
            network.input_shape,
            *output_shapes([u.module for u in network.units], network.input_shape, network.name, network.input_dtype),
        ]
        self._known: dict[tuple[str, Candidate], int] = {}

    def truth(self, rule: RuleSpec) -> Callable[[Candidate], int]:
        """The working set in bytes of a block under `rule`, with the request's batch."""

        def learn(candidate: Candidate) -> int:
            key = rule.name, candidate
            if key not in self._known:
                names = [unit.name for unit in self._network.units[candidate.start : candidate.stop]]
                size = self._measure(rule, candidate)
                self._known[key] = size
                depth = f" with {candidate.depth} auxiliary layers" if candidate.depth else ""
                ends = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
                self._say(f"{rule.name} block {ends}{depth}: {format_size(size)}")
            return self._known[key]

        return learn

    def comparisons(self, problem: Problem, chosen: Found, counter: Counter) -> list[FrontierSpec]:
        """Where plain back-propagation, its best checkpointing, blocks of one unit and linear classifiers stand."""
        request, units = self._request, len(self._network.units)
        batch = request.defaults.batch
        plain = replace(request.rule, name="bp")
        whole = make_problem(self._network, plain, batch, counter)
        all_units = Candidate(0, units, None)
        bp = FrontierSpec("bp", 1, self.truth(plain)(all_units), int(whole.macs[whole.cell(all_units)]), False)
        points = [bp, self._checkpointed(bp, whole)]
        if request.rule.name != "bp":
            points.append(self._per_unit("per-unit", request.rule, problem))
        if request.rule.name != "linear":
            linear = replace(request.rule, name="linear")
            points.append(self._per_unit("linear", linear, make_problem(self._network, linear, batch, counter)))
        return points

    def _per_unit(self, kind: str, rule: RuleSpec, problem: Problem) -> FrontierSpec:
        """Blocks of one unit, with the auxiliary depths of the rule."""
        cut = per_unit(problem.units, problem.least)
        wanted = problem.wanted[len(cut) - 1]
        ends = [*wanted, None]  # the last block has no auxiliary
        blocks = [Candidate(span.start, span.stop, depth) for span, depth in zip(cut, ends, strict=True)]
        kinds: dict[int, int] = {}
        for block in blocks:
            kinds.setdefault(int(problem.kinds[problem.cell(block)]), 0)
        learn = self.truth(rule)
        for block in blocks:
            number = int(problem.kinds[problem.cell(block)])
            kinds[number] = kinds[number] or learn(block)
        macs = sum(int(problem.macs[problem.cell(block)]) for block in blocks)
        return FrontierSpec(kind, len(blocks), max(kinds.values()), macs, False)

    def _checkpointed(self, bp: FrontierSpec, problem: Problem) -> FrontierSpec:
        """Back-propagation that keeps the ends of K equal segments and computes each again (an estimate).

        Memory shrinks as what is kept for the backward does, to the segments' ends and the largest segment; compute
        grows by the forward pass of all segments but the last (Chen et al. 2016).
        """
        units = problem.units
        whole = float(problem.proxy[problem.cell(Candidate(0, units, None))])
        batch = self._request.defaults.batch
        best = (bp.working_set_bytes, bp.training_macs)
        for segments in range(2, units + 1):
            ends = [round(units * k / segments) for k in range(segments + 1)]
            spans = [(a, b) for a, b in pairwise(ends) if a < b]
            held = [float(problem.proxy[0, a, b]) for a, b in spans]
            borders = sum(4 * batch * math.prod(self._shapes[a]) for a, _ in spans[1:])
            memory = int(bp.working_set_bytes * min(1.0, (borders + max(held)) / whole))
            again = sum(int(problem.macs[0, a, b]) for a, b in spans[:-1]) // 3
            best = min(best, (memory, bp.training_macs + again))
        return FrontierSpec("checkpointing", 1, best[0], best[1], False)

    def _measure(self, rule: RuleSpec, candidate: Candidate) -> int:
        block = self._block(rule, candidate)
        request = self._request
        dtype = self._network.input_dtype if candidate.start == 0 else torch.float32
        step = step_graph(block, request.task, request.optimizer, self._shapes[candidate.start], dtype)
        lean = optimise(step, request.defaults.batch)
        spec = GraphSpec("", step.inputs, step.outputs, lean.structure, lean.in_place, len(lean.model.graph.node))
        return working_set(spec, lean.memory, request.defaults.batch)

    def _block(self, rule: RuleSpec, candidate: Candidate) -> LocalBlock:
        """The block alone, cut out of the network; what is before and behind it does not matter."""
        units = len(self._network.units)
        spans = [range(candidate.start), range(candidate.start, candidate.stop), range(candidate.stop, units)]
        cut = tuple(span for span in spans if span)
        depths = tuple(candidate.depth or 1 for _ in cut[:-1]) if candidate.depth is not None else None
        if candidate.depth is None and len(cut) > 1 and rule.name == "auglocal":
            depths = (1,) * (len(cut) - 1)
        return build_blocks(self._network, rule, cut, self._request.seed, depths)[cut.index(spans[1])]


def working_set(spec: GraphSpec, memory: MemorySpec, batch: int) -> int:
    """Bytes above the idle process while the step runs on a whole batch and nothing else is loaded."""
    overwriting = spec.overwriting
    tensors = [t for t in (*spec.inputs, *spec.outputs) if t.name not in overwriting]
    outside = sum(tensor_bytes(t, batch) for t in tensors)
    return RUNTIME_BYTES + loaded_bytes(spec, THREADS) + outside + memory.arena_bytes(batch)
