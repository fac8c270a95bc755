"""The training loop on the golden bundles, inside this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_tests.device.runs import DROPOUT, RESIDUAL, Recorder, assert_same_bits, state_of, trainer, write_data
from edgelocal.bundle.folder import open_bundle
from edgelocal.errors import BudgetError, DivergedError, InterruptedRunError
from edgelocal.machine.budget import rss_bytes
from edgelocal.storage.tensors import Array
from edgelocal.training.blocks import load_blocks
from edgelocal.training.stages import Stage, stages
from edgelocal.training.trainer import Trainer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "residual.npz", RESIDUAL)


def trained(data: Path, bundle: Path = RESIDUAL, **changes: object) -> tuple[dict[str, Array], Recorder]:
    """Final state and what the watcher saw."""
    watcher = Recorder()
    found = trainer(bundle, data, **changes)  # type: ignore[arg-type]
    found.run(watcher)
    return state_of(found.blocks), watcher


def test_stages_of_the_schedules() -> None:
    assert stages("interleaved", 3) == (Stage(range(0), range(3)),)
    assert stages("sequential", 3) == tuple(Stage(range(k), range(k, k + 1)) for k in range(3))


@pytest.mark.parametrize("schedule", ["interleaved", "sequential"])
def test_the_losses_of_all_blocks_fall(data: Path, schedule: str) -> None:
    _, watcher = trained(data, schedule=schedule, epochs=20, lr=0.05)
    for name in ("00", "01", "02"):
        losses = [r["blocks"][name]["loss"] for r in watcher.records if name in r["blocks"]]
        assert len(losses) == 20
        assert losses[-1] < 0.8 * losses[0]
    assert watcher.records[-1]["validation"]["accuracy"] >= 0.75


@pytest.mark.parametrize("schedule", ["interleaved", "sequential"])
@pytest.mark.parametrize("bundle", [RESIDUAL, DROPOUT])
def test_the_same_run_gives_the_same_bits_with_one_thread_or_two(tmp_path: Path, bundle: Path, schedule: str) -> None:
    data = write_data(tmp_path / "d.npz", bundle)
    augment = bundle == RESIDUAL
    first, _ = trained(data, bundle, schedule=schedule, augment=augment)
    again, _ = trained(data, bundle, schedule=schedule, augment=augment)
    two, _ = trained(data, bundle, schedule=schedule, augment=augment, threads=2)
    assert_same_bits(first, again)
    assert_same_bits(first, two)


def test_another_seed_gives_another_run(data: Path) -> None:
    first, other = (trained(data, seed=seed)[0] for seed in (1, 2))
    assert any(first[n].tobytes() != other[n].tobytes() for n in first)


def test_a_frozen_block_does_not_change(data: Path) -> None:
    """After its stage, block 00 keeps every bit while the others train."""
    found = trainer(RESIDUAL, data, schedule="sequential")
    watcher = Recorder(stop_at=2 * 3)  # 48 samples, batch 16, 2 epochs: the end of the first stage
    with pytest.raises(InterruptedRunError):
        found.run(watcher)
    before = {n: a for n, a in state_of(found.blocks).items() if n.startswith("00:")}
    after, _ = trained(data, schedule="sequential")
    assert_same_bits(before, {n: after[n] for n in before})


def test_a_cache_of_outputs_gives_the_same_training(data: Path, tmp_path: Path) -> None:
    plain, _ = trained(data, schedule="sequential")
    found = trainer(RESIDUAL, data, tmp_path / "cache", schedule="sequential")
    found.config = replace(found.config, cache="float32")
    found.run(Recorder())
    state = state_of(found.blocks)
    for name, array in plain.items():
        np.testing.assert_allclose(state[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_last_batch_may_be_short_or_a_single_sample(tmp_path: Path) -> None:
    data = write_data(tmp_path / "d.npz", RESIDUAL, samples=33)
    state, watcher = trained(data)
    assert watcher.steps == 2 * 3
    assert all(np.isfinite(a).all() for a in state.values())


def test_the_score_of_an_epoch_covers_every_sample_once(data: Path) -> None:
    found = trainer(RESIDUAL, data)
    seen: list[int] = []
    watcher = Recorder()
    watcher.epoch = lambda t, record: seen.append(record["steps"])  # type: ignore[method-assign]
    found.run(watcher)
    assert seen == [3, 6]
    assert found.total_steps == 6


def test_a_stop_is_committed_after_the_step(data: Path) -> None:
    watcher = Recorder(stop_at=2)
    with pytest.raises(InterruptedRunError, match="after step 2 of 6"):
        trainer(RESIDUAL, data).run(watcher)
    assert watcher.commits == [2]


def test_a_stop_at_any_chance_loses_nothing(data: Path, tmp_path: Path) -> None:
    """In a step, a validation or while a cache is filled: going on ends with the same bits and the same records."""

    def fresh() -> Trainer:
        found = trainer(RESIDUAL, data, tmp_path / "cache", schedule="sequential", epochs=1, lr_schedule="constant")
        found.config = replace(found.config, cache="float32")
        return found

    whole, watcher = fresh(), Recorder()
    whole.run(watcher)
    steps, validations, fills = 3 * 3, 3 * 1, 2 * 3
    assert watcher.asked == 1 + steps + validations + fills
    for ask in range(1, watcher.asked + 1):
        first, before, after = fresh(), Recorder(stop_ask=ask), Recorder()
        with pytest.raises(InterruptedRunError):
            first.run(before)
        assert before.commits[-1] == first.position.steps
        assert list((tmp_path / "cache").glob("*")) == []
        second = fresh()
        second.blocks = load_blocks(open_bundle(RESIDUAL), 1, state_of(first.blocks))
        second.position, second.measures = first.position, first.measures
        second.run(after)
        assert_same_bits(state_of(second.blocks), state_of(whole.blocks))
        assert without_times(before.records + after.records) == without_times(watcher.records)


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def test_divergence_ends_the_run_before_the_state_is_taken_over(data: Path) -> None:
    found = trainer(RESIDUAL, data, lr=1e30, lr_schedule="constant")
    with pytest.raises(DivergedError, match=r"the loss became (nan|inf)"):
        found.run(Recorder())


def test_a_budget_below_what_is_held_stops_before_the_first_step(data: Path) -> None:
    found = trainer(RESIDUAL, data)
    found.memory.budget_bytes = rss_bytes() // 2
    watcher = Recorder()
    with pytest.raises(BudgetError, match="the budget is"):
        found.run(watcher)
    assert watcher.steps == 0
    assert watcher.commits == []


def test_a_peak_from_before_is_reported_and_not_held_against_the_budget(data: Path) -> None:
    found = trainer(RESIDUAL, data)
    found.memory.budget_bytes, found.memory.process_peak_bytes = 1 << 40, 1 << 41
    found.run(Recorder())
    assert found.memory.process_peak_bytes == 1 << 41


def test_validation_only_as_often_as_asked(data: Path) -> None:
    found = trainer(RESIDUAL, data, epochs=4)
    found.validate_every = 2
    watcher = Recorder()
    found.run(watcher)
    assert ["validation" in r for r in watcher.records] == [False, True, False, True]
