"""Kills and signals on the real command: an interrupted run ends with the bits of an uninterrupted one."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from device_tests.device.runs import DROPOUT, ENVIRONMENT, RESIDUAL, assert_same_bits, command, last_state, write_data

pytestmark = pytest.mark.kills
KILLS = 6
EPOCHS = 60


def arguments(bundle: Path, data: Path, out: Path, schedule: str) -> list[str]:
    given = ["train", bundle, "--data", data, "--out", out, "--schedule", schedule, "--checkpoint-steps", 7]
    return [str(a) for a in [*given, "--epochs", EPOCHS, "--batch", 16, "--val-every", 20]]


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def start(given: list[str]) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "edgelocal", *given]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def newest(run: Path) -> int:
    """Number of the last checkpoint, 0 without one."""
    return max((int(p.stem) for p in (run / "state").glob("*.ckpt")), default=0)


def wait_for_steps(run: Path, process: subprocess.Popen[str], commits: int = 2) -> None:
    """Until the run has made so many commits from now on, or ended; starting it anew makes the first."""
    goal = newest(run) + commits
    for _ in range(20_000):
        if process.poll() is not None or newest(run) >= goal:
            return
        time.sleep(0.003)


@pytest.mark.parametrize(
    ("bundle", "schedule"), [(RESIDUAL, "interleaved"), (RESIDUAL, "sequential"), (DROPOUT, "interleaved")]
)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path, bundle: Path, schedule: str) -> None:
    data = write_data(tmp_path / "d.npz", bundle)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(*arguments(bundle, data, whole, schedule)).returncode == 0
    dice = random.Random(f"{bundle.name} {schedule}")
    survived = 0
    for _ in range(KILLS):
        process = start(arguments(bundle, data, killed, schedule))
        wait_for_steps(killed, process, dice.randint(1, 4))
        time.sleep(dice.uniform(0, 0.05))
        survived += process.poll() is not None
        process.kill()
        process.communicate()
    assert survived < KILLS // 2  # most were killed in the middle of their work
    done = command(*arguments(bundle, data, killed, schedule))
    assert done.returncode == 0, done.stderr
    assert_same_bits(last_state(whole)[1], last_state(killed)[1])
    assert metrics(whole) == metrics(killed)
    assert last_state(whole)[0]["position"] == last_state(killed)[0]["position"]
    assert not [p for p in (killed / "state").iterdir() if p.suffix != ".ckpt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_commits_and_exits_with_7(tmp_path: Path, number: signal.Signals) -> None:
    data = write_data(tmp_path / "d.npz", RESIDUAL)
    run = tmp_path / "run"
    given = [*arguments(RESIDUAL, data, run, "interleaved"), "--json"]
    process = start(given)
    wait_for_steps(run, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 7, err
    answer = json.loads(out)
    assert answer["exit_code"] == 7
    steps = last_state(run)[0]["position"]["steps"]
    assert f"after step {steps} of" in answer["error"]
    assert command(*given).returncode == 0
    assert last_state(run)[0]["position"]["steps"] == EPOCHS * 3


def test_a_second_process_is_refused_while_the_first_trains(tmp_path: Path) -> None:
    data = write_data(tmp_path / "d.npz", RESIDUAL)
    run = tmp_path / "run"
    first = start(arguments(RESIDUAL, data, run, "interleaved"))
    wait_for_steps(run, first)
    second = command(*arguments(RESIDUAL, data, run, "interleaved"))
    busy = first.poll() is None
    assert first.wait(timeout=60) == 0
    first.communicate()
    assert busy
    assert second.returncode == 2
    assert "another process" in second.stderr
