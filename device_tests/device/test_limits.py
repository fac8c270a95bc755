"""Limits met by the real commands in the middle of their work: memory, disk, odd names, wrong arguments."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_tests.device.runs import ENVIRONMENT, RESIDUAL, answer, command, copy_bundle, last_state, write_data

MIB = 1 << 20


CONSTANT = ("--lr-schedule", "constant")  # a cosine of one epoch trains nothing and is refused


def train(folder: Path, *extra: object) -> list[object]:
    return ["train", RESIDUAL, "--data", folder / "d.npz", "--out", folder / "run", "--val-every", 0, *extra]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object], dict[str, Any]]:
    """(folder with data, options, report) of a training whose batches are large beside the idle process."""
    folder = tmp_path_factory.mktemp("wide")
    write_data(folder / "d.npz", RESIDUAL, samples=8000, test=4)
    options: list[object] = ["--epochs", 1, *CONSTANT, "--batch", 4000, "--checkpoint-steps", 1]
    report = answer("train", RESIDUAL, "--data", folder / "d.npz", "--out", folder / "free", *options)
    return folder, options, report


def test_a_budget_met_in_the_middle_ends_with_3_and_the_last_commit(
    wide: tuple[Path, list[object], dict[str, Any]], tmp_path: Path
) -> None:
    folder, options, report = wide
    budget = (report["process_peak_bytes"] - 20 * MIB) // MIB * MIB
    given = ["train", RESIDUAL, "--data", folder / "d.npz", "--out", tmp_path / "run", *options]
    result = answer(*given, "--memory-budget", f"{budget // MIB}MiB", code=3)
    assert result["kind"] == "OverBudgetError"
    assert "out of memory" in result["error"]  # the arena may take no more than the budget leaves
    assert "raise --memory-budget, use a smaller --batch" in result["error"]
    assert last_state(tmp_path / "run")[0]["position"]["steps"] < 2
    again = answer(*given, "--memory-budget", "8GiB")  # the budget decides no bits, so it may change
    assert again["steps"] == 2
    assert again["budget_bytes"] == 8 << 30
    assert again["validation"] == report["validation"]


def test_a_budget_that_is_kept_is_shown_beside_what_was_held(wide: tuple[Path, list[object], dict[str, Any]]) -> None:
    _, _, report = wide
    assert report["budget_bytes"] is None
    assert 60 * MIB < report["process_peak_bytes"] < 2048 * MIB


def test_what_cannot_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_data(tmp_path / "d.npz", RESIDUAL)
    result = answer(*train(tmp_path, "--memory-budget", "20MB"), code=3)
    assert "before the first step, the budget is 19.1 MiB; raise --memory-budget" in result["error"]
    assert not (tmp_path / "run").exists()


def limited(size: int, *arguments: object) -> tuple[int, dict[str, Any]]:
    """(exit code, object) of a command that may write no file larger than `size` bytes."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    line = [sys.executable, "-m", "edgelocal", *map(str, arguments), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, check=False, preexec_fn=limit)
    return done.returncode, json.loads(done.stdout)


def test_a_cache_that_does_not_fit_the_disk_is_refused_and_the_run_goes_on_without_losing_a_step(
    tmp_path: Path,
) -> None:
    write_data(tmp_path / "d.npz", RESIDUAL, samples=600)  # 600 * 256 bytes of block output, 60 KiB of checkpoint
    given = train(tmp_path, "--schedule", "sequential", "--cache", "float32", "--no-augment", "--epochs", 1, *CONSTANT)
    code, result = limited(100_000, *given)
    assert (code, result["kind"]) == (8, "StorageError")
    assert "no room for a cache of 153600 bytes" in result["error"]
    assert "leave --cache out" in result["error"]
    assert not (tmp_path / "run" / "cache").exists()
    assert last_state(tmp_path / "run")[0]["position"] == {"stage": 1, "epoch": 0, "batch": 0, "steps": 38}
    assert answer(*given)["steps"] == 3 * 38


def test_a_model_that_does_not_fit_the_disk_leaves_no_folder(tmp_path: Path) -> None:
    write_data(tmp_path / "d.npz", RESIDUAL)
    answer(*train(tmp_path, "--epochs", 1, *CONSTANT))
    code, result = limited(1000, "finish", tmp_path / "run", "--out", tmp_path / "model")
    assert (code, result["kind"]) == (8, "StorageError")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.npz", "run"]
    assert answer("finish", tmp_path / "run", "--out", tmp_path / "model")["tensors"] > 0
    assert "exists already" in answer("finish", tmp_path / "run", "--out", tmp_path / "model", code=2)["error"]


def test_a_file_in_place_of_the_run_is_kept(tmp_path: Path) -> None:
    write_data(tmp_path / "d.npz", RESIDUAL)
    (tmp_path / "run").write_text("mine")
    result = answer(*train(tmp_path), code=2)
    assert "exists and is not a run" in result["error"]
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("name", ["[/red]", "[bold]x", "ü☃ --json"])
def test_names_that_mean_something_elsewhere_are_only_names(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    write_data(folder / "d.npz", RESIDUAL)
    done = command(*train(folder, "--epochs", 1, *CONSTANT))
    assert done.returncode == 0, done.stderr
    shown = command("eval", folder / "run", "--data", folder / "d.npz")
    assert (shown.returncode, shown.stderr) == (0, "")
    bundle = copy_bundle(RESIDUAL, folder / "bundle")
    assert f"{bundle}: 12 files, all whole" in command("verify", bundle).stdout
    assert f"wrote {folder}/m/model.onnx" in command("finish", folder / "run", "--out", folder / "m").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "bundle"], "Missing option '--data'"),
        (["inspect"], "Missing argument 'BUNDLE'"),
        (["train", "b", "--data", "d", "--out", "o", "--schedule", "random"], "'random' is not one of"),
        (["train", "b", "--data", "d", "--out", "o", "--epochs", "many"], "'many' is not a valid integer"),
        (["train", "b", "--data", "d", "--out", "o", "--threads", "0"], "0 is not in the range 1<=x<=256"),
        (["trian"], "No such command 'trian'"),
        (["verify", "b", "--fast"], "No such option"),
    ],
)
def test_wrong_arguments_are_one_object_too(arguments: list[str], message: str) -> None:
    result = answer(*arguments, code=2)
    assert message in result["error"]
    assert result["exit_code"] == 2


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("run.json", "", "is damaged"),
        ("run.json", "[]", "is damaged"),
        ("run.json", '{"format": "edgelocal-run", "schema": 2}', "this edgelocal reads edgelocal-run 1"),
        ("run.json", '{"format": "other", "schema": 1}', "has format other 1"),
    ],
)
def test_a_run_that_cannot_be_read_is_refused(tmp_path: Path, file: str, text: str, message: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text(text)
    for given in (
        ["eval", tmp_path / "run", "--data", tmp_path],
        ["finish", tmp_path / "run", "--out", tmp_path / "m"],
    ):
        assert message in answer(*given, code=4)["error"]


def test_infinite_pixels_in_the_last_sample_are_named_and_the_commits_before_stand(tmp_path: Path) -> None:
    x, y = np.zeros((64, 8, 8), np.float32), np.arange(64) % 4
    x[63, 7, 7] = np.inf
    np.savez(tmp_path / "d.npz", x=x, y=y)
    result = answer(*train(tmp_path, "--checkpoint-steps", 1, "--epochs", 1, *CONSTANT), code=5)
    assert "sample 63 holds NaN, Inf" in result["error"]
    assert 0 <= last_state(tmp_path / "run")[0]["position"]["steps"] < 4
