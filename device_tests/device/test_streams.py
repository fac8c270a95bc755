"""Commands whose output nobody reads or can be written, that are interrupted early, and what they say of their peak."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_tests.device.runs import ENVIRONMENT, RESIDUAL, answer, last_state, watched, write_data

EPOCHS = 3


def train(folder: Path, *extra: object) -> list[str]:
    data = write_data(folder / "d.npz", RESIDUAL)
    given = ["train", RESIDUAL, "--data", data, "--out", folder / "run", "--epochs", EPOCHS, *extra]
    return [sys.executable, "-m", "edgelocal", *map(str, given)]


def test_a_log_that_nobody_reads_does_not_end_the_training(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(train(tmp_path), stdout=subprocess.PIPE, stderr=writer, env=ENVIRONMENT, timeout=60)
    os.close(writer)
    assert done.returncode == 0
    assert last_state(tmp_path / "run")[0]["position"]["steps"] == 3 * EPOCHS


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_behind_the_log_does_not_end_the_training(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            train(tmp_path, "--json"), stdout=subprocess.PIPE, stderr=full, env=ENVIRONMENT, timeout=60
        )
    assert done.returncode == 0
    assert json.loads(done.stdout)["steps"] == 3 * EPOCHS


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("command", ["train", "inspect", "verify", "doctor"])
def test_a_result_that_cannot_be_written_is_said_and_exits_with_8(tmp_path: Path, command: str, as_json: bool) -> None:
    lines = {
        "train": train(tmp_path),
        "doctor": [sys.executable, "-m", "edgelocal", "doctor"],
        "inspect": [sys.executable, "-m", "edgelocal", "inspect", str(RESIDUAL)],
        "verify": [sys.executable, "-m", "edgelocal", "verify", str(RESIDUAL)],
    }
    line = [*lines[command], *(["--json"] if as_json else [])]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 8
    assert "the result cannot be written to stdout" in done.stderr
    assert "Traceback" not in done.stderr
    if command == "train":
        assert last_state(tmp_path / "run")[0]["position"]["steps"] == 3 * EPOCHS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_exits_with_7(tmp_path: Path, number: signal.Signals) -> None:
    """Sent as soon as the process listens, again and again until one is sent before the first step."""
    line = train(tmp_path, "--json")
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while not _handles(process.pid, number):
        assert process.poll() is None, process.stderr
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 7, err
    assert json.loads(out)["exit_code"] == 7
    assert "Traceback" not in err
    assert answer(*line[3:-1])["steps"] == 3 * EPOCHS


def _handles(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal that is not Python's own for SIGINT, which comes later."""
    modules = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line for line in modules.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1) and bool(caught >> (number - 1) & 1)


def test_a_second_signal_ends_at_once_with_a_message(tmp_path: Path) -> None:
    line = train(tmp_path, "--json")
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs start with it ignored
        "from edgelocal.training import trainer\n"
        "step = trainer.Trainer._step\n"
        "def twice(*a):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:\n"  # two at once count as one
        "        time.sleep(0.001)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(5)\n"  # for as long as it takes to be delivered
        "    return step(*a)\n"
        "trainer.Trainer._step = twice\n"
        "from edgelocal.cli import main\n"
        "main()\n"
    )
    line = [sys.executable, "-c", code, *line[3:]]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 7
    assert json.loads(done.stdout)["error"] == "interrupted; what was committed before stands"
    assert "stopping after this step; a second signal stops at once" in done.stderr
    assert last_state(tmp_path / "run")[0]["position"]["steps"] == 0


def test_a_bad_sample_in_the_middle_commits_what_was_trained_before(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((64, 8, 8), dtype=np.float32), np.arange(64) % 4
    x[63] = np.nan
    np.savez(tmp_path / "d.npz", x=x, y=y)
    given: list[object] = ["train", RESIDUAL, "--data", tmp_path / "d.npz", "--out", tmp_path / "run", "--batch", 4]
    found: dict[str, Any] = answer(*given, "--epochs", 2, "--seed", 3, code=5)
    assert "not finite" in found["error"] or "NaN" in found["error"]
    steps = last_state(tmp_path / "run")[0]["position"]["steps"]
    assert 0 < steps < 16


def test_the_process_peak_is_that_of_the_process(tmp_path: Path) -> None:
    """What the kernel counted of the whole process, reading and augmenting the data included."""
    write_data(tmp_path / "d.npz", RESIDUAL, samples=20_000)
    given = ["train", RESIDUAL, "--data", tmp_path / "d.npz", "--out", tmp_path / "run", "--epochs", 2, "--batch", 5000]
    report, seen = watched(*given)
    assert report["process_peak_bytes"] == pytest.approx(seen, rel=0.02)  # looked at every 2 ms
