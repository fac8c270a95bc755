"""(network, rule, batch) -> the partition search's problem: its tables, in seconds and without tracing anything."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn

from edgelocal.bundle.spec import RuleSpec
from edgelocal.exporters.guest import network_errors
from edgelocal.exporters.macs import Counted, Counter, Work, chain
from edgelocal.exporters.partition import Costs, measure, partition
from edgelocal.exporters.rules import Place, Rule, find
from edgelocal.exporters.search.problem import Problem, Table
from edgelocal.exporters.units import Network, seeded

Ends = list[list[Counted]]  # behind every unit the parts of what ends a block there: its auxiliary, or the head


def make_problem(network: Network, rule: RuleSpec, batch: int, counter: Counter | None = None) -> Problem:
    """Every possible block of `network`, with batches of `batch` samples.

    The proxy of a working set is what eager PyTorch would keep of a batch for the backward.

    Raises:
        UsageError: the auxiliary depth does not go with the network, or the rule's settings are wrong.
        ExportError: a unit or an auxiliary network does not run.
    """
    counter = counter or Counter()
    found = find(rule.name)
    tail: Literal["merge", "all"] = "merge" if rule.tail == "merge" else "all"
    finest = partition(
        network, blocks="per-unit" if len(network.units) > 1 else 1, rule=rule.name, depth=rule.depth, tail=tail
    )
    depths, wanted = _depths(found, rule, len(finest))
    units = counter.pieces([unit.module for unit in network.units], network.input_shape, network.input_dtype)
    head = counter.piece(network.head, units[-1].shape, units[-1].dtype)
    ends = [[*_auxiliaries(network, found, rule, depth, units, counter), [head]] for depth in depths]
    return Problem(
        depths=depths,
        wanted=wanted,
        least=len(finest[-1]),
        macs=np.stack([_macs(units, end) for end in ends]),
        proxy=_proxies(network, found, rule, depths, tail) * batch,
        kinds=_kinds(units, ends),
    )


def _depths(
    found: Rule, rule: RuleSpec, most: int
) -> tuple[tuple[int | None, ...], tuple[tuple[int | None, ...], ...]]:
    """(depths there are, depths wanted for 1 .. `most` blocks)"""
    if found.depths is None:
        return (None,), tuple((None,) * count for count in range(most))
    wanted = tuple(found.depths(count, rule) for count in range(1, most + 1))
    return tuple(range(rule.d_min, rule.depth + 1)), wanted


def _auxiliaries(
    network: Network, found: Rule, rule: RuleSpec, depth: int | None, units: list[Counted], counter: Counter
) -> Ends:
    """The parts of the auxiliary network of `depth` behind every unit but the last; none at all under a rule without.

    They are built on the meta device, where weights cost nothing.
    """
    meta = torch.device("meta")
    ends: Ends = []
    for index, unit in enumerate(units[:-1]):
        modules: Sequence[nn.Module] = ()
        if found.auxiliary is not None:
            with seeded(0, "search"), network_errors(f"building the auxiliary network behind unit {index}"), meta:
                modules = counter.parts(found.auxiliary(network, Place(index, 0, 2, depth), rule))
        ends.append(counter.pieces(modules, unit.shape, unit.dtype))
    return ends


def _macs(units: list[Counted], ends: Ends) -> Table:
    """Training MACs of every block, [start, stop]."""
    table = np.zeros((len(units), len(units) + 1), np.int64)
    behind = [chain(part.work for part in end) for end in ends]
    for start in range(len(units)):
        own = Work(0, 0, 0, trains=False)
        for stop in range(start + 1, len(units) + 1):
            own = chain([own, units[stop - 1].work])
            table[start, stop] = chain([own, behind[stop - 1]]).first
    return table


def _proxies(network: Network, found: Rule, rule: RuleSpec, depths: tuple[int | None, ...], tail: str) -> Table:
    """Bytes that every block keeps of a sample, [level, start, stop]; depths between the ends by interpolation."""
    deepest = _kept(measure(network, found, rule.depth, tail))
    if len(depths) == 1:
        return deepest[None]
    shallowest = _kept(measure(network, found, rule.d_min, tail))
    shares = np.linspace(0, 1, len(depths))[:, None, None]
    table: Table = shallowest + shares * (deepest - shallowest)
    return table


def _kept(costs: Costs) -> Table:
    """Bytes that every block keeps of a sample, [start, stop]."""
    before = np.concatenate([[0], np.cumsum(costs.units)])
    ends = np.array([0, *costs.ends, *[0] * (len(costs.units) - len(costs.ends))])
    table: Table = before[None, :] - before[:-1, None] + ends[None, :]
    return table


def _kinds(units: list[Counted], ends: list[Ends]) -> Table:
    """Equal numbers for blocks of equal parts, [level, start, stop]."""
    numbers: dict[Hashable, int] = {}
    table = np.zeros((len(ends), len(units), len(units) + 1), np.int64)
    for start in range(len(units)):
        own = 0
        for stop in range(start + 1, len(units) + 1):
            own = numbers.setdefault((own, units[stop - 1].kind), len(numbers) + 1)
            for level, behind in enumerate(ends):
                whole = (own, "end", *(part.kind for part in behind[stop - 1]))
                table[level, start, stop] = numbers.setdefault(whole, len(numbers) + 1)
    return table
