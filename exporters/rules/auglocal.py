"""AugLocal: every block learns from an auxiliary network made of layers like those that follow it.

Ma, Wu, Si, Tan, "Scaling Supervised Local Learning with Augmented Auxiliary Networks", ICLR 2024 (arXiv 2402.17318).
In three steps, for a network of n units cut into M blocks:

1. depth:      the auxiliary of block i has d_i units, d at first, fewer towards the end            -> `depths`
2. selection:  they imitate d_i units spread evenly over the successors, the last unit included     -> `select`
3. structure:  fresh units of the imitated widths; strides follow from the widths                   -> `strides`

The paper has one unit a block. For a block of several units the auxiliary is that of its last unit: l is that unit's
index, i the block's index, M the number of blocks. With tail "merge" the paper's CIFAR recipe makes the last d + 1
units one block (M = n - d); with tail "all" every unit may be its own (its ImageNet recipe, with tau = 0).

The price: an auxiliary of d units computes about as much as d units of the network, in training only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from torch import nn

from edgelocal.bundle.spec import RuleSpec
from edgelocal.errors import UsageError
from edgelocal.exporters.rules.base import Place, Rule
from edgelocal.exporters.units import Network


def depths(modules: int, depth: int, tau: float, d_min: int) -> tuple[int, ...]:
    """Auxiliary depth of every block but the last, for M = `modules` blocks; the pyramid of the paper.

        r_i = i tau / (M - 2)
        d_i = max(d_min, round(d (1 - r_i) + r_i d_min)),   i = 0 .. M - 2

    evaluated in binary64, halves rounded to even. M = 2 leaves r_0 as 0 / 0: it is 0 here, the start of the pyramid.
    M = 1 has no auxiliary at all.

    Raises:
        UsageError: `depth` < `d_min`, `d_min` < 1, or `tau` outside 0 .. 1.
    """
    if not (1 <= d_min <= depth and 0 <= tau <= 1):
        raise UsageError(
            f"found auxiliary depth {depth}, least depth {d_min} and tau {tau}, expected 1 <= least depth <= depth and "
            "0 <= tau <= 1"
        )
    ratios = [i * tau / max(modules - 2, 1) for i in range(modules - 1)]
    return tuple(max(d_min, round(depth * (1 - r) + r * d_min)) for r in ratios)


def pyramid(blocks: int, rule: RuleSpec) -> tuple[int, ...]:
    """`depths` with the settings of `rule`."""
    return depths(blocks, rule.depth, rule.tau, rule.d_min)


def select(unit: int, depth: int, units: int) -> tuple[int, ...]:
    """Indices of the `depth` units that the auxiliary behind `unit` imitates, out of n = `units`.

        l + 1 .. n - 1                                        if d >= n - 1 - l
        round(l + (n - l - 1) / d * k),  k = 1 .. d           otherwise

    evaluated from left to right in binary64, halves rounded to even. Strictly increasing, always ending in n - 1.
    """
    rest = units - unit - 1
    if depth >= rest:
        return tuple(range(unit + 1, units))
    return tuple(round(unit + rest / depth * k) for k in range(1, depth + 1))


def strides(widths: Sequence[int]) -> tuple[int, ...]:
    """Strides of fresh units of widths w_1 .. w_d behind a unit of width w_0: halve once for every doubling.

        p_0 = 0;   q_k = p_{k-1} + log2(w_k / w_{k-1});   stride_k = 2 and p_k = q_k - 1 if q_k >= 1,
                                                          stride_k = 1 and p_k = q_k otherwise

    At most one halving a unit: what is left over waits for the next one and is lost after the last. Computed as
    2 ** p in exact fractions, so that widths that are no powers of two cannot round across the border.
    """
    result = []
    debt = Fraction(1)
    for before, width in pairwise(widths):
        debt *= Fraction(width, before)
        stride = 2 if debt >= 2 else 1
        debt /= stride
        result.append(stride)
    return tuple(result)


def changes(widths: Sequence[int]) -> tuple[int, ...]:
    """Strides for networks that shrink by pooling (VGG): 2 wherever the width changes, else 1."""
    return tuple(1 if before == width else 2 for before, width in pairwise(widths))


def auxiliary(network: Network, place: Place, rule: RuleSpec) -> nn.Module:
    """Fresh units like the selected ones, then the network's auxiliary head: (N, channels, ...) -> (N, classes).

    Of the pyramid's depth, unless `place` gives one.
    """
    depth = pyramid(place.blocks, rule)[place.block]
    if place.depth is not None:
        depth = place.depth
    chosen = [network.units[index] for index in select(place.unit, depth, len(network.units))]
    last = network.units[place.unit]
    widths = [last.width, *(unit.width for unit in chosen)]
    steps = strides(widths) if network.downsampling == "ratio" else changes(widths)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (before, unit, stride) in enumerate(zip([last, *chosen], chosen, steps, strict=False)):
        parts[str(index)] = unit.fresh(before.channels, unit.width, stride)
    parts["head"] = network.aux_head(chosen[-1].channels, network.classes, depth)
    return nn.Sequential(parts)


RULE = Rule("auglocal", auxiliary, merges_tail=True, depths=pyramid)
