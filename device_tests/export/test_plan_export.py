"""`edgelocal plan` on an exported network, and the training that follows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_tests.device.runs import answer, command
from device_tests.export.test_request import request
from edgelocal.exporters.pack import export_bundle

SAMPLES, TEST = 64, 16
ASSUME = ("--samples", SAMPLES, "--no-augment", "--threads", 1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "resnet8"
    export_bundle(request(blocks="per-unit", batch=32), folder, lambda text: None)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    rng = np.random.default_rng(0)
    shape = answer("inspect", bundle)["input"]
    x = rng.integers(0, 256, (SAMPLES + TEST, *shape), dtype=np.uint8)
    y = np.arange(len(x)) % 4
    path = tmp_path_factory.mktemp("data") / "d.npz"
    np.savez(path, x_train=x[:SAMPLES], y_train=y[:SAMPLES], x_test=x[SAMPLES:], y_test=y[SAMPLES:])
    return path


def plan(bundle: Path, *options: object) -> dict[str, Any]:
    return answer("plan", bundle, *ASSUME, *options)


def train(bundle: Path, data: Path, out: Path, *options: object) -> dict[str, Any]:
    fixed = ("--epochs", 1, "--lr-schedule", "constant", "--lr", 0.01, "--no-augment", "--threads", 1)
    return answer("train", bundle, "--data", data, "--out", out, *fixed, *options)


@pytest.mark.parametrize("micro", [[], ["--micro-batch", 8]])
def test_a_training_follows_the_plan(bundle: Path, data: Path, tmp_path: Path, micro: list[object]) -> None:
    planned = plan(bundle, "--memory-budget", "1GiB", *micro)
    report = train(bundle, data, tmp_path / "run", "--memory-budget", "1GiB", *micro)
    for expected, found in zip(planned["blocks"], report["blocks"], strict=True):
        kinds = set(expected["predicted"]) - {"pipeline", "total"}  # the data is assumed, not opened
        assert {k: found["predicted"][k] for k in kinds} == {k: expected["predicted"][k] for k in kinds}
        assert found["predicted"]["pipeline"] <= expected["predicted"]["pipeline"] + 1024
    assert abs(report["idle_bytes"] - planned["idle_bytes"]) < 3 << 20
    assert abs(report["planned_peak_bytes"] - planned["peak_bytes"]) < 3 << 20
    assert report["process_peak_bytes"] < 1 << 30


def test_the_smallest_budget_trains(bundle: Path, data: Path, tmp_path: Path) -> None:
    budget = plan(bundle, "--memory-budget", "1GiB")["thresholds"]["smallest_bytes"]
    report = train(bundle, data, tmp_path / "run", "--memory-budget", budget)
    assert report["process_peak_bytes"] <= budget


def test_a_training_on_image_files_keeps_the_smallest_budget_that_it_names(bundle: Path, tmp_path: Path) -> None:
    """Pillow and its decoders take 4 to 5 MiB, which belong to the idle process."""
    image = pytest.importorskip("PIL.Image")
    channels, height, width = answer("inspect", bundle)["input"]
    pixels = np.random.default_rng(1).integers(0, 256, (SAMPLES, height, width, channels), dtype=np.uint8)
    for i, array in enumerate(pixels):
        path = tmp_path / "images" / f"c{i % 10}" / f"{i}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(array.squeeze()).convert("RGB").save(path)
    given = (
        "train",
        bundle,
        "--data",
        tmp_path / "images",
        "--out",
        tmp_path / "run",
        "--epochs",
        1,
        "--lr-schedule",
        "constant",
    )
    refused = answer(*given, "--memory-budget", "1MiB", code=3)["error"]
    least = re.search(r"smallest budget for this batch is .*\(([0-9]+) bytes\)", refused)
    assert least is not None
    budget = int(least[1])
    assert answer(*given, "--memory-budget", budget)["process_peak_bytes"] <= budget


def test_a_run_goes_on_with_the_micro_batches_it_was_begun_with(bundle: Path, data: Path, tmp_path: Path) -> None:
    begun = train(bundle, data, tmp_path / "run", "--micro-batch", 8)
    (tmp_path / "run/report.json").unlink()  # so that it is made anew, with the plan of the day
    again = train(bundle, data, tmp_path / "run", "--memory-budget", "1GiB")
    for report in (begun, again):
        assert {b["plan"]["micro_batch"] for b in report["blocks"]} == {8}
        assert not [note for note in report["notes"] if "micro-batches" in note]
    (tmp_path / "run/report.json").unlink()
    smaller = train(bundle, data, tmp_path / "run", "--micro-batch", 4)
    assert {b["plan"]["micro_batch"] for b in smaller["blocks"]} == {4}
    assert any("micro-batches that the run was begun with do not fit" in note for note in smaller["notes"])


def test_a_profile_and_the_table(bundle: Path) -> None:
    options = ("--profile", "raspberry-pi-zero-2w", "--memory-budget", "60%")
    done = command("plan", bundle, *options)
    assert done.returncode == 0
    for part in ("units", "predicted peak of the process", "Raspberry Pi Zero 2 W", "graphs: all stay loaded"):
        assert part in done.stdout
    blocks = answer("plan", bundle, *options)["blocks"]
    rows = [line for line in done.stdout.splitlines() if line.strip()[:2] in {b["name"] for b in blocks}]
    assert len(rows) == len(blocks)
    for block, row in zip(blocks, rows, strict=True):
        assert f" {block['predicted']['total'] / 2**20:.1f} " in row


def test_without_a_profile_this_machine_is_measured(bundle: Path) -> None:
    here = answer("doctor")["device"]
    result = answer("plan", bundle, "--memory-budget", "50%")
    assert result["profile"] is None
    assert result["threads"] == here["cores"]
    assert result["usable_bytes"] == pytest.approx(here["memory_available_bytes"], rel=0.5)
    assert result["budget_bytes"] == result["usable_bytes"] // 2


def test_what_fits_nowhere_exits_with_3(bundle: Path) -> None:
    result = answer("plan", bundle, "--memory-budget", "8MiB", code=3)
    assert result["kind"] == "BudgetError"
    assert "smallest budget for this batch" in result["error"]


def test_milliseconds(bundle: Path) -> None:
    assert min(plan(bundle, "--memory-budget", "1GiB")["plan_ms"] for _ in range(3)) < 50
