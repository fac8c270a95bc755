"""The search against every partition with every choice of depths, and how few working sets it asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelocal.bundle.spec import RuleSpec
from edgelocal.errors import UsageError
from edgelocal.exporters.macs import Counter, block_macs
from edgelocal.exporters.partition import measure
from edgelocal.exporters.rules import build_blocks, find
from edgelocal.exporters.rules.auglocal import depths
from edgelocal.exporters.search.costs import make_problem
from edgelocal.exporters.search.problem import Candidate, Problem
from edgelocal.exporters.search.search import Found, frontier, search
from edgelocal.exporters.units import Network, load_network, output_shapes

Blocks = tuple[Candidate, ...]


def partitions(problem: Problem) -> Iterator[tuple[int, int, Blocks]]:
    """(depth missing, MACs, blocks) of every partition with every choice of depths, by trying them all."""
    units = problem.units
    for count, wanted in enumerate(problem.wanted, 1):
        for inner in combinations(range(1, units), count - 1):
            spans = list(pairwise((0, *inner, units)))
            if spans[-1][1] - spans[-1][0] >= problem.least:
                options = [choices(problem, stop, depth) for (_, stop), depth in zip(spans, wanted, strict=False)]
                for chosen in product(*options, [(None, 0)]):
                    pairs = list(zip(spans, chosen, strict=True))
                    blocks = tuple(Candidate(*span, depth) for span, (depth, _) in pairs)
                    macs = sum(int(problem.macs[problem.cell(block)]) for block in blocks)
                    yield sum(missing for _, (_, missing) in pairs), macs, blocks


def choices(problem: Problem, stop: int, wanted: int | None) -> list[tuple[int | None, int]]:
    """(depth, depth missing): the wanted one, or a shallower one that makes a difference."""
    if wanted is None:
        return [(None, 0)]
    useful = min(wanted, problem.units - stop)
    return [(wanted, 0), *((d, useful - d) for d in problem.depths if d is not None and d < useful)]


def random_problem(seed: int, units: int, deepest: int, least: int, tau: float) -> Problem:
    rng = np.random.default_rng(seed)
    levels = tuple(range(1, deepest + 1)) if deepest else (None,)
    shape = (len(levels), units, units + 1)
    wanted = [depths(m, deepest, tau, 1) if deepest else (None,) * (m - 1) for m in range(1, units - least + 2)]
    macs, proxy = rng.integers(1, 30, shape), rng.integers(0, 20, shape)
    return Problem(levels, tuple(wanted), least, macs, proxy, np.arange(macs.size).reshape(shape))


def holds(problem: Problem, large: Candidate, small: Candidate) -> bool:
    inside = large.start <= small.start and large.stop >= small.stop
    return inside and bool(problem.proxy[problem.cell(large)] >= problem.proxy[problem.cell(small)])


def candidates(problem: Problem) -> list[Candidate]:
    return [problem.candidate((int(d), int(i), int(j))) for d, i, j in np.argwhere(problem.possible())]


def monotone(problem: Problem, seed: int) -> dict[Candidate, int]:
    """Arbitrary working sets, but that a block needs no less than one it holds."""
    rng = np.random.default_rng(seed)
    every = candidates(problem)
    drawn = {block: int(rng.integers(1, 100)) for block in every}
    return {large: max(drawn[small] for small in every if holds(problem, large, small)) for large in every}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, int]:
    units = draw(st.integers(1, 6))
    seed = draw(st.integers(0, 1 << 30))
    deepest, tau = draw(st.integers(0, 3)), draw(st.sampled_from([0.0, 0.5, 1.0]))
    return random_problem(seed, units, deepest, draw(st.integers(1, units)), tau), seed


def check(problem: Problem, truth: dict[Candidate, int], found: Found) -> None:
    """What is true of every answer: it is one of the partitions, and its figures are."""
    assert (found.missing, found.macs, found.blocks) in set(partitions(problem))
    assert found.working_sets == tuple(truth[block] for block in found.blocks)
    assert found.largest == max(found.working_sets)
    assert all(found.known[block] == truth[block] for block in found.blocks)
    assert found.asked == len(found.known)


def check_best(problem: Problem, truth: dict[Candidate, int], limit: float, found: Found) -> None:
    every = [(missing, macs, max(truth[b] for b in blocks)) for missing, macs, blocks in partitions(problem)]
    smallest = min(size for *_, size in every)
    reachable = max(limit, smallest)
    best = min((missing, macs) for missing, macs, size in every if size <= reachable)
    assert (found.missing, found.macs) == best
    assert found.largest <= reachable
    assert limit >= smallest or found.largest == smallest


@settings(max_examples=150)
@given(problems(), st.integers(0, 110))
def test_without_a_margin_the_best_of_all_partitions_is_found(drawn: tuple[Problem, int], limit: int) -> None:
    problem, seed = drawn
    truth = monotone(problem, seed + 1)
    found = search(problem, truth.__getitem__, limit, margin=0)
    check(problem, truth, found)
    check_best(problem, truth, limit, found)


def growing(problem: Problem, seed: int) -> tuple[Problem, dict[Candidate, int]]:
    """Proxies that add up, and working sets of 0.6 of them, with up to a tenth more for a unit: within 0.9."""
    rng = np.random.default_rng(seed)
    units, ends = (rng.integers(10**5, 10**7, shape) for shape in (problem.units, problem.proxy.shape[::2]))
    extra = rng.uniform(1.0, 1.1, problem.units)
    proxy, truth = np.zeros(problem.proxy.shape), {}
    for block in candidates(problem):
        cell = problem.cell(block)
        proxy[cell] = units[block.start : block.stop].sum() + ends[cell[0], block.stop]
        own = (units * extra)[block.start : block.stop].sum() + ends[cell[0], block.stop]
        truth[block] = round(0.6 * float(own))
    return replace(problem, proxy=proxy), truth


@settings(max_examples=150)
@given(problems(), st.floats(0, 1))
def test_proxies_within_the_margin_find_the_best_of_all_partitions(drawn: tuple[Problem, int], share: float) -> None:
    problem, truth = growing(*drawn)
    low, high = min(truth.values()), max(truth.values())
    limit = low + share * (high - low)
    found = search(problem, truth.__getitem__, limit, margin=0.9)
    check(problem, truth, found)
    check_best(problem, truth, limit, found)


@settings(max_examples=150)
@given(problems(), st.integers(0, 60))
def test_whatever_the_working_sets_a_limit_said_to_be_kept_is_kept(drawn: tuple[Problem, int], limit: int) -> None:
    """Working sets that follow nothing: the answer may be dear, but it is true."""
    problem, seed = drawn
    rng = np.random.default_rng(seed)
    truth = {block: int(rng.integers(1, 60)) for block in candidates(problem)}
    found = search(problem, truth.__getitem__, limit)
    check(problem, truth, found)
    known = [b for _, _, b in partitions(problem) if all(block in found.known for block in b)]
    assert found.largest <= max(limit, min(max(truth[block] for block in blocks) for blocks in known))


@settings(max_examples=50)
@given(problems(), st.integers(2, 5))
def test_the_frontier_ends_in_the_extremes_and_every_point_buys_something(
    drawn: tuple[Problem, int], points: int
) -> None:
    problem, seed = drawn
    truth = monotone(problem, seed + 1)
    found = frontier(problem, truth.__getitem__, points=points, margin=0)
    every = [(missing, macs, max(truth[b] for b in blocks)) for missing, macs, blocks in partitions(problem)]
    assert 1 <= len(found) <= points
    assert found[0].largest == min(size for *_, size in every)
    assert (found[-1].missing, found[-1].macs) == min((missing, macs) for missing, macs, _ in every)
    for small, large in pairwise(found):
        assert small.largest < large.largest
        assert large.macs < small.macs or large.missing < small.missing
    for point in found:
        assert (point.missing, point.macs) == min((m, c) for m, c, size in every if size <= point.largest)


def test_known_working_sets_are_not_asked_for_again() -> None:
    problem = random_problem(3, 6, 2, 1, 0.5)
    truth = monotone(problem, 4)
    first = search(problem, truth.__getitem__, 60, margin=0)
    assert first.asked > 0
    again = search(problem, {}.__getitem__, 60, first.known, margin=0)
    assert (again.blocks, again.asked) == (first.blocks, 0)


def test_blocks_of_a_kind_are_asked_for_once() -> None:
    problem = random_problem(5, 6, 0, 1, 0.0)
    start, stop = np.indices(problem.kinds.shape[1:])
    same = replace(problem, kinds=(stop - start)[None], proxy=(stop - start)[None])
    asked: list[int] = []

    def truth(block: Candidate) -> int:
        asked.append(block.stop - block.start)
        return block.stop - block.start

    found = search(same, truth, 2)
    assert found.largest == 2
    assert len(asked) == len(set(asked)) == found.asked


def test_depth_is_given_up_only_where_a_block_would_not_fit_otherwise() -> None:
    """Four units of 10 bytes, an auxiliary of depth d of 5 d bytes, but of 20 d behind the first unit."""
    start, stop = np.indices((4, 5))
    aux = np.where(stop == 1, 20, 5)
    sizes = np.stack([10 * (stop - start) + np.where(stop == 4, 0, depth * aux) for depth in (1, 2)])
    macs = np.stack([stop - start + np.where(stop == 4, 0, depth) for depth in (1, 2)])
    wanted = tuple(depths(count, 2, 0.0, 1) for count in (1, 2, 3, 4))
    problem = Problem((1, 2), wanted, 1, macs, sizes, np.arange(40).reshape(2, 4, 5))

    def answer(limit: int) -> tuple[tuple[range, ...], tuple[int, ...] | None, int, int]:
        found = search(problem, lambda block: int(sizes[problem.cell(block)]), limit)
        return found.cut, found.depths, found.missing, found.largest

    halves = (range(2), range(2, 4))
    assert answer(40) == ((range(4),), None, 0, 40)
    assert answer(39) == answer(30) == (halves, (2,), 0, 30)
    assert answer(29) == answer(25) == answer(24) == (halves, (1,), 1, 25)


def resnet_like(problem: Problem, jitter: float) -> Callable[[Candidate], int]:
    """Working sets as a step graph has them: half of what eager PyTorch keeps, workspace for the largest unit."""

    def truth(block: Candidate) -> int:
        cell = problem.cell(block)
        unit = max(float(problem.proxy[0, i, i + 1]) for i in range(block.start, min(block.stop, problem.units - 1)))
        wobble = 1 + jitter * math.sin(float(problem.kinds[cell]))
        return int((0.55 * float(problem.proxy[cell]) + 0.5 * unit + 3e6) * wobble)

    return truth


@cache
def network(name: str) -> Network:
    return load_network(name, (3, 32, 32), 10, seed=0)


@cache
def resnet110() -> Problem:
    return make_problem(network("resnet110"), RuleSpec("auglocal", 2, 0.5, 1, "merge"), batch=64)


@pytest.mark.parametrize("jitter", [0.0, 0.03])
@pytest.mark.parametrize("limit", [200e6, 100e6, 60e6, 45e6])
def test_few_working_sets_are_asked_for(limit: float, jitter: float) -> None:
    """There are 2809 possible blocks."""
    problem = resnet110()
    found = search(problem, resnet_like(problem, jitter), limit)
    assert found.largest <= limit
    assert found.missing == 0
    assert found.asked <= 25


def test_the_smallest_limit_of_a_deep_network_is_found_with_few_questions_too() -> None:
    problem = resnet110()
    truth = resnet_like(problem, 0.0)
    found = search(problem, truth, 1e6)
    assert found.asked <= 25
    assert search(problem, truth, found.largest, found.known).largest == found.largest
    assert search(problem, truth, found.largest - 1, found.known).largest == found.largest


@pytest.mark.parametrize(
    "rule",
    [RuleSpec("auglocal", 3, 0.5, 1, "merge"), RuleSpec("auglocal", 2, 1.0, 1, "all"), RuleSpec("linear", 2, 0, 1, "")],
    ids=lambda rule: f"{rule.name}-{rule.tail}",
)
def test_the_tables_are_those_of_the_blocks_built(rule: RuleSpec) -> None:
    found = network("resnet8") if rule.tail != "merge" else network("resnet14")
    problem = make_problem(found, rule, batch=4)
    counter = Counter()
    shapes = [found.input_shape, *output_shapes([u.module for u in found.units], found.input_shape, found.name)]
    for _, _, blocks in partitions(problem):
        chosen = [block.depth for block in blocks[:-1] if block.depth is not None] or None
        cut = tuple(range(block.start, block.stop) for block in blocks)
        for block, built in zip(blocks, build_blocks(found, rule, cut, 0, chosen), strict=True):
            macs = block_macs(built, shapes[block.start], torch.float32, counter)
            assert problem.macs[problem.cell(block)] == macs.training + macs.training_auxiliary


def test_kinds_are_equal_where_everything_is() -> None:
    problem = resnet110()
    kinds = problem.kinds[1]
    assert kinds[1, 2] == kinds[2, 3] == kinds[16, 17]
    assert kinds[2, 5] == kinds[3, 6]
    assert len({int(kinds[cell]) for cell in [(0, 1), (1, 2), (1, 3), (19, 20), (20, 21)]}) == 5
    assert problem.kinds[0, 1, 2] != kinds[1, 2]


def test_rules_and_their_partitions() -> None:
    whole = make_problem(network("resnet8"), RuleSpec("bp", 1, 0.0, 1, "all"), 4)
    assert (whole.depths, whole.wanted, whole.least) == ((None,), ((),), 4)
    merged = make_problem(network("resnet8"), RuleSpec("auglocal", 2, 0.0, 1, "merge"), 4)
    assert (merged.depths, merged.wanted, merged.least) == ((1, 2), ((), (2,)), 3)
    linear = make_problem(network("resnet8"), RuleSpec("linear", 2, 0.0, 1, "merge"), 4)
    assert (linear.depths, linear.least) == ((None,), 1)
    assert linear.wanted == ((), (None,), (None,) * 2, (None,) * 3)
    with pytest.raises(UsageError, match="choose --aux-depth 2 or less"):
        make_problem(network("resnet8"), RuleSpec("auglocal", 4, 0.0, 1, "merge"), 4)


def test_proxies_are_what_eager_pytorch_keeps_of_a_batch() -> None:
    found = network("resnet14")
    proxy = make_problem(found, RuleSpec("auglocal", 3, 0.0, 1, "all"), 4).proxy
    for level, depth in ((0, 1), (2, 3)):
        costs = measure(found, find("auglocal"), depth, "all")
        for start, stop in combinations(range(8), 2):
            assert proxy[level, start, stop] == 4 * costs.block(start, stop)
    assert np.array_equal(2 * proxy[1], proxy[0] + proxy[2])
