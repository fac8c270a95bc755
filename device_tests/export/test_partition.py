"""The search against every possible cut, the measured bytes against published ones, and the limits."""

from __future__ import annotations

from functools import cache
from itertools import combinations, pairwise
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgelocal.errors import UsageError
from edgelocal.exporters.partition import AUTO_SLACK, Blocks, Costs, auto, balanced, measure, partition, per_unit
from edgelocal.exporters.rules import find
from edgelocal.exporters.units import Network, load_network
from edgelocal.exporters.zoo import custom


@cache
def network(name: str) -> Network:
    return load_network(name, (3, 32, 32), 10, seed=0)


def all_cuts(units: int, blocks: int, least: int) -> list[tuple[range, ...]]:
    inner = combinations(range(1, units - least + 1), blocks - 1)
    return [tuple(range(a, b) for a, b in pairwise((0, *cut, units))) for cut in inner]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Costs, int]:
    units = draw(st.integers(1, 8))
    numbers = st.lists(st.integers(0, 50), min_size=units, max_size=units).map(tuple)
    return Costs(draw(numbers), draw(numbers)), draw(st.integers(1, units))


@given(problems(), st.data())
def test_balanced_is_the_best_of_all_cuts(problem: tuple[Costs, int], data: st.DataObject) -> None:
    costs, least = problem
    blocks = data.draw(st.integers(1, len(costs.units) - least + 1))
    cut = balanced(costs, blocks, least)
    candidates = all_cuts(len(costs.units), blocks, least)
    assert cut in candidates
    assert costs.largest(cut) == min(map(costs.largest, candidates))


@given(problems())
def test_auto_is_the_fewest_blocks_within_the_limit(problem: tuple[Costs, int]) -> None:
    costs, least = problem
    units = len(costs.units)
    limit = AUTO_SLACK * costs.largest(per_unit(units, least))
    best = {n: min(map(costs.largest, all_cuts(units, n, least))) for n in range(1, units - least + 2)}
    fewest = min(n for n, cost in best.items() if cost <= limit)
    cut = auto(costs, least)
    assert len(cut) == fewest
    assert costs.largest(cut) == best[fewest]


@pytest.mark.parametrize(("name", "mebibytes"), [("resnet32", 2429), ("resnet110", 8254)])
def test_measured_bytes_are_the_published_ones(name: str, mebibytes: float) -> None:
    """Peak that autograd keeps at batch 1024, measured independently on the method's own code."""
    costs = measure(network(name), find("bp"), 1, "all")
    assert (sum(costs.units) + costs.ends[-1]) * 1024 / 2**20 == pytest.approx(mebibytes, rel=0.005)


def test_measuring_leaves_the_network_alone() -> None:
    found = network("vgg11")
    before = {key: value.clone() for key, value in found.module.state_dict().items()}
    rng = torch.random.get_rng_state()
    costs = measure(found, find("auglocal"), 2, "merge")
    assert all(torch.equal(before[key], value) for key, value in found.module.state_dict().items())
    assert torch.equal(rng, torch.random.get_rng_state())
    assert len(costs.units) == len(costs.ends) == len(found.units)


@pytest.mark.parametrize(
    ("rule", "depth", "tail", "expected"),
    [
        ("auglocal", 1, "merge", [1, 1, 2]),
        ("auglocal", 2, "merge", [1, 3]),
        ("auglocal", 3, "merge", [4]),
        ("auglocal", 9, "all", [1, 1, 1, 1]),
        ("linear", 2, "merge", [1, 1, 1, 1]),
        ("bp", 2, "merge", [4]),
    ],
)
def test_per_unit(rule: str, depth: int, tail: Literal["merge", "all"], expected: list[int]) -> None:
    cut = partition(network("mlp"), blocks="per-unit", rule=rule, depth=depth, tail=tail)
    assert [len(span) for span in cut] == expected


def test_a_number_of_blocks_is_kept_and_the_tail_with_it() -> None:
    for blocks in (1, 2, 5):
        cut = partition(network("resnet20"), blocks=blocks, rule="auglocal", depth=3, tail="merge")
        assert len(cut) == blocks
        assert [index for span in cut for index in span] == list(range(10))
        assert len(cut[-1]) >= 4


def test_auto_spends_at_most_a_tenth_more() -> None:
    found = network("resnet32")
    cut = partition(found, blocks="auto", rule="auglocal", depth=2, tail="merge")
    costs = measure(found, find("auglocal"), 2, "merge")
    assert 1 < len(cut) < 14
    assert costs.largest(cut) <= AUTO_SLACK * costs.largest(per_unit(16, 3))


@pytest.mark.parametrize(
    ("blocks", "depth", "tail", "message"),
    [
        (3, 2, "merge", r"3 blocks were asked for, 1 to 2 are possible: mlp has 4 units, the last 3 of which stay"),
        (5, 2, "all", r"5 blocks were asked for, 1 to 4 are possible: mlp has 4 units$"),
        (0, 2, "all", "1 to 4 are possible"),
        ("per-unit", 4, "merge", "mlp has 4 units, .* keeps the last 5 together; choose --aux-depth 2 or less"),
        ("auto", 0, "merge", "auxiliary depth is 0, expected at least 1"),
    ],
)
def test_the_impossible_is_refused(blocks: Blocks, depth: int, tail: Literal["merge", "all"], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        partition(network("mlp"), blocks=blocks, rule="auglocal", depth=depth, tail=tail)


def test_a_network_of_one_unit_trains_as_one_block_only() -> None:
    single = custom.from_module(nn.Linear(4, 2), "single", (4,), 2)
    assert partition(single, blocks="auto", rule="bp", depth=1, tail="merge") == (range(1),)
    with pytest.raises(UsageError, match="single unit and cannot be cut; use --rule bp"):
        partition(single, blocks="auto", rule="auglocal", depth=1, tail="merge")
