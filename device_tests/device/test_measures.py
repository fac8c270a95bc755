"""What is measured of a run: which steps tell their time, what is kept of a long run, and what of it is memory."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from device_tests.device.runs import RESIDUAL, Recorder, trainer, write_data
from edgelocal.memory.planned import BlockPlan, Plan
from edgelocal.training import measures
from edgelocal.training.measures import BlockMeasures, Timeline, is_measured, is_slowed, releases

MIB = 1 << 20


class Clock:
    """Stands in for the module `time`; a test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(measures, "time", SimpleNamespace(monotonic=lambda: self.now))


def test_steps_that_are_measured_give_back_and_slow_their_neighbours() -> None:
    assert [n for n in range(-2, 310) if is_measured(n)] == [0, 1, 100, 200, 300]
    assert [n for n in range(310) if releases(n)] == [0, 1, 99, 100, 199, 200, 299, 300]
    assert [n for n in range(310) if is_slowed(n)] == [0, 1, 2, 99, 100, 101, 199, 200, 201, 299, 300, 301]


# Times


@pytest.mark.parametrize("steps", [1_000, 4_400, 50_000])
def test_the_99th_percentile_is_not_that_of_the_meter(steps: int) -> None:
    """Steps of 10 ms, those that the meter slows 50 ms: 3 % of all."""
    found = BlockMeasures()
    for n in range(steps):
        found.add_time(0.05 if is_slowed(n) else 0.01, slowed=is_slowed(n))
    assert found.latency_s() == {"p50": 0.01, "p90": 0.01, "p99": 0.01}
    slow = sum(is_slowed(n) for n in range(steps))
    assert found.steps == steps
    assert found.step_s == pytest.approx(0.05 * slow + 0.01 * (steps - slow))
    assert len(found.latencies_s) == min(steps - slow, 4096)


@pytest.mark.parametrize("period", [25, 64, 100, 128, 1024])
def test_what_is_kept_of_many_times_favours_no_step_of_a_period(period: int) -> None:
    """A slow step in every period is as frequent in what is kept, and so is every stretch of the run."""
    found, steps = BlockMeasures(), 200 * 1024
    for n in range(steps):
        found.add_time(n + (0.5 if n % period == 0 else 0), slowed=False)
    assert len(found.latencies_s) == 4096
    slow = sum(value % 1 > 0 for value in found.latencies_s)
    expected = 4096 / period
    assert abs(slow - expected) < 5 * expected**0.5 + 1
    quarters = [sum(steps * q <= 4 * value < steps * (q + 1) for value in found.latencies_s) for q in range(4)]
    assert min(quarters) > 850


def test_a_run_of_measured_steps_alone_has_no_percentiles() -> None:
    found = BlockMeasures()
    for n in range(2):
        found.add_time(0.1, slowed=is_slowed(n))
    assert found.latency_s() is None
    assert found.step_s == pytest.approx(0.2)


def test_a_training_leaves_out_what_the_meter_slowed(tmp_path: Path) -> None:
    data = write_data(tmp_path / "d.npz", RESIDUAL)
    found = trainer(RESIDUAL, data, epochs=35)
    found.run(Recorder())
    for block in found.measures:
        assert block.steps == 105
        assert len(block.latencies_s) == 105 - 6
        assert block.step_s > sum(block.latencies_s)


# Memory over time


@pytest.mark.parametrize("step_s", [0.0004, 0.02, 40.0])
@pytest.mark.parametrize("blocks", [2, 4, 8, 3])
def test_a_long_timeline_keeps_every_block_and_its_maximum(
    monkeypatch: pytest.MonkeyPatch, blocks: int, step_s: float
) -> None:
    clock, rng = Clock(monkeypatch), random.Random(blocks)
    found = Timeline()
    added: list[tuple[float, int, int]] = []
    for _ in range(5000):
        for block in [*range(blocks), -1]:
            clock.now += step_s / (blocks + 1)
            added.append((clock.now - 100, rng.randrange(MIB), block))
            found.add(*added[-1][1:])
            assert len(found._highest) <= 2000
    points = found.points
    assert len(points) > 500
    assert [p[0] for p in points] == sorted(p[0] for p in points)
    for block in range(-1, blocks):
        own = [p for p in points if p[2] == block]
        recorded = [a for a in added if a[2] == block]
        assert max(p[1] for p in own) == max(a[1] for a in recorded)
        # No half of the run is missing, and each row is one that was recorded, at its time.
        assert min(sum(p[0] < added[-1][0] / 2 for p in own), sum(p[0] > added[-1][0] / 2 for p in own)) > 20
        known = {(a[1], round(a[0], 3)) for a in recorded}
        assert {(p[1], p[0]) for p in own} <= known


def test_a_short_timeline_keeps_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, found = Clock(monkeypatch), Timeline()
    for n in range(2000):
        clock.now += 0.01
        found.add(n, n % 4)
    assert [(size, block) for _, size, block in found.points] == [(n, n % 4) for n in range(2000)]


def test_more_blocks_than_points_are_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, found = Clock(monkeypatch), Timeline()
    for n in range(9000):
        clock.now += 0.01
        found.add(n, n % 3000)
    assert {block for _, _, block in found.points} == set(range(3000))
    assert len(found.points) <= 6000


def test_a_training_records_its_blocks_and_what_lies_between(tmp_path: Path) -> None:
    """What an evaluation takes is more than a step of this small network, and is the peak of the process."""

    class Large(Recorder):
        def epoch(self, trainer: object, record: dict[str, object]) -> None:
            if not self.records:
                Path("/proc/self/clear_refs").write_text("5")
                bytearray(48 * MIB)[:: 1 << 12]
            super().epoch(trainer, record)  # type: ignore[arg-type]

    found = trainer(RESIDUAL, write_data(tmp_path / "d.npz", RESIDUAL), epochs=3)
    found.run(Large())
    points = found.timeline.points
    assert {block for _, _, block in points} == {-1, 0, 1, 2}
    highest = max(points, key=lambda point: point[1])
    steps = max(size for _, size, block in points if block >= 0)
    assert highest[2] == -1
    assert highest[1] == found.process_peak_bytes
    assert 40 * MIB < highest[1] - steps < 64 * MIB
    assert sum(block >= 0 for _, _, block in points) == 27


# The arena


def planned(graphs_bytes: int | None, resident: bool) -> Plan:
    block = BlockPlan("00", 16, 1, resident, {}, 0)
    return Plan(16, "interleaved", None, 0, graphs_bytes, (block,) * 3, 0, 0, 0)


@pytest.mark.parametrize(
    ("plan", "known"),
    [(None, True), (planned(None, True), True), (planned(MIB, True), False), (planned(None, False), False)],
    ids=["no plan", "all stays", "graphs come and go", "state is paged"],
)
def test_the_arena_is_measured_where_nothing_else_grows(tmp_path: Path, plan: Plan | None, known: bool) -> None:
    found = trainer(RESIDUAL, write_data(tmp_path / "d.npz", RESIDUAL), epochs=35)
    found.plan = plan
    noted: list[tuple[int, int, int | None]] = []
    for index, block in enumerate(found.measures):
        block.add_memory = lambda number, peak, arena, index=index: noted.append((index, number, arena))  # type: ignore[method-assign, misc]
    found.run(Recorder())
    assert [(index, number) for index, number, _ in noted] == [(i, n) for n in (0, 1, 100) for i in range(3)]
    assert [arena is not None for _, _, arena in noted] == [known and number > 0 for _, number, _ in noted]


def test_an_unknown_arena_replaces_what_a_process_before_measured() -> None:
    found = BlockMeasures(peak_bytes=5, arena_bytes=7)
    found.add_memory(0, 100, None)
    assert (found.peak_bytes, found.arena_bytes) == (100, 0)
    found.add_memory(1, 90, 30)
    found.add_memory(100, 80, 40)
    assert (found.peak_bytes, found.arena_bytes) == (90, 40)
