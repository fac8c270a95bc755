"""A run is continued, begun again or refused: what is missing, damaged or tampered with is never trained over."""

from __future__ import annotations

import builtins
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from device_tests.device.runs import (
    DROPOUT,
    RESIDUAL,
    answer,
    config,
    copy_bundle,
    reseal,
    trainer,
    unprivileged,
    write_data,
)
from edgelocal.bundle.folder import open_bundle, verify
from edgelocal.cli import main
from edgelocal.commands import evaluate as commands
from edgelocal.errors import BundleError, CheckpointError, DivergedError, OverBudgetError, UsageError
from edgelocal.runtime.library import runtime
from edgelocal.training.run import RunFolder, check_resume, check_same, open_trained
from edgelocal.training.run_info import RunInfo, describe_run, read_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """(finished run, the command that made it without --out)."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_data(folder / "d.npz", DROPOUT)
    given: list[object] = ["train", DROPOUT, "--data", data, "--epochs", 2, "--no-augment"]
    answer(*given, "--out", folder / "run")
    return folder / "run", given


def copied(trained: tuple[Path, list[object]], folder: Path) -> Path:
    return Path(shutil.copytree(trained[0], folder / "run"))


def empty_state(run: Path) -> None:
    for path in (run / "state").iterdir():
        path.unlink()


def only_report(run: Path) -> None:
    empty_state(run)
    (run / "metrics.jsonl").unlink()


def no_state(run: Path) -> None:
    shutil.rmtree(run / "state")


def only_run_json(run: Path) -> None:
    for name in ("state", "metrics.jsonl", "report.json"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def state_is_a_file(run: Path) -> None:
    no_state(run)
    (run / "state").write_text("not a folder")


@pytest.mark.parametrize("resume", ["auto", "must"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (empty_state, r"are gone \(it has metrics.jsonl, but .*/state is empty\): restore them from a copy"),
        (only_report, r"are gone \(it has report.json, but .*/state is empty\)"),
        (no_state, r"are gone \(it has metrics.jsonl, but"),
        (only_run_json, r"are gone \(.*/state is missing\)"),
        (state_is_a_file, "state cannot be listed: Not a directory"),
    ],
)
def test_checkpoints_that_are_gone_are_never_trained_over(
    trained: tuple[Path, list[object]],
    tmp_path: Path,
    change: Callable[[Path], None],
    message: str,
    resume: str,
) -> None:
    run = copied(trained, tmp_path)
    change(run)
    before = sorted(run.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        check_resume(run, resume)
    with pytest.raises(CheckpointError, match=message):
        open_trained(run, 1)
    assert sorted(run.rglob("*")) == before


def test_the_command_refuses_an_emptied_run_with_4(trained: tuple[Path, list[object]], tmp_path: Path) -> None:
    run = copied(trained, tmp_path)
    empty_state(run)
    result = answer(*trained[1], "--out", run, code=4)
    assert "to train anew" in result["error"]
    assert list((run / "state").iterdir()) == []


def test_a_run_killed_before_its_first_commit_is_begun_again(
    trained: tuple[Path, list[object]], tmp_path: Path
) -> None:
    run = copied(trained, tmp_path)
    only_run_json(run)
    (run / "state").mkdir()
    (run / "state" / ".00000001.ckpt.77.tmp").write_bytes(b"half")
    assert check_resume(run, "auto")
    with pytest.raises(UsageError, match="was stopped before its first checkpoint; leave --resume out"):
        check_resume(run, "must")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        open_trained(run, 1)
    assert answer(*trained[1], "--out", run)["steps"] == 6


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(target: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return change


@pytest.mark.parametrize("change", [fifo, link("/dev/zero"), link("nowhere")], ids=["fifo", "zeros", "dangling"])
def test_a_checkpoint_that_is_no_file_is_a_damaged_one(
    trained: tuple[Path, list[object]], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    run = copied(trained, tmp_path)
    older, newest = sorted((run / "state").iterdir())
    change(newest)
    assert open_trained(run, 1).notes[0].startswith("the run is unfinished")
    change(older)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole .*it is (a link|not a regular file)"):
        open_trained(run, 1)


def altered(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda raw: raw.update(changes)


RUN_JSON: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("bundle is a number", altered(bundle=5), "run.json.bundle: expected str, found '5'"),
    ("bundle has a nul", altered(bundle="a\0b"), "bundle: expected a path"),
    ("bundle is half a pair", altered(bundle="\ud800"), "is damaged"),
    ("runtime is a list", altered(runtime=[]), "run.json.runtime: expected an object"),
    ("runtime is null", altered(runtime=None), "run.json.runtime: expected an object"),
    ("runtime of numbers", altered(runtime={"onnxruntime": 1}), "run.json.runtime.onnxruntime: expected str"),
    ("schema -1", altered(schema=-1), "schema: expected a positive integer, found '-1'"),
    ("schema true", altered(schema=True), "schema: expected a positive integer"),
    ("schema as text", altered(schema="1"), "schema: expected a positive integer"),
    ("schema 2", altered(schema=2), "has format edgelocal-run 2, this edgelocal reads edgelocal-run 1"),
    ("another key", altered(more=1), r"unknown keys \['more'\]"),
    ("no config", lambda raw: raw.pop("config"), r"missing keys \['config'\]"),
    ("config of text", altered(config="x"), "run.json.config: expected an object"),
    ("epochs as text", lambda raw: raw["config"].update(epochs="2"), "config.epochs: expected int, found '2'"),
    ("no epochs", lambda raw: raw["config"].update(epochs=0), "config: expected positive epochs and batch"),
    ("no batch", lambda raw: raw["config"].update(batch=-1), "config: expected positive epochs and batch"),
    ("another schedule", lambda raw: raw["config"].update(schedule="random"), "config.schedule: expected one of"),
    ("rate of null", lambda raw: raw["config"].update(lr=None), "config.lr: expected a finite number"),
    ("rate of NaN", lambda raw: raw["config"].update(lr=float("nan")), "config.lr: expected a finite number"),
    ("hyper is a list", lambda raw: raw["config"].update(hyper=[]), "config.hyper: expected an object"),
    ("threads as text", altered(threads="2"), "run.json.threads: expected int, found '2'"),
    ("micro-batches of text", altered(micro_batches=["8"]), "micro_batches.*expected int, found '8'"),
    ("no sample at a time", altered(micro_batches=[8, 0, 8]), "micro_batches: expected positive integers, found '0'"),
    ("no threads", altered(threads=0), "threads: expected a positive integer, found '0'"),
    ("budget as text", altered(budget_bytes="1GiB"), "budget_bytes: expected int, found '1GiB'"),
]


@pytest.mark.parametrize(("edit", "message"), [row[1:] for row in RUN_JSON], ids=[row[0] for row in RUN_JSON])
def test_a_run_json_that_is_not_as_it_was_written_is_refused(
    trained: tuple[Path, list[object]], tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    raw = json.loads((trained[0] / "run.json").read_bytes())
    edit(raw)
    (tmp_path / "run.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=message):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"[" * 100_000, b"\xff", b'{"a":1,"a":2}', b"7" * 5000, b" " * (2 << 20)],
    ids=["empty", "deep", "no text", "twice", "a number", "spaces"],
)  # fmt: skip
def test_bytes_that_are_no_run_json_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "run.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        read_run(tmp_path)


def test_a_run_json_that_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(CheckpointError, match=r"run\.json cannot be read: it is not a regular file"):
        read_run(tmp_path)
    with pytest.raises(UsageError, match="exists and is not a run"):
        check_resume(tmp_path, "auto")


@pytest.mark.parametrize(
    "edit",
    [
        altered(bundle_digest="0" * 64),
        altered(data_digest="0" * 64),
        lambda raw: raw["config"].update(seed=9),
        lambda raw: raw["config"].update(lr=0.5),
    ],
    ids=["bundle", "data", "seed", "lr"],
)
def test_train_and_eval_refuse_the_same_altered_run(
    trained: tuple[Path, list[object]], tmp_path: Path, edit: Callable[[dict[str, Any]], Any]
) -> None:
    run = copied(trained, tmp_path)
    now = read_run(run)
    raw = json.loads((run / "run.json").read_bytes())
    edit(raw)
    (run / "run.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="was begun with"):
        check_same(run, now)
    with pytest.raises(CheckpointError, match=r"is not the bundle that|belongs to another bundle or configuration"):
        open_trained(run, 1)


@pytest.mark.parametrize("name", ["n" * 300, "a/" + "n" * 300])
def test_an_out_that_no_system_can_make_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match="cannot be used: File name too long; choose another --out"):
        check_resume(tmp_path / name, "auto")
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        read_run(tmp_path / name)
    with pytest.raises(BundleError, match="cannot be read: File name too long"):
        open_bundle(tmp_path / name)


def test_an_out_below_a_file_or_at_a_dangling_link_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UsageError, match="Not a directory; choose another --out"):
        check_resume(tmp_path / "file" / "run", "auto")
    for resume, message in (("auto", "exists and is not a run"), ("never", "exists; choose another")):
        with pytest.raises(UsageError, match=message):
            check_resume(tmp_path / "link", resume)


def test_what_may_not_be_read_says_so() -> None:
    with unprivileged() as folder:
        bundle = copy_bundle(DROPOUT, folder / "b")
        opened = open_bundle(bundle)
        (bundle / "blocks").chmod(0)
        with pytest.raises(BundleError, match=r"00/forward.onnx cannot be read: Permission denied; check permissions"):
            verify(opened)
        (bundle / "blocks").chmod(0o700)
        (bundle / "more").mkdir(0)
        with pytest.raises(BundleError, match=r"more cannot be listed: Permission denied; check permissions"):
            verify(opened)
        bundle.chmod(0)
        with pytest.raises(BundleError, match="cannot be read: Permission denied"):
            open_bundle(bundle)
        bundle.chmod(0o700)
        run = folder / "run"
        run.mkdir()
        (run / "run.json").write_text("{}")
        (run / "run.json").chmod(0)
        with pytest.raises(CheckpointError, match=r"run\.json cannot be read: Permission denied"):
            read_run(run)
        (run / "state").mkdir(0)
        with pytest.raises(CheckpointError, match="state cannot be listed: Permission denied"):
            check_resume(run, "auto")
        run.chmod(0)
        with pytest.raises(UsageError, match=r"Permission denied; choose another --out"):
            check_resume(run, "auto")
        (bundle / "more").chmod(0o700)
        run.chmod(0o700)


@pytest.mark.parametrize("begun", [1, 4, None], ids=["one", "four", "unknown"])
def test_a_run_goes_on_with_any_number_of_threads(
    trained: tuple[Path, list[object]], tmp_path: Path, begun: int | None
) -> None:
    """None: as runs from before the number was recorded."""
    run = copied(trained, tmp_path)
    raw = json.loads((run / "run.json").read_bytes())
    raw.pop("threads")
    (run / "run.json").write_text(json.dumps(raw if begun is None else raw | {"threads": begun}))
    found = read_run(run)
    assert found.threads == begun
    check_same(run, replace(found, threads=2))
    answer(*trained[1], "--out", run, "--threads", 2, "--resume", "must")


def folder_of(tmp_path: Path) -> RunFolder:
    data = write_data(tmp_path / "d.npz", RESIDUAL)
    training = trainer(RESIDUAL, data)
    info: RunInfo = describe_run(open_bundle(RESIDUAL), training.train, data, config(), None, {}, 1)
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run", info)


def record(loss: float) -> dict[str, Any]:
    return {"epoch": 3, "lr": 0.1, "blocks": {"00": {"loss": 0.5}}, "validation": {"loss": loss, "accuracy": 0.5}}


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_record_that_is_not_finite_is_divergence_and_is_not_written(tmp_path: Path, loss: float) -> None:
    folder = folder_of(tmp_path)
    folder.add_metrics(record(0.25))
    before = (folder.folder / "metrics.jsonl").read_text()
    with pytest.raises(DivergedError, match=rf"the record of epoch 3 has validation loss {loss}; the last checkpoint"):
        folder.add_metrics(record(loss))
    with pytest.raises(DivergedError, match=rf"the report has blocks 1 loss {loss};"):
        folder.write_report({"blocks": [{"loss": 0.1}, {"loss": loss}]})
    assert (folder.folder / "metrics.jsonl").read_text() == before
    assert list(folder.metrics) == [record(0.25)]
    assert not (folder.folder / "report.json").exists()


@pytest.mark.parametrize("bound", [0, -1, 129, True, "16"])
def test_a_bound_of_micro_batches_that_no_run_has_is_refused(
    trained: tuple[Path, list[object]], tmp_path: Path, bound: object
) -> None:
    run = copied(trained, tmp_path)
    reseal(run, lambda progress, _: progress.update(micro_batch_bound=bound))
    with pytest.raises(CheckpointError, match=r"progress\.micro_batch_bound: expected"):
        open_trained(run, 1)


def test_a_run_from_before_the_bound_was_recorded_goes_on(trained: tuple[Path, list[object]], tmp_path: Path) -> None:
    run = copied(trained, tmp_path)
    reseal(run, lambda progress, _: progress.pop("micro_batch_bound"))
    answer(*trained[1], "--out", run, "--resume", "must")


@pytest.mark.parametrize("message", ["", "Unable to allocate 3 GiB"])
def test_a_command_without_memory_ends_with_3_and_says_so(
    trained: tuple[Path, list[object]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    message: str,
) -> None:
    def scarce(*_: object, **__: object) -> None:
        raise MemoryError(message)

    monkeypatch.setattr(commands, "evaluate_run", scarce)
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(trained[0]), "--data", str(trained[0])])
    assert ended.value.code == 3
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(f"edgelocal: out of memory{f' ({message})' if message else ''}; what was committed")


def test_no_memory_for_the_state_ends_with_3_and_what_was_committed_stands(
    trained: tuple[Path, list[object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def scarce(*_: object) -> None:
        raise MemoryError

    run = copied(trained, tmp_path)
    before = (run / "state" / "00000002.ckpt").read_bytes()
    monkeypatch.setattr("edgelocal.runtime.tensor.Tensor.of", scarce)
    with pytest.raises(SystemExit) as ended:
        main([*map(str, trained[1]), "--out", str(run), "--on-oom", "replan"])
    assert ended.value.code == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "edgelocal: out of memory for the state of all blocks; free memory" in said
    assert (run / "state" / "00000002.ckpt").read_bytes() == before
    monkeypatch.undo()
    answer(*trained[1], "--out", run)


def test_no_memory_to_import_the_runtime_is_not_called_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def scarce(name: str, *given: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("Exception caught: std::bad_alloc")
        return plain(name, *given)

    monkeypatch.setattr(builtins, "__import__", scarce)
    with pytest.raises(OverBudgetError, match="no memory to import ONNX Runtime"):
        runtime()
