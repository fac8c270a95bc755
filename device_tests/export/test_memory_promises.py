"""Promises M1 to M4 on real bundles, in short; `make memory` is the long form of M1 and M2 (docs/promises.md)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import memory_promises
import pytest
from memory_promises import MIB, Row

from device_tests.device.runs import ENVIRONMENT, answer, assert_same_bits, last_state
from edgelocal.bundle.folder import open_bundle
from edgelocal.memory.plan import idle_range

BATCH, STEPS = 64, 4
NETWORKS = ("mlp", "resnet8", "vgg11")  # linear layers; residual, with batch norm; max-pooling, large weights
TRAIN = ("--epochs", 1, "--batch", BATCH, "--lr", 1e-3, "--lr-schedule", "constant", "--val-every", 0)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("promises")


def bundle_of(work: Path, network: str) -> Path:
    """The bundle, exported once for all tests of this file."""
    return memory_promises.export(work, network, "auto", BATCH)


def data_of(work: Path, network: str) -> Path:
    bundle = bundle_of(work, network)
    return memory_promises.random_data(bundle.parent / "d.npz", open_bundle(bundle).manifest, BATCH, STEPS)


@pytest.fixture(scope="module", params=NETWORKS)
def rows(request: pytest.FixtureRequest, work: Path) -> list[Row]:
    """Trainings at three budgets, under RLIMIT_DATA."""
    found = memory_promises.training_rows(bundle_of(work, request.param), BATCH, STEPS, limits=(True,))
    print("", *map(memory_promises.line, found), sep="\n")
    return found


def test_m1_no_process_holds_more_than_its_budget(rows: list[Row]) -> None:
    assert [row.error for row in rows] == ["", "", ""]
    assert [row.steps for row in rows] == [STEPS] * 3
    for row in rows:
        assert 0 < row.process_peak_bytes <= row.budget_bytes, row.budget
    assert min(rows[0].micro_batches) == BATCH
    assert rows[2].budget_bytes <= rows[1].budget_bytes <= rows[0].budget_bytes


def test_m2_predictions_are_honest(rows: list[Row]) -> None:
    """Of every block; of a few MiB the pages of code that a network happens to use are a larger part."""
    for row in rows:
        for predicted, measured in row.working_set:
            most = 1.15 if measured > 16 * MIB else 1.2
            assert 1.00 <= predicted / measured <= most, row.budget


# argv: bundle, data. Trainings inside this process, as the command would do them.
INSIDE = """
import inspect, json, sys, threading
from pathlib import Path
from edgelocal.machine.budget import PeakMeter, rss_bytes
from edgelocal.cli import train as command
from edgelocal.commands.console import error_console
from edgelocal.errors import BudgetError, OverBudgetError
from edgelocal.commands.progress import Display
from edgelocal.runtime.arena import reserve, start
from edgelocal.commands.train import train
from edgelocal.commands.train_request import make_request

start()
options = command.make_context("train", sys.argv[1:2] + ["--data", sys.argv[2], "--out", "unused"]).params
options = {name: options[name] for name in inspect.signature(make_request).parameters}
options |= {"epochs": 1, "batch": 64, "lr": 1e-3, "lr_schedule": "constant", "val_every": 0}

def trained(**changes):
    return train(make_request(**options | changes), Display(error_console()), threading.Event())
"""

# argv also: folder of runs. Trainings that cannot fit: message, whether a run was begun, and growth of each.
REFUSED = """
found = []
for mib in [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]:
    out = Path(sys.argv[3]) / str(mib)
    with PeakMeter() as meter:
        try:
            trained(out=out, memory_budget=f"{mib}MiB")
        except BudgetError as error:
            found.append([mib, str(error), out.exists()])
    found[-1].append(meter.growth_bytes)
print(json.dumps(found))
"""

# argv also: folder of runs, bytes of the region, which is smaller than a whole batch needs, whatever the plan says.
SCARCE = """
region = int(sys.argv[4])
reserve(region, region)
first, second = (Path(sys.argv[3]) / name for name in ("stopped", "replanned"))
try:
    trained(out=first)
except OverBudgetError as error:
    stopped = str(error)
reports = [trained(out=first, on_oom="replan"), trained(out=second, on_oom="replan")]
print(json.dumps({"stopped": stopped, "reports": reports}))
"""

# Shared by the scripts below: one call of a function fails, for which there is no memory.
FAILING = """
import importlib

def fail(place, number, error, result=None):
    module, name = place.rsplit(".", 1)
    module = importlib.import_module(module)
    plain, calls = getattr(module, name), []
    def operation(*given, **named):
        calls.append(name)
        if len(calls) != number:
            return plain(*given, **named)
        if error is not None:
            raise error
        return result
    setattr(module, name, operation)
    return lambda: setattr(module, name, plain)

folder = Path(sys.argv[3])
"""

# argv also: folder of runs, the function that fails, and at which call of it.
FORCED = (
    FAILING
    + """
mend = fail(sys.argv[4], int(sys.argv[5]), MemoryError("forced"))
forced = trained(out=folder / "forced", micro_batch=32, on_oom="replan")
mend()
mend = fail(sys.argv[4], int(sys.argv[5]), MemoryError("forced"))
try:
    trained(out=folder / "stopped", micro_batch=32)
except OverBudgetError as error:
    stopped = str(error)
mend()
print(json.dumps([forced, trained(out=folder / "plain", micro_batch=16), stopped]))
"""
)

# argv also: folder of runs, and the batch, the failing one not counted, before which a training is killed that was
# replanned before its third. It is continued.
KILLED = (
    FAILING
    + """
fail("edgelocal.training.trainer.prepare", int(sys.argv[4]), RuntimeError("killed"))
fail("edgelocal.training.trainer.prepare", 3, MemoryError())
try:
    trained(out=folder / "killed", micro_batch=32, on_oom="replan")
except RuntimeError as error:
    assert str(error) == "killed", error
from device_tests.device.runs import last_state
progress = last_state(folder / "killed")[0]
again = [trained(out=folder / name, micro_batch=micro) for name, micro in (("killed", 32), ("plain", 16))]
print(json.dumps([progress, *again]))
"""
)

# argv also: folder of runs. The process is over its budget for a moment.
BREACH = (
    FAILING
    + """
mend = fail("edgelocal.training.watch.peak_rss_bytes", 4, None, 1 << 40)
report = trained(out=folder / "replanned", memory_budget="2GiB", on_oom="replan")
mend()
fail("edgelocal.training.watch.peak_rss_bytes", 4, None, 1 << 40)
try:
    trained(out=folder / "stopped", memory_budget="2GiB")
except OverBudgetError as error:
    print(json.dumps([report, str(error)]))
"""
)


# argv also: folder of runs. A graph that no memory is left to load, however small the micro-batches are.
HOPELESS = (
    FAILING
    + """
def load(*given, **named):
    raise OverBudgetError("gradient.onnx cannot be loaded")
loads = importlib.import_module("edgelocal.runtime.graphs")
loads.Graph = load
try:
    trained(out=folder / "hopeless", on_oom="replan")
except OverBudgetError as error:
    print(json.dumps(str(error)))
"""
)


def inside(code: str, *arguments: object) -> Any:
    line = [sys.executable, "-c", INSIDE + code, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_m3_what_cannot_fit_is_refused_before_anything_is_allocated(work: Path, tmp_path: Path) -> None:
    found = inside(REFUSED, bundle_of(work, "resnet8"), data_of(work, "resnet8"), tmp_path)
    assert [entry[0] for entry in found] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    for mib, message, begun, _ in found:
        assert re.search(rf"needs [0-9.]+ MiB while block 0\d trains .*the budget is {mib} MiB", message), message
        assert "not even a batch of one sample fits" in message
        assert not begun
    growths = [entry[3] for entry in found]
    print(f"M3: {len(found)} budgets refused, memory grew by {max(growths) / MIB:.2f} MiB at most")
    assert max(growths) < 5 * MIB


def test_m3_the_command_says_what_would_fit(work: Path, tmp_path: Path) -> None:
    bundle, data = bundle_of(work, "resnet8"), data_of(work, "resnet8")
    given = ["train", bundle, "--data", data, "--out", tmp_path / "run", *TRAIN]
    refused = answer(*given, "--memory-budget", "1MiB", code=3)
    assert refused["kind"] == "BudgetError"
    least = int(re.search(r"the smallest budget for this batch is .*\(([0-9]+) bytes\)", refused["error"])[1])  # type: ignore[index]
    short = least - 2 * MIB  # the idle process is another one each time, by some hundred KiB
    close = answer(*given, "--memory-budget", short, code=3)
    fitting = int(re.search(r"the largest --batch that fits is ([0-9]+)", close["error"])[1])  # type: ignore[index]
    assert 1 <= fitting < BATCH
    assert not (tmp_path / "run").exists()
    report = answer(*given, "--batch", fitting, "--memory-budget", short)
    assert report["process_peak_bytes"] <= short


def test_m4_memory_that_runs_out_leaves_the_last_commit_and_replan_goes_on_from_it(work: Path, tmp_path: Path) -> None:
    """In one process: a training stops for want of memory, is continued in smaller parts, and another one is begun."""
    bundle, data = bundle_of(work, "resnet8"), data_of(work, "resnet8")
    answer("train", bundle, "--data", data, "--out", tmp_path / "half", *TRAIN, "--micro-batch", BATCH // 2)
    half = answer("plan", bundle, "--batch", BATCH, "--micro-batch", BATCH // 2, "--memory-budget", "1GiB")
    found = inside(SCARCE, bundle, data, tmp_path, half["region_bytes"])
    assert "step.onnx cannot be run: out of memory" in found["stopped"]
    for report, run in zip(found["reports"], ("stopped", "replanned"), strict=True):
        assert report["steps"] == STEPS
        assert any("memory ran out" in note for note in report["notes"])
        assert {block["plan"]["micro_batch"] for block in report["blocks"]} == {BATCH // 2}
        assert_same_bits(last_state(tmp_path / run)[1], last_state(tmp_path / "half")[1])


@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("edgelocal.training.trainer.prepare", 3),  # a batch
        ("edgelocal.runtime.block._scalars", 5),  # in the middle of a step
        ("edgelocal.training.run.encode_state", 2),  # a commit
    ],
)
def test_m4_wherever_memory_runs_out_replan_goes_on_by_the_plan_for_half(
    work: Path, tmp_path: Path, place: str, call: int
) -> None:
    """As a training that begins with the smaller micro-batches: the same plan, predictions and bits."""
    forced, plain, stopped = inside(FORCED, bundle_of(work, "mlp"), data_of(work, "mlp"), tmp_path, place, call)
    assert stopped == "out of memory (forced); use a smaller --batch and a new --out, or export more blocks"
    assert (
        "memory ran out (out of memory (forced)); gone on from the last commit with micro-batches of at most 16"
        in (forced["notes"])
    )
    assert forced["steps"] == STEPS
    assert [b["plan"]["micro_batch"] for b in forced["blocks"]] == [16] * len(forced["blocks"])
    for key in ("plan", "predicted", "predicted_arena_bytes"):
        assert [b[key] for b in forced["blocks"]] == [b[key] for b in plain["blocks"]]
    own = [report["planned_peak_bytes"] - idle_range(report["idle_bytes"])[0] for report in (forced, plain)]
    assert own[0] == own[1]
    assert_same_bits(last_state(tmp_path / "forced")[1], last_state(tmp_path / "plain")[1])


def test_m4_a_run_that_is_killed_after_replanning_keeps_its_micro_batches(work: Path, tmp_path: Path) -> None:
    progress, resumed, plain = inside(KILLED, bundle_of(work, "mlp"), data_of(work, "mlp"), tmp_path, 4)
    assert (progress["micro_batch_bound"], progress["position"]["steps"]) == (16, 1)
    assert resumed["steps"] == STEPS
    assert {b["plan"]["micro_batch"] for b in resumed["blocks"]} == {16}
    assert any("memory ran out in this run before: micro-batches are of at most 16" in n for n in resumed["notes"])
    assert not any("micro-batches" in note for note in plain["notes"])
    assert_same_bits(last_state(tmp_path / "killed")[1], last_state(tmp_path / "plain")[1])


def test_m4_micro_batches_with_which_no_step_was_done_are_not_recorded(work: Path, tmp_path: Path) -> None:
    progress, resumed, _ = inside(KILLED, bundle_of(work, "mlp"), data_of(work, "mlp"), tmp_path, 3)
    assert (progress["micro_batch_bound"], progress["position"]["steps"]) == (None, 0)
    assert {b["plan"]["micro_batch"] for b in resumed["blocks"]} == {32}


def test_m4_what_smaller_micro_batches_do_not_mend_ends_the_replanning(work: Path, tmp_path: Path) -> None:
    said = inside(HOPELESS, bundle_of(work, "resnet8"), data_of(work, "resnet8"), tmp_path)
    assert said.startswith("gradient.onnx cannot be loaded; smaller micro-batches did not help")
    again = answer(
        "train",
        *(bundle_of(work, "resnet8"), "--data", data_of(work, "resnet8"), *TRAIN),
        "--out",
        tmp_path / "hopeless",
    )
    assert {block["plan"]["micro_batch"] for block in again["blocks"]} == {BATCH}  # no bound was recorded


def test_m4_a_breach_that_replanning_mends_stays_in_the_report(work: Path, tmp_path: Path) -> None:
    report, stopped = inside(BREACH, bundle_of(work, "mlp"), data_of(work, "mlp"), tmp_path)
    assert report["process_peak_bytes"] == 1 << 40
    assert report["steps"] == STEPS
    found = "the process held 1024 GiB at its peak, the budget is 2 GiB"
    gone_on = "gone on from the last commit with micro-batches of at most 32"
    assert [note for note in report["notes"] if "ran out" in note] == [f"memory ran out ({found}); {gone_on}"]
    assert stopped == f"{found}; use a smaller --batch and a new --out, or export more blocks"
