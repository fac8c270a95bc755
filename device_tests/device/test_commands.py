"""The real commands, from training to the finished model, each in a process of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import pytest

from device_tests.device.runs import RESIDUAL, answer, command, copy_bundle, last_state, write_data
from edgelocal.bundle.manifest import parse_manifest
from edgelocal.cli import main
from edgelocal.data.pipeline import open_dataset, prepare
from edgelocal.storage.tensors import decode


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """(run folder, data, report) of a short training by the command."""
    folder = tmp_path_factory.mktemp("commands")
    data = write_data(folder / "d.npz", RESIDUAL)
    report = answer("train", RESIDUAL, "--data", data, "--out", folder / "run", "--epochs", 12, "--no-augment")
    return folder / "run", data, report


def test_train_reports_and_writes_what_it_did(run: tuple[Path, Path, dict[str, Any]]) -> None:
    folder, _, report = run
    assert report == json.loads((folder / "report.json").read_text())
    assert [b["name"] for b in report["blocks"]] == ["00", "01", "02"]
    assert report["steps"] == 12 * 3
    assert report["process_peak_bytes"] >= max(b["working_set_bytes"] for b in report["blocks"]) + report["idle_bytes"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert lines[-1]["blocks"]["02"]["loss"] < lines[0]["blocks"]["02"]["loss"]
    assert report["validation"] == lines[-1]["validation"]
    described = json.loads((folder / "run.json").read_text())
    assert described["config"]["epochs"] == 12
    assert described["runtime"]["onnxruntime"] == onnxruntime.__version__
    assert described["threads"] == report["threads"] == answer("doctor")["device"]["cores"]


def test_train_shows_the_plan_and_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    data = write_data(tmp_path / "d.npz", RESIDUAL)
    done = command("train", RESIDUAL, "--data", data, "--out", tmp_path / "run", "--epochs", 2)
    assert done.returncode == 0
    for part in ("trained parameters", "onnxruntime", "interleaved, 2 epochs of 48 samples", "epoch 2: 00 loss"):
        assert part in done.stderr
    assert "\x1b" not in done.stderr + done.stdout
    assert "local loss" in done.stdout


def test_eval_agrees_with_the_report_at_every_exit(run: tuple[Path, Path, dict[str, Any]]) -> None:
    folder, data, report = run
    result = answer("eval", folder, "--data", data)
    assert result["samples"] == 16
    assert result["accuracy"] == report["validation"]["accuracy"]
    for found, block in zip(result["exits"], report["blocks"], strict=True):
        assert found["accuracy"] == block["validation"]["accuracy"]
        assert found["loss"] == pytest.approx(block["validation"]["loss"], rel=1e-6)


@pytest.mark.parametrize("exit_block", [None, 0, 1, 2])
def test_the_finished_model_has_the_accuracy_of_its_exit(
    run: tuple[Path, Path, dict[str, Any]], tmp_path: Path, exit_block: int | None
) -> None:
    folder, data, report = run
    extra = [] if exit_block is None else ["--exit-block", exit_block]
    result = answer("finish", folder, "--out", tmp_path / "model", *extra)
    assert result["exit_block"] == exit_block
    manifest = parse_manifest((RESIDUAL / "manifest.json").read_bytes())
    test = open_dataset(data, "test", manifest.input, manifest.task)
    indices = np.arange(len(test))
    x = prepare(test.read(indices), indices, input=manifest.input, augment=None, seed=0, epoch=0)
    session = onnxruntime.InferenceSession(str(tmp_path / "model" / "model.onnx"))
    logits = session.run(None, {"x": x})[0]
    expected = report["blocks"][2 if exit_block is None else exit_block]["validation"]["accuracy"]
    assert (logits.argmax(1) == test.labels).mean() == pytest.approx(expected)


def test_finished_weights_are_the_last_state_under_pytorchs_names(
    run: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _, _ = run
    answer("finish", folder, "--out", tmp_path / "model")
    weights, metadata = decode((tmp_path / "model" / "weights.safetensors").read_bytes())
    assert metadata == {"format": "pt"}
    _, state = last_state(folder)
    kept = {n.partition(":")[2].partition("/")[2]: a for n, a in state.items() if ":param/" in n or ":buf/" in n}
    expected = {n: a for n, a in kept.items() if not n.startswith("aux/")}
    assert weights.keys() == expected.keys()
    assert all(weights[n].tobytes() == expected[n].tobytes() for n in expected)
    assert "parts.a.bn1.running_var" in weights


def test_a_moved_bundle_is_given_by_name(run: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, data, report = run
    moved = copy_bundle(RESIDUAL, tmp_path / "moved")
    result = answer("eval", folder, "--data", data, "--bundle", moved)
    assert result["accuracy"] == report["validation"]["accuracy"]


def test_the_same_command_on_a_finished_run_changes_nothing(run: tuple[Path, Path, dict[str, Any]]) -> None:
    folder, data, report = run
    before = last_state(folder)[0]["position"]
    again = answer("train", RESIDUAL, "--data", data, "--out", folder, "--epochs", 12, "--no-augment")
    assert last_state(folder)[0]["position"] == before
    assert again["validation"] == report["validation"]
    written = (folder / "report.json").read_bytes()
    for options in (("--threads", 7), ("--memory-budget", "2GiB", "--micro-batch", 3)):
        more = answer("train", RESIDUAL, "--data", data, "--out", folder, "--epochs", 12, "--no-augment", *options)
        assert more["notes"][-1].startswith("the run was finished before")
        assert {**more, "notes": report["notes"]} == report
    assert (folder / "report.json").read_bytes() == written
    (folder / "report.json").write_bytes(b"{")  # damaged: what is known is written again
    again = answer("train", RESIDUAL, "--data", data, "--out", folder, "--epochs", 12, "--no-augment")
    assert again["validation"] == json.loads((folder / "report.json").read_bytes())["validation"]
    (folder / "report.json").write_bytes(written)


def test_inspect_verify_and_doctor() -> None:
    info = answer("inspect", RESIDUAL)
    assert [b["units"] for b in info["blocks"]] == [["a"], ["b"], ["c"]]
    assert info["blocks"][2]["parameters"]["auxiliary"] == 0 < info["blocks"][0]["parameters"]["auxiliary"]
    assert answer("verify", RESIDUAL)["whole"] is True
    doctor = answer("doctor")
    assert doctor["device"]["cores"] >= 1
    assert doctor["problems"] == []
    shown = command("doctor").stdout
    assert "usable cores" in shown
    assert "none found" in shown


def options_of(command: click.Command) -> set[str]:
    return {"--help", *(name for option in command.params for name in (*option.opts, *option.secondary_opts))}


def test_the_documentation_names_commands_and_options_that_exist() -> None:
    root = Path(__file__).parents[2]
    known = {**main.commands, "bench memory": main.commands["bench"].commands["memory"]}  # type: ignore[attr-defined]
    everywhere = set().union(*map(options_of, known.values()))
    names = "|".join(sorted(known, key=len, reverse=True))
    lines = alone = 0
    for path in [root / "README.md", *(root / "docs").rglob("*.md")]:
        text = path.read_text()
        for word in re.findall(r"(?:`|^ {4})edgelocal ([a-z]+)", text, re.MULTILINE):
            assert word in known, f"{path.name}: edgelocal {word}"
        for name, rest in re.findall(rf"(?:`|^ {{4}})(?:edgelocal )?({names})\b([^`\n#]*)", text, re.MULTILINE):
            for option in re.findall(r"(?<![\w/.-])--[a-z0-9-]+", rest):
                assert option in options_of(known[name]), f"{path.name}: {name} {option}"
                lines += 1
        for option in re.findall(r"`(--[a-z0-9-]+)", text):
            assert option in everywhere, f"{path.name}: {option}"
            alone += 1
    assert lines > 20, "command lines are found"
    assert alone > 20, "options by themselves are found"


def test_version_and_help_of_every_command() -> None:
    assert command("--version").stdout.startswith("edgelocal, version")
    for name in [*(name for name in main.commands if name != "bench"), "bench memory"]:
        done = command(*name.split(), "--help")
        assert done.returncode == 0
        assert "--json" in done.stdout
