"""`export --memory-budget`: the partition that fits the budget with the least compute, and where it stands.

The working set of a block is learned as the device will have it: its step graph is written, made lean, and its memory
added up by the device's own arithmetic (the module `trial`). The search (`search`) asks for few of them. What the
process needs besides its largest block (data, validation, a manifest that grows with the number of blocks) is known
only of a whole partition, so the search is repeated with less for the blocks until all fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from edgelocal.bundle.spec import BlockSpec, FrontierSpec, RuleSpec
from edgelocal.errors import BudgetError
from edgelocal.exporters.macs import Counter
from edgelocal.exporters.partition import per_unit
from edgelocal.exporters.request import ExportRequest
from edgelocal.exporters.rules import LocalBlock, build_blocks
from edgelocal.exporters.search.comparison import checkpointed
from edgelocal.exporters.search.costs import make_problem
from edgelocal.exporters.search.problem import Candidate, Problem
from edgelocal.exporters.search.search import Found, frontier, search
from edgelocal.exporters.search.trial import (
    arena_parts,
    partition_point,
    trial_block,
    whole_batch_budget,
    working_set,
)
from edgelocal.exporters.units import Network, output_shapes
from edgelocal.machine.budget import format_size
from edgelocal.machine.profiles import ASSUMED_SAMPLES, idle_process_bytes

_STEP = 64 << 10  # bytes: a named budget is a multiple, since it is part of the manifest, whose length counts too

Say = Callable[[str], None]


@dataclass(frozen=True)
class Fit:
    """What the search chose: cuts, depths of the auxiliaries (None: as the rule has them), and what it stands beside
    (empty: nothing was asked for)."""

    cut: tuple[range, ...]
    depths: tuple[int, ...] | None
    others: tuple[FrontierSpec, ...]


def fit(network: Network, request: ExportRequest, budget_bytes: int, say: Say) -> Fit:
    """The partition that fits `budget_bytes`, the device's process included, and gives up the least auxiliary depth;
    of these the one of the least training compute.

    It fits if `edgelocal plan` keeps the batch whole. Shallower auxiliary networks than the rule wants are taken only
    where a block would not fit otherwise (edgelocal/exporters/search/search.py).

    Raises:
        BudgetError: none fits; the message gives the smallest budget that would do.
        ExportError: a block cannot be exported.
    """
    counter = Counter()
    learner = _Learner(network, request, say)
    problem = make_problem(network, request.rule, request.defaults.batch, counter)
    found, least = _within(budget_bytes, problem, learner)
    if least > budget_bytes:
        least = -(-(least + _STEP // 4) // _STEP) * _STEP
        idle = least - found.largest
        raise BudgetError(
            f"no partition of {network.name} fits {format_size(budget_bytes)} with batches of "
            f"{request.defaults.batch}: the smallest budget that would do is {format_size(least)} "
            f"({least} bytes, {format_size(idle)} of it the idle process and the data, for up to "
            f"{ASSUMED_SAMPLES:,} samples); raise --memory-budget, lower --batch (train takes a larger one in "
            "micro-batches), --aux-depth or --aux-depth-min, or export with --blocks per-unit"
        )
    say(f"{len(found.blocks)} blocks chosen after looking at {len(found.known)}")
    if not request.frontier:
        return Fit(found.cut, found.depths, ())
    say("now the trade-off around them")
    points = frontier(problem, learner.truth(request.rule), found.known)
    partitions = [learner.point("partition", request.rule, problem, p.blocks) for p in points]
    return Fit(found.cut, found.depths, (*partitions, *learner.comparisons(problem, counter)))


def _within(budget_bytes: int, problem: Problem, learner: _Learner) -> tuple[Found, int]:
    """The best partition that needs at most the budget, or else the one whose largest block is as small as can be; and
    the smallest budget for it."""
    rule = learner.request.rule
    limit = budget_bytes - idle_process_bytes(0)
    known: dict[Candidate, int] = {}
    while True:
        found = search(problem, learner.truth(rule), limit, known)
        least = whole_batch_budget(learner.blocks(rule, problem, found.blocks), learner.request)
        if least <= budget_bytes or found.largest > limit:
            return found, least
        limit, known = budget_bytes - (least - found.largest), dict(found.known)


class _Learner:
    """Finds what blocks need, each once."""

    def __init__(self, network: Network, request: ExportRequest, say: Say) -> None:
        self.request = request
        self._network = network
        self._say = say
        self._shapes = [
            network.input_shape,
            *output_shapes([u.module for u in network.units], network.input_shape, network.name, network.input_dtype),
        ]
        weights = (weight for unit in network.units for weight in unit.module.parameters())
        self._convolves = any(weight.dim() >= 3 for weight in weights)
        self._known: dict[tuple[str, Candidate], BlockSpec] = {}

    def truth(self, rule: RuleSpec) -> Callable[[Candidate], int]:
        """The working set in bytes of a block under `rule`, with the request's batch."""
        return lambda candidate: self._size(self._learn(rule, candidate))

    def blocks(self, rule: RuleSpec, problem: Problem, candidates: Sequence[Candidate]) -> list[BlockSpec]:
        """What blocks need; those of one kind need the same."""
        kinds = {
            int(problem.kinds[problem.cell(c)]): spec for (name, c), spec in self._known.items() if name == rule.name
        }
        found = []
        for candidate in candidates:
            kind = int(problem.kinds[problem.cell(candidate)])
            if kind not in kinds:
                kinds[kind] = self._learn(rule, candidate)
            found.append(kinds[kind])
        return found

    def point(self, kind: str, rule: RuleSpec, problem: Problem, blocks: Sequence[Candidate]) -> FrontierSpec:
        """A partition in the trade-off."""
        macs = sum(int(problem.macs[problem.cell(block)]) for block in blocks)
        return partition_point(kind, self.blocks(rule, problem, blocks), macs, self.request.defaults.batch)

    def comparisons(self, problem: Problem, counter: Counter) -> list[FrontierSpec]:
        """Where plain back-propagation, its best checkpointing, blocks of one unit and linear classifiers stand."""
        request, batch = self.request, self.request.defaults.batch
        plain, linear = (replace(request.rule, name=name) for name in ("bp", "linear"))
        whole = make_problem(self._network, plain, batch, counter)
        all_units = [Candidate(0, len(self._network.units), None)]
        bp = self.point("bp", plain, whole, all_units)
        growing = arena_parts(self.blocks(plain, whole, all_units)[0], batch)[1]
        points = [bp, checkpointed(bp, growing, whole, self._network)]
        if request.rule.name != "bp":
            points.append(self.point("per-unit", request.rule, problem, _single_units(problem)))
        if request.rule.name != "linear":
            lines = make_problem(self._network, linear, batch, counter)
            points.append(self.point("linear", linear, lines, _single_units(lines)))
        return points

    def _learn(self, rule: RuleSpec, candidate: Candidate) -> BlockSpec:
        key = rule.name, candidate
        if key not in self._known:
            dtype = self._network.input_dtype if candidate.start == 0 else torch.float32
            block = self._block(rule, candidate)
            self._known[key] = trial_block(block, self.request, self._shapes[candidate.start], dtype)
            size = format_size(self._size(self._known[key]))
            names = [unit.name for unit in self._network.units[candidate.start : candidate.stop]]
            depth = f" with {candidate.depth} auxiliary layers" if candidate.depth else ""
            ends = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            self._say(f"{rule.name} block {ends}{depth}: {size}")
        return self._known[key]

    def _size(self, spec: BlockSpec) -> int:
        return working_set(spec, self.request.defaults.batch, self._convolves)

    def _block(self, rule: RuleSpec, candidate: Candidate) -> LocalBlock:
        """The block alone, cut out of the network; what is before and behind it does not matter."""
        units = len(self._network.units)
        spans = [range(candidate.start), range(candidate.start, candidate.stop), range(candidate.stop, units)]
        cut = tuple(span for span in spans if span)
        depths = tuple(candidate.depth or 1 for _ in cut[:-1]) if candidate.depth is not None else None
        if candidate.depth is None and len(cut) > 1 and rule.name == "auglocal":
            depths = (1,) * (len(cut) - 1)
        return build_blocks(self._network, rule, cut, self.request.seed, depths)[cut.index(spans[1])]


def _single_units(problem: Problem) -> list[Candidate]:
    """Blocks of one unit, with the auxiliary depths of the rule."""
    cut = per_unit(problem.units, problem.least)
    ends = [*problem.wanted[len(cut) - 1], None]  # the last block has no auxiliary
    return [Candidate(span.start, span.stop, depth) for span, depth in zip(cut, ends, strict=True)]
