"""`train --device`: the same run as on the CPU, bit by bit, and what is planned and measured on the device.

The device is pretended (pretended.py), so that every machine can run this; test_gpu.py has what is only so on CUDA.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_tests.device.pretended import CONTEXT, HANDLES, NEEDS, PROVIDER, WORKSPACE, pretend
from device_tests.device.runs import ARTIFACTS, DROPOUT, RESIDUAL, write_data
from edgelocal.cli import main
from edgelocal.machine.budget import format_size
from edgelocal.runtime.cuda import NAME
from edgelocal.runtime.library import runtime
from edgelocal.runtime.provider import Provider
from edgelocal.training.run import open_trained

PORTABLE = ("--runtime", "portable")  # the bundle has artifacts too


def run(*arguments: object, capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    """What a command prints with --json, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--json"])
    said = capsys.readouterr()
    assert ended.value.code == code, said.err
    found: dict[str, Any] = json.loads(said.out) if code == 0 else {"said": " ".join(said.err.split())}
    return found


def last_state(folder: Path) -> dict[str, np.ndarray]:
    blocks = open_trained(folder, 1).blocks
    return {f"{b.index} {name}": np.array(array) for b in blocks for name, array in b.state().items()}


def train(
    bundle: Path, folder: Path, device: str, capsys: pytest.CaptureFixture[str], *more: object, code: int = 0
) -> dict[str, Any]:
    data = folder / "d.npz"
    if not data.exists():
        write_data(data, DROPOUT if bundle == DROPOUT else RESIDUAL, samples=40)  # 2.5 batches of 16: the last is short
    given = (
        "train",
        bundle,
        "--data",
        data,
        "--out",
        folder / device,
        "--epochs",
        2,
        "--batch",
        16,
        "--device",
        device,
    )
    return run(*given, *more, capsys=capsys, code=code)


@pytest.mark.parametrize(
    ("bundle", "more"),
    [
        (RESIDUAL, ()),
        (DROPOUT, ()),
        (ARTIFACTS, ("--micro-batch", 5, "--runtime", "portable")),
        (DROPOUT, ("--schedule", "sequential", "--cache", "float32", "--no-augment")),
        (RESIDUAL, ("--schedule", "sequential")),
    ],
    ids=["residual", "dropout", "micro-batches", "cached", "frozen"],
)
def test_a_run_on_a_device_is_that_of_the_cpu(
    bundle: Path,
    more: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(monkeypatch)
    host = train(bundle, tmp_path, "cpu", capsys, *more)
    device = train(bundle, tmp_path, "cuda", capsys, *more)
    assert host["validation"] == device["validation"]
    expected, found = last_state(tmp_path / "cpu"), last_state(tmp_path / "cuda")
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_the_report_has_planned_beside_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = pretend(monkeypatch)
    there.meter.takes = 4096
    found = train(ARTIFACTS, tmp_path, "cuda", capsys, *PORTABLE)
    device = found["device"]
    assert (device["name"], device["gpu"], device["measured_by"]) == ("pretended", "a CPU", "pretended")
    assert (device["context_bytes"], device["planned"]["context_bytes"]) == (CONTEXT, CONTEXT)
    assert device["planned"]["workspace_bytes"] == WORKSPACE
    state = 4 * sum(sum(block["parameters"].values()) for block in found["blocks"])
    assert device["planned"]["tensors_bytes"] > 2 * state  # parameters and momentum, and what works on them
    assert device["planned"]["handles_bytes"] % HANDLES == 0
    parts = ("tensors_bytes", "handles_bytes", "workspace_bytes", "context_bytes")
    assert device["planned"]["peak_bytes"] == sum(device["planned"][part] for part in parts)
    assert there.limits == [None]
    assert CONTEXT < device["peak_bytes"] <= there.meter.held
    assert found["process_peak_bytes"] > device["peak_bytes"]
    assert found["runtime"]["gpu"] == "a CPU"
    assert train(ARTIFACTS, tmp_path, "cpu", capsys, *PORTABLE).get("device") is None


def test_states_wait_on_the_host_where_the_device_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = train(ARTIFACTS, tmp_path, "cpu", capsys, *PORTABLE)
    there = pretend(monkeypatch)
    planned = train(ARTIFACTS, tmp_path, "cuda", capsys, *PORTABLE)["device"]["planned"]
    small = tmp_path / "small"
    small.mkdir()
    there = pretend(monkeypatch, needs=replace(NEEDS, most=planned["peak_bytes"] - 1000))
    found = train(ARTIFACTS, small, "cuda", capsys, *PORTABLE)
    assert found["device"]["planned"]["peak_bytes"] < planned["peak_bytes"]
    assert found["device"]["planned"]["paging"] == "host"
    waits = [block for block in found["blocks"] if not block["plan"]["resident"]]
    assert waits
    assert there.waiting
    assert found["paged_bytes"] == 0  # nothing went to the disk
    assert found["validation"] == host["validation"]


def test_states_wait_on_disk_where_the_budget_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = pretend(monkeypatch, needs=replace(NEEDS, shared=True))
    refusal = train(ARTIFACTS, tmp_path, "cuda", capsys, *PORTABLE, "--memory-budget", "1MiB", code=3)["said"]
    least = int(refusal.split("smallest budget for this batch is")[1].split("(")[1].split(" bytes")[0])
    found = train(ARTIFACTS, tmp_path, "cuda", capsys, *PORTABLE, "--memory-budget", least, "--threads", 1)
    device = found["device"]["planned"]
    assert device["paging"] == "disk"
    assert device["tensors_bytes"] + WORKSPACE <= device["limit_bytes"] == there.limits[-1]
    assert not there.waiting


def test_a_device_that_is_too_small_is_refused_with_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, needs=replace(NEEDS, most=CONTEXT + WORKSPACE + 100))
    said = train(ARTIFACTS, tmp_path, "cuda", capsys, *PORTABLE, code=3)["said"]
    assert "the device has 1.1 MiB for this process, and at the least it would hold" in said
    assert not (tmp_path / "cuda").exists()


def test_what_the_device_holds_counts_against_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = pretend(monkeypatch)
    there.meter.takes = 1 << 29
    said = train(RESIDUAL, tmp_path, "cuda", capsys, "--memory-budget", "2GiB", code=3)["said"]
    assert "the process held" in said
    assert "the budget is 2 GiB" in said


def test_shares_are_of_host_and_device_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch)
    found = train(RESIDUAL, tmp_path, "cuda", capsys, "--memory-budget", "50%")
    assert found["budget_bytes"] > (1 << 40) // 2  # the device says it has a TiB


@pytest.mark.parametrize("option", ["--tf32", "--allow-cpu-fallback"])
def test_options_of_gpus_need_one(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = train(RESIDUAL, tmp_path, "cpu", capsys, option, code=2)["said"]
    assert f"{option} is for GPUs: give --device cuda" in said


def test_a_run_goes_on_on_another_device_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch)
    data = write_data(tmp_path / "d.npz", RESIDUAL, samples=40)
    given = ("train", RESIDUAL, "--data", data, "--out", tmp_path / "run", "--epochs", 2, "--batch", 16)
    run(*given, capsys=capsys)
    (tmp_path / "run" / "report.json").unlink()
    notes = run(*given, "--device", "cuda", capsys=capsys)["notes"]
    assert "provider was CPUExecutionProvider when run.json was written and is pretended now: bits may differ" in notes


def test_the_terminal_and_the_page_show_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch)
    found = train(ARTIFACTS, tmp_path, "cuda", capsys, *PORTABLE)
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "cuda"), "--html", str(tmp_path / "page.html")])
    shown = " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "page.html").read_text()
    for text in (shown, page):
        assert "emory on a CPU, measured by pretended" in text
        known = "0 nodes ran on the CPU" if PROVIDER.tells else "it is not known which nodes ran on the CPU"
        assert f"computed on a CPU without TF32; {known}" in text
        planned = found["device"]["planned"]
        assert format_size(planned["tensors_bytes"] + planned["workspace_bytes"]) in text


def test_a_plan_for_a_device_that_is_not_at_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("plan", ARTIFACTS, "--device", "cuda", "--memory-budget", "60%")
    found = run(*given, "--profile", "jetson-orin-nano-8gb", capsys=capsys)
    assert found["device"]["context_bytes"] > 0
    assert found["peak_bytes"] > found["device"]["peak_bytes"]
    said = run(*given, "--profile", "raspberry-pi-5-4gb", capsys=capsys, code=2)["said"]
    assert "raspberry-pi-5-4gb has no GPU that CUDA knows" in said


@pytest.mark.skipif(NAME in runtime().get_available_providers(), reason="this runtime has CUDA")
@pytest.mark.parametrize("command", ["train", "plan", "eval"])
def test_a_runtime_without_cuda_is_said_before_anything_is_written(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "train":
        said = train(RESIDUAL, tmp_path, "cuda", capsys, code=2)["said"]
        assert not (tmp_path / "cuda").exists()
    elif command == "plan":
        said = run("plan", ARTIFACTS, "--device", "cuda", capsys=capsys, code=2)["said"]
    else:
        train(RESIDUAL, tmp_path, "cpu", capsys)
        data = ("--data", tmp_path / "d.npz")
        said = run("eval", tmp_path / "cpu", *data, "--device", "cuda", capsys=capsys, code=2)["said"]
    assert "has no CUDAExecutionProvider" in said


def test_a_context_that_nobody_counts_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = pretend(monkeypatch)
    there.meter.counts_context = False
    found = train(ARTIFACTS, tmp_path, "cuda", capsys, *PORTABLE)
    assert found["device"]["context_bytes"] is None
    assert any("neither budget nor peak counts it" in note for note in found["notes"])


def test_where_memory_runs_out_the_arena_is_given_back_before_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = pretend(monkeypatch)
    there.meter.held = 3 << 30  # more than the budget, as of an arena that grew

    def give_back(self: Provider) -> None:
        there.meter.held = CONTEXT

    monkeypatch.setattr(Provider, "give_back", give_back)
    found = train(ARTIFACTS, tmp_path, "cuda", capsys, *PORTABLE, "--memory-budget", "2GiB", "--on-oom", "replan")
    assert any("gone on from the last commit with micro-batches of at most 8" in note for note in found["notes"])
    assert {block["plan"]["micro_batch"] for block in found["blocks"]} == {8}
    assert found["device"]["peak_bytes"] == CONTEXT
