"""Paged runs: states that do not fit the budget together are never in memory together, also where a run is continued;
and nothing stays behind on disk."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from device_tests.device.runs import ENVIRONMENT, answer, assert_same_bits, last_state, watched

MIB = 1 << 20
WIDTH, LAYERS, BATCH, STEPS = 1024, 5, 32, 3
NETWORK = f"""
from torch import nn

def deep(classes, input_shape):
    layers = [layer for _ in range({LAYERS}) for layer in (nn.Linear({WIDTH}, {WIDTH}), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear({WIDTH}, classes))
"""

# Runs argv with files of at most 1 MiB; what is larger is refused, as by a full disk.
LIMITED = """
import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The words of a training whose states are paged, but for --out."""
    folder = tmp_path_factory.mktemp("deep")
    (folder / "net.py").write_text(NETWORK)
    options = ("--input", f"1x8x{WIDTH // 8}", "--blocks", "per-unit", "--aux-depth", 1, "--optimizer", "adamw")
    bundle = folder / "bundle"
    answer("export", f"{folder}/net.py:deep", bundle, *options, "--batch", BATCH, "--no-flip", "--pad", 0)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (BATCH * STEPS, 1, 8, WIDTH // 8), dtype=np.uint8)
    np.savez(folder / "d.npz", x=x, y=rng.integers(0, 10, len(x)))
    words = ["train", bundle, "--data", folder / "d.npz", "--batch", BATCH, "--lr", 1e-3, "--val-every", 0]
    refused = answer(*words, "--out", folder / "none", "--memory-budget", "1MiB", code=3)
    least = int(re.search(r"the smallest budget for this batch is .*\(([0-9]+) bytes\)", refused["error"])[1])  # type: ignore[index]
    return [*words, "--epochs", 2, "--memory-budget", least]


def line(*words: object) -> list[str]:
    return [sys.executable, "-m", "edgelocal", *map(str, words), "--json"]


def kill_in_the_middle(out: Path, *words: object) -> None:
    """Train until there are checkpoints of the first epoch, and be killed."""
    process = subprocess.Popen(line(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    while not (out / "state" / "00000003.ckpt").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of a process are Linux's")
def test_a_paged_run_is_continued_within_the_budget_it_was_begun_with(given: list[object], tmp_path: Path) -> None:
    budget = given[-1]
    assert isinstance(budget, int)
    whole, peak = watched(*given, "--out", tmp_path / "whole")
    assert peak <= budget
    assert [block["plan"]["resident"] for block in whole["blocks"]].count(False) >= LAYERS - 1

    out = tmp_path / "run"
    kill_in_the_middle(out, *given, "--out", out, "--checkpoint-steps", 1)
    steps = last_state(out)[0]["position"]["steps"]
    assert 0 < steps < 2 * STEPS
    size = max((out / "state").glob("*.ckpt")).stat().st_size
    assert size > budget - whole["idle_bytes"], "the states together are what the budget has no room for"
    report, peak = watched(*given, "--out", out, "--resume", "must")
    print(f"continued at {steps} steps: {peak / MIB:.1f} of {budget / MIB:.1f} MiB, checkpoint {size / MIB:.1f} MiB")
    assert peak <= budget
    assert report["steps"] == 2 * STEPS
    assert_same_bits(last_state(out)[1], last_state(tmp_path / "whole")[1])
    assert not (out / "cache").exists()


def test_a_start_that_the_disk_refuses_leaves_no_pages(given: list[object], tmp_path: Path) -> None:
    """A limit on the size of files that the state of one block is above."""
    limited = [sys.executable, "-c", LIMITED, *line(*given, "--out", tmp_path / "run")]
    done = subprocess.run(limited, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False)
    assert done.returncode == 8, done.stderr
    assert "paging a block out" in done.stderr
    assert not (tmp_path / "run" / "cache").exists()
