"""Where plain and checkpointed back-propagation stand beside exported blocks: estimates, made without tracing anything
that is not exported anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

from edgelocal.bundle.spec import BlockSpec, FrontierSpec
from edgelocal.exporters.macs import Counter
from edgelocal.exporters.partition import measure
from edgelocal.exporters.request import ExportRequest
from edgelocal.exporters.rules import find
from edgelocal.exporters.search.costs import make_problem
from edgelocal.exporters.search.problem import Candidate, Problem
from edgelocal.exporters.search.trial import THREADS, arena_parts
from edgelocal.exporters.units import Network, output_shapes
from edgelocal.memory.needs import block_needs, has_convolutions, loaded_bytes, runtime_bytes, tensor_bytes


def beside_bp(
    network: Network, request: ExportRequest, specs: Sequence[BlockSpec], chosen: FrontierSpec, counter: Counter
) -> list[FrontierSpec]:
    """Back-propagation in one block, and checkpointed. MACs are counted; one exported block is back-propagation itself,
    otherwise its working set is estimated.

    Raises:
        EdgelocalError: something in the network cannot be counted.
    """
    batch = request.defaults.batch
    problem = make_problem(network, replace(request.rule, name="bp"), batch, counter)
    if len(specs) == 1:
        bp, growing = replace(chosen, kind="bp", chosen=False), arena_parts(specs[0], batch)[1]
    else:
        growing = int(_kept(problem) * _ratio(network, request, specs))
        size = _fixed_bytes(specs, batch) + growing
        bp = FrontierSpec("bp", 1, size, _macs(problem), chosen=False, batch=batch, estimated=True)
    return [bp, checkpointed(bp, growing, problem, network)]


def checkpointed(bp: FrontierSpec, growing: int, problem: Problem, network: Network) -> FrontierSpec:
    """Back-propagation that keeps the ends of K equal segments and computes each again (an estimate).

    Of the working set of `bp` the part that grows with the batch, `growing` bytes, shrinks as what is kept for the
    backward does: to the segments' ends and the largest segment. Compute grows by the forward pass of all segments but
    the last (Chen et al. 2016). `problem` is that of rule bp.
    """
    units, macs = problem.units, _macs(problem)
    modules = [unit.module for unit in network.units]
    shapes = output_shapes(modules, network.input_shape, network.name, network.input_dtype)
    best = (bp.working_set_bytes, macs)
    for segments in range(2, units + 1):
        ends = [round(units * k / segments) for k in range(segments + 1)]
        held = max(float(problem.proxy[0, a, b]) for a, b in pairwise(ends))
        borders = sum(4 * bp.batch * math.prod(shapes[a - 1]) for a in ends[1:-1])
        share = min(1.0, (borders + held) / max(_kept(problem), 1))
        again = sum(int(problem.macs[0, a, b]) for a, b in pairwise(ends[:-1])) // 3
        best = min(best, (bp.working_set_bytes - int(growing * (1 - share)), macs + again))
    return replace(bp, kind="checkpointing", working_set_bytes=best[0], training_macs=best[1], estimated=True)


def _whole(problem: Problem) -> tuple[int, int, int]:
    return problem.cell(Candidate(0, problem.units, None))


def _macs(problem: Problem) -> int:
    return int(problem.macs[_whole(problem)])


def _kept(problem: Problem) -> float:
    """Bytes that eager PyTorch keeps of a batch for the backward."""
    return float(problem.proxy[_whole(problem)])


def _ratio(network: Network, request: ExportRequest, specs: Sequence[BlockSpec]) -> float:
    """What grows with the batch in an exported block beside what eager PyTorch would keep of it: the smallest ratio,
    because workspace counts for more in a small block than it would in the whole network."""
    rule, batch = request.rule, request.defaults.batch
    tail: Literal["merge", "all"] = "merge" if rule.tail == "merge" else "all"
    depths = {spec.depth or rule.depth for spec in specs}
    costs = {depth: measure(network, find(rule.name), depth, tail) for depth in depths}
    ratios, start = [], 0
    for spec in specs:
        stop = start + len(spec.units)
        kept = costs[spec.depth or rule.depth].block(start, stop)
        ratios.append(arena_parts(spec, batch)[1] / max(kept * batch, 1))
        start = stop
    return min(ratios)


def _fixed_bytes(specs: Sequence[BlockSpec], batch: int) -> int:
    """The state of all blocks without their auxiliary networks and what a step writes beside it, a graph of all, what a
    peak has of fixed size, the batch and the logits."""
    needs = [block_needs(spec) for spec in specs]
    state = [tensor for spec in specs for tensor in spec.state()]
    own = [tensor for tensor in state if "/aux/" not in tensor.name]
    written = [
        t for s in specs for t in s.step.outputs if t.name.startswith("new/") and t.name not in s.step.overwriting
    ]
    tensors = sum(tensor_bytes(t) for t in (*own, *written) if "/aux/" not in t.name)
    nodes = sum(spec.step.nodes or 0 for spec in specs) * len(own) // max(len(state), 1)
    graph = loaded_bytes(replace(specs[0].step, nodes=nodes), THREADS)
    peak = max(arena_parts(spec, batch)[0] for spec in specs)
    runtime = runtime_bytes(has_convolutions(specs))
    return runtime + graph + tensors + peak + needs[0].input.at(batch) + needs[-1].output.at(batch)
