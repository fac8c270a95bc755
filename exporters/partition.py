"""Where to cut: units -> blocks.

`measure` asks what every unit and every possible auxiliary keep for the backward, without computing anything; the
search over those numbers is pure. The blocks minimise the largest block's bytes exactly, in O(blocks * units^2); the
bytes are a proxy: what eager PyTorch would keep for one sample, weights and optimizer state left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from edgelocal.bundle.spec import RuleSpec
from edgelocal.errors import UsageError
from edgelocal.exporters.rules import Place, Rule, find
from edgelocal.exporters.units import Network

Blocks = int | Literal["per-unit", "auto"]
Cut = tuple[range, ...]

AUTO_SLACK = 1.1
_PROBE_BATCH = 2  # batch norm over a map of one pixel refuses a batch of one


@dataclass(frozen=True)
class Costs:
    """Bytes kept for the backward of one sample: `units[i]` by unit i, `ends[i]` by what would follow a block that
    ends in unit i (its auxiliary network; for the last unit the head)."""

    units: tuple[int, ...]
    ends: tuple[int, ...]

    def block(self, start: int, stop: int) -> int:
        """Bytes of the block of units start .. stop - 1."""
        return sum(self.units[start:stop]) + self.ends[stop - 1]

    def largest(self, cut: Cut) -> int:
        """Bytes of the most expensive block."""
        return max(self.block(span.start, span.stop) for span in cut)


def partition(
    network: Network, *, blocks: Blocks, rule: str, depth: int, tail: Literal["merge", "all"]
) -> tuple[range, ...]:
    """Ranges of unit indices, one a block, in order.

    "per-unit" cuts after every unit; an integer asks for that many blocks with the largest as cheap as possible;
    "auto" for the fewest whose largest costs at most 1.1 times that of "per-unit". Under a rule that merges its tail
    (auglocal with tail "merge") the last block keeps at least depth + 1 units. Rule bp is always one block.

    Raises:
        UsageError: more blocks than possible, or a depth the network is too short for; the message says why.
    """
    found = find(rule)
    count = len(network.units)
    if found.auxiliary is None:
        return (range(count),)
    least = depth + 1 if found.merges_tail and tail == "merge" else 1
    _check(network, blocks, depth, least)
    if blocks == "per-unit":
        return per_unit(count, least)
    costs = measure(network, found, depth, tail)
    return auto(costs, least) if blocks == "auto" else balanced(costs, blocks, least)


def per_unit(units: int, least: int) -> Cut:
    """A block for every unit, but the last `least` units together."""
    return (*(range(index, index + 1) for index in range(units - least)), range(units - least, units))


def balanced(costs: Costs, blocks: int, least: int) -> Cut:
    """`blocks` contiguous blocks, the last of at least `least` units, whose largest cost is as small as can be.

    Requires 1 <= blocks <= units - least + 1.
    """
    total = len(costs.units)
    # best[stop]: (largest cost, cuts) of the first `stop` units in as many blocks as there were rounds.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, (0,))}
    for left in reversed(range(blocks)):
        stops = range(1, total - least - left + 2) if left else (total,)
        best = {
            stop: min(
                (max(cost, costs.block(start, stop)), (*cuts, stop))
                for start, (cost, cuts) in best.items()
                if start < stop and (left or total - start >= least)
            )
            for stop in stops
            if any(start < stop for start in best)
        }
    _, cuts = best[total]
    return tuple(range(start, stop) for start, stop in pairwise(cuts))


def auto(costs: Costs, least: int) -> Cut:
    """The fewest blocks whose largest cost is at most 1.1 times that of `per_unit`, balanced."""
    total = len(costs.units)
    limit = AUTO_SLACK * costs.largest(per_unit(total, least))
    fewest = [0]
    for stop in range(1, total + 1):
        starts = range(min(stop, total - least + 1)) if stop == total else range(stop)
        fits = [fewest[start] + 1 for start in starts if costs.block(start, stop) <= limit]
        fewest.append(min(fits, default=total + 1))
    return balanced(costs, fewest[total], least)


def measure(network: Network, rule: Rule, depth: int, tail: str) -> Costs:
    """Bytes per sample of every unit, and of the auxiliary of full `depth` behind every unit.

    Units and head run once on fake tensors; a tensor counts for the unit that first keeps it.
    """
    spec = RuleSpec(rule.name, depth, tau=0.0, d_min=1, tail=tail)
    count = len(network.units)
    units, ends = [], []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = torch.empty(_PROBE_BATCH, *network.input_shape, dtype=network.input_dtype)
        kept = _Kept(mode)
        for index, unit in enumerate(network.units):
            x, cost = kept.run(unit.module, x)
            units.append(cost)
            if index < count - 1 and rule.auxiliary is not None:
                auxiliary = rule.auxiliary(network, Place(index, index, count), spec)
                ends.append(kept.run(auxiliary, x.detach())[1])
        ends.append(kept.run(network.head, x)[1])
    return Costs(tuple(units), tuple(ends))


class _Kept:
    """Sums the storages autograd keeps, each once, parameters and buffers left out."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._held: list[Tensor] = []
        self._seen: set[int] = set()

    def run(self, module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        """(output, bytes newly kept for one sample) of `module` in its present mode, which stays as it is."""
        state = {name: self._fake(t) for name, t in (*module.named_parameters(), *module.named_buffers())}
        for tensor in state.values():
            self._count(tensor.detach())
        new: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            new.append(self._count(tensor))
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = torch.func.functional_call(module, state, (x,))
        return y, sum(new) // _PROBE_BATCH

    def _count(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:
            return 0
        self._seen.add(storage._cdata)
        self._held.append(tensor)  # alive, so that its address is not given to another
        return storage.nbytes()

    def _fake(self, tensor: Tensor) -> Tensor:
        # Batch norm counts its batches in place: on the real tensor that would change the network.
        return tensor if isinstance(tensor, FakeTensor) else self._mode.from_tensor(tensor)


def _check(network: Network, blocks: Blocks, depth: int, least: int) -> None:
    count = len(network.units)
    if depth < 1:
        raise UsageError(f"the auxiliary depth is {depth}, expected at least 1")
    if count == 1 and blocks != 1:
        raise UsageError(
            f"{network.name} is a single unit and cannot be cut; use --rule bp, or name its units "
            "(an nn.Sequential, or a method edgelocal_units)"
        )
    if least > count:
        raise UsageError(
            f"{network.name} has {count} units, but auxiliary depth {depth} with tail merge keeps the last {least} "
            f"together; choose --aux-depth {max(count - 2, 1)} or less, or --tail all"
        )
    possible = count - least + 1
    if isinstance(blocks, int) and not 1 <= blocks <= possible:
        why = f", the last {least} of which stay together (auxiliary depth {depth}, tail merge)" if least > 1 else ""
        raise UsageError(
            f"{blocks} blocks were asked for, 1 to {possible} are possible: {network.name} has {count} units{why}"
        )
