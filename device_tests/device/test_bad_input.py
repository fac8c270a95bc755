"""Bad input to the real commands: a clear message, its exit code, nothing lost and nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from device_tests.device.runs import (
    DROPOUT,
    ENVIRONMENT,
    RESIDUAL,
    answer,
    command,
    copy_bundle,
    last_state,
    write_data,
)

Prepare = Callable[[Path], list[object]]


CONSTANT = ("--lr-schedule", "constant")  # a cosine of one epoch trains nothing and is refused


def train(folder: Path, *extra: object, bundle: Path = RESIDUAL, data: Path | None = None) -> list[object]:
    data = data or write_data(folder / "d.npz", bundle)
    return ["train", bundle, "--data", data, "--out", folder / "run", *extra]


def arrays(folder: Path, x: object, y: object) -> Path:
    np.savez(folder / "bad.npz", x=np.asarray(x), y=np.asarray(y))
    return folder / "bad.npz"


def images(folder: Path, size: int = 8, classes: int = 4) -> Path:
    root = folder / "images"
    for c in range(classes):
        (root / f"c{c}").mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((size, size), 60 * c + i, dtype=np.uint8)).save(root / f"c{c}" / f"{i}.png")
    return root


def truncated(folder: Path) -> Path:
    root = images(folder)
    victim = root / "c1" / "1.png"
    victim.write_bytes(victim.read_bytes()[:50])
    return root


def unreadable(folder: Path) -> Path:
    root = images(folder)
    (root / "c2" / "0.png").write_bytes(b"this is no image")
    return root


def empty_class(folder: Path) -> Path:
    root = images(folder)
    shutil.rmtree(root / "c3")
    (root / "c3").mkdir()
    return root


def damaged_bundle(folder: Path) -> Path:
    bundle = copy_bundle(RESIDUAL, folder / "b")
    data = bytearray((bundle / "blocks/01/step.onnx").read_bytes())
    data[1000] ^= 1
    (bundle / "blocks/01/step.onnx").write_bytes(data)
    return bundle


def incomplete_bundle(folder: Path) -> Path:
    bundle = copy_bundle(RESIDUAL, folder / "b")
    (bundle / "blocks/02/weights.safetensors").unlink()
    return bundle


def newer_bundle(folder: Path) -> Path:
    return copy_bundle(RESIDUAL, folder / "b", lambda m: m.update(schema=99))


def x(value: float = 0.0, shape: tuple[int, ...] = (8, 1, 8, 8)) -> np.ndarray:  # type: ignore[type-arg]
    samples = np.zeros(shape, dtype=np.float32)
    samples[3, ...] = value
    return samples


LABELS = [0, 1, 2, 3, 0, 1, 2, 3]

CASES: dict[str, tuple[Prepare, int, str]] = {
    "label out of range": (lambda f: train(f, data=arrays(f, x(), [*LABELS[:7], 4])), 5, "4"),
    "negative label": (lambda f: train(f, data=arrays(f, x(), [*LABELS[:7], -1])), 5, "-1"),
    "NaN": (lambda f: train(f, data=arrays(f, x(np.nan), LABELS)), 5, "sample 3 holds NaN"),
    "wrong size": (lambda f: train(f, data=arrays(f, x(shape=(8, 1, 9, 9)), LABELS)), 5, "9"),
    "labels missing": (lambda f: train(f, data=arrays(f, x(), LABELS[:5])), 5, "5 labels for 8 samples"),
    "float labels": (lambda f: train(f, data=arrays(f, x(), np.full(8, 0.5))), 5, "float64"),
    "no samples": (lambda f: train(f, data=arrays(f, x()[:0], np.zeros(0, np.int64))), 5, "no samples"),
    "classes that disagree": (lambda f: train(f, data=images(f, classes=5)), 5, "5 class folders"),
    "wrong image size": (lambda f: train(f, data=images(f, size=10)), 5, "10"),
    "truncated image": (lambda f: train(f, "--no-augment", data=truncated(f)), 5, "1.png"),
    "unreadable image": (lambda f: train(f, data=unreadable(f)), 5, "0.png"),
    "empty class folder": (lambda f: train(f, data=empty_class(f)), 5, "c3"),
    "missing data": (lambda f: train(f, data=f / "nowhere"), 5, "nowhere"),
    "damaged bundle": (
        lambda f: train(f, bundle=damaged_bundle(f), data=write_data(f / "d.npz", RESIDUAL)),
        4,
        "damaged",
    ),
    "incomplete bundle": (
        lambda f: train(f, bundle=incomplete_bundle(f), data=write_data(f / "d.npz", RESIDUAL)),
        4,
        "weights.safetensors is missing",
    ),
    "newer bundle": (lambda f: train(f, bundle=newer_bundle(f), data=f), 4, "schema 99"),
    "no bundle": (lambda f: train(f, bundle=f, data=f), 4, "is not a bundle"),
    "budget below the idle process": (lambda f: train(f, "--memory-budget", "8MiB"), 3, "the budget is 8 MiB"),
    "budget without a unit": (lambda f: train(f, "--memory-budget", "lots"), 2, "lots"),
    "batch of none": (lambda f: train(f, "--batch", 0), 2, "batch is 0"),
    "no epochs": (lambda f: train(f, "--epochs", 0), 2, "epochs is 0"),
    "learning rate that is none": (lambda f: train(f, "--lr", "nan"), 2, "lr is nan"),
    "unknown hyper-parameter": (lambda f: train(f, "--hyper", "beta3=1"), 2, "beta3"),
    "cache while interleaved": (lambda f: train(f, "--cache", "float32"), 2, "sequential"),
    "nothing to continue": (lambda f: train(f, "--resume", "must"), 2, "no run to continue"),
    "eval of no run": (lambda f: ["eval", f, "--data", f], 4, "is not a run"),
    "finish of no run": (lambda f: ["finish", f, "--out", f / "model"], 4, "is not a run"),
    "inspect of no bundle": (lambda f: ["inspect", f], 4, "is not a bundle"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_its_exit_code(tmp_path: Path, name: str) -> None:
    prepare, code, message = CASES[name]
    result = answer(*prepare(tmp_path), code=code)
    assert message in result["error"]
    assert result["exit_code"] == code
    run = tmp_path / "run"
    assert not (run / "report.json").exists()
    if (run / "state").is_dir():  # it had begun: its first state is whole
        assert last_state(run)[0]["position"]["steps"] >= 0


def test_a_folder_that_holds_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("dear")
    result = answer(*train(tmp_path), code=2)
    assert "exists and is not a run" in result["error"]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["letter.txt"]


def test_resume_never_keeps_the_run_that_is_there(tmp_path: Path) -> None:
    answer(*train(tmp_path, "--epochs", 1, *CONSTANT))
    before = last_state(tmp_path / "run")[0]
    assert "exists" in answer(*train(tmp_path, "--epochs", 1, *CONSTANT, "--resume", "never"), code=2)["error"]
    assert last_state(tmp_path / "run")[0] == before


def test_a_run_is_not_continued_with_another_bundle_data_or_setting(tmp_path: Path) -> None:
    answer(*train(tmp_path, "--epochs", 1, *CONSTANT))
    other = copy_bundle(RESIDUAL, tmp_path / "other", lambda m: m.update(seed=7))
    data = write_data(tmp_path / "more.npz", RESIDUAL, samples=52)
    for changed, named in (
        (train(tmp_path, "--epochs", 1, *CONSTANT, bundle=other), "another bundle, "),
        (train(tmp_path, "--epochs", 2, *CONSTANT), "epochs 1 (now 2)"),
        (train(tmp_path, "--epochs", 1, *CONSTANT, "--batch", 7), "batch 16 (now 7)"),
        (train(tmp_path, "--epochs", 1, *CONSTANT, data=data), "other data, "),
    ):
        assert f"was begun with {named}" in answer(*changed, code=4)["error"]
    assert "is not the bundle" in answer("eval", tmp_path / "run", "--data", data, "--bundle", other, code=4)["error"]


def test_a_schedule_that_never_leaves_zero_is_refused(tmp_path: Path) -> None:
    assert "is the rate of every step" in answer(*train(tmp_path, "--epochs", 1), code=2)["error"]
    assert answer(*train(tmp_path, "--epochs", 1, "--warmup-epochs", 1))["steps"] == 3


@pytest.mark.parametrize("bundle", [RESIDUAL, DROPOUT])
def test_divergence_exits_with_6_and_keeps_the_last_good_state(tmp_path: Path, bundle: Path) -> None:
    given = train(tmp_path, "--lr", "1e30", "--epochs", 5, "--checkpoint-steps", 1, bundle=bundle)
    assert answer(*given, code=6)["kind"] == "DivergedError"
    assert all(np.isfinite(a).all() for a in last_state(tmp_path / "run")[1].values() if a.dtype.kind == "f")


def test_a_full_disk_exits_with_8_and_keeps_the_last_commit(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the full disk: writes beyond it fail in the same way, and need no root."""
    state = answer(*train(tmp_path, "--epochs", 1, *CONSTANT))
    size = max(p.stat().st_size for p in (tmp_path / "run" / "state").iterdir())
    shutil.rmtree(tmp_path / "run")
    line = [sys.executable, "-m", "edgelocal", *map(str, train(tmp_path, "--epochs", 1, *CONSTANT)), "--json"]
    done = subprocess.run(
        line,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2)),
    )
    assert done.returncode == 8, done.stderr
    assert json.loads(done.stdout)["kind"] == "StorageError"
    assert answer(*train(tmp_path, "--epochs", 1, *CONSTANT))["validation"] == state["validation"]


def test_a_damaged_newest_checkpoint_falls_back_and_two_damaged_ones_are_refused(tmp_path: Path) -> None:
    given = train(tmp_path, "--epochs", 2, "--checkpoint-steps", 2)
    report = answer(*given)
    newest, older = sorted((tmp_path / "run" / "state").glob("*.ckpt"), reverse=True)
    damage(newest)
    again = answer(*given)
    assert again["validation"] == report["validation"]
    assert "is damaged" in again["notes"][0]
    for path in (tmp_path / "run" / "state").glob("*.ckpt"):
        damage(path)
    assert "no checkpoint is whole" in answer(*given, code=4)["error"]
    assert older.exists() or newest.exists()


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_missing_runtime_says_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('not here')\n")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(tmp_path), ENVIRONMENT.get("PYTHONPATH", "")])}
    line = [sys.executable, "-m", "edgelocal", *map(str, train(tmp_path))]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert 'pip install "onnxruntime' in done.stderr
    assert "Traceback" not in done.stderr


def test_finish_refuses_a_block_that_is_not_there_and_writes_nothing(tmp_path: Path) -> None:
    answer(*train(tmp_path, "--epochs", 1, *CONSTANT))
    result = answer("finish", tmp_path / "run", "--out", tmp_path / "model", "--exit-block", 3, code=2)
    assert "blocks 0 to 2" in result["error"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.npz", "run"]


def test_messages_without_json_are_one_line_without_a_traceback(tmp_path: Path) -> None:
    done = command("inspect", tmp_path)
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.startswith("edgelocal: ")
    assert done.stderr.count("\n") == 1
