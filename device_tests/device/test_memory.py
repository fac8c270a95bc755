"""Memory that comes and goes: forced failures, long trainings, many blocks; each in a process of its own.

The promises M4 to M6 (docs/promises.md). Golden bundles have no memory model, so the arena gets its region here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from device_tests.device.runs import ENVIRONMENT, RESIDUAL

MIB = 1 << 20

# Shared by the scripts: a block with random samples, and what the process holds.
COMMON = """
import gc, hashlib, json, os, sys
from pathlib import Path
import numpy as np
from edgelocal.runtime.block import Block
from edgelocal.machine.budget import PeakMeter, rss_bytes
from edgelocal.bundle.folder import open_bundle
from edgelocal.errors import OverBudgetError
from edgelocal.runtime.graphs import GraphPool
from edgelocal.runtime.tensor import Tensor
from edgelocal.runtime.arena import give_back, reserve, start

MIB = 1 << 20
HYPER = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
start()
bundle = open_bundle(Path(sys.argv[1]))
pool = GraphPool(bundle, 2)

def batch_of(index, samples, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(bundle.manifest.blocks[index].step.inputs[0].resolve(samples), np.float32)
    return Tensor(x), Tensor(rng.integers(0, bundle.manifest.task.classes, samples))

def step(block, samples, number, release=False):
    return block.step(*batch_of(block.index, samples, number), HYPER, 0, number, release=release)

def kept(block):
    return {name: array.copy() for name, array in block.state().items()}

def bits(block):
    return hashlib.sha256(b"".join(a.tobytes() for _, a in sorted(block.state().items()))).hexdigest()

def held():
    gc.collect()
    give_back()
    return rss_bytes()

def counted():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
"""

# argv: bundle, failures (0: a process that never fails). Every failure is followed by a step that must succeed.
FAILURES = """
reserve(16 * MIB, 16 * MIB)
block, failures = Block(bundle, 0, pool), int(sys.argv[2])
messages, after = set(), []
for number in range(int(sys.argv[3])):
    if failures:
        before = kept(block)
        try:
            step(block, 20_000, number)
        except OverBudgetError as error:
            messages.add(str(error).partition(" (")[0])
            failures -= 1
        else:
            raise SystemExit("a step of 20,000 samples fitted 16 MiB")
        for name, array in block.state().items():
            np.copyto(array, before[name])
        del before, array
    step(block, 32, number, release=True)
    after.append(held())
print(json.dumps({"messages": sorted(messages), "bits": bits(block), "held": after}))
"""

# argv: bundle, steps of a turn, turns: blocks take turns, each drops its graphs at the end.
TURNS = """
reserve(16 * MIB, 16 * MIB)
blocks = [Block(bundle, index, pool) for index in range(len(bundle.manifest.blocks))]
number, seen = 0, []
for turn in range(int(sys.argv[3])):
    block = blocks[turn % len(blocks)]
    for _ in range(int(sys.argv[2])):
        step(block, 32, number, release=number % 100 < 2)
        number += 1
    block.release()
    seen.append((held(), *counted()))
print(json.dumps(seen))
"""

# argv: bundle, then the blocks that train one after the other; prints the peak above the idle process.
SEQUENCE = """
reserve(400 * MIB)
held()
with PeakMeter() as meter:
    for index in map(int, sys.argv[2:]):
        block = Block(bundle, index, pool)
        for number in range(3):
            step(block, 4000, number)
        block.release()
        del block
print(json.dumps(meter.growth_bytes))
"""


def script(code: str, *arguments: object) -> Any:
    line = [sys.executable, "-c", COMMON + code, str(RESIDUAL), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=570, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("failures", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_m4_a_step_without_memory_leaves_a_process_that_goes_on_with_the_same_bits(failures: int) -> None:
    found = script(FAILURES, failures, failures + 3)
    assert found["messages"] == ["blocks/00/step.onnx cannot be run: out of memory"]
    assert found["bits"] == script(FAILURES, 0, failures + 3)["bits"]
    held, half = found["held"], failures // 2
    growth = max(held[half:]) - held[half - 1]
    print(f"M4: {failures} forced failures, memory grew by {growth / MIB:.2f} MiB in the second half")
    assert growth < MIB
    assert max(held) - held[0] < 4 * MIB, "what the first failures leave in the heap is bounded"


@pytest.mark.parametrize(("steps", "turns"), [(10, 30), pytest.param(100, 100, marks=pytest.mark.slow)])
def test_m5_long_trainings_and_many_blocks_leave_nothing_behind(steps: int, turns: int) -> None:
    seen = script(TURNS, steps, turns)
    warm = turns // 3
    growth = max(s[0] for s in seen[warm:]) - seen[warm - 1][0]
    print(f"M5: {steps * turns} steps, {turns} turns, memory grew by {growth / MIB:.2f} MiB, then {seen[-1][1:]}")
    assert growth < MIB
    assert {tuple(s[1:]) for s in seen[warm:]} == {tuple(seen[warm][1:])}, "descriptors and threads"


def test_m6_blocks_in_turn_need_no_more_than_the_largest_alone() -> None:
    alone = [script(SEQUENCE, index) for index in range(2)]
    together = script(SEQUENCE, 0, 1, 0, 1)
    print(f"M6: alone {[round(a / MIB, 1) for a in alone]} MiB, four in turn {together / MIB:.1f} MiB")
    assert max(alone) > 20 * MIB
    assert together <= 1.10 * max(alone)
