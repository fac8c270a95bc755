"""`edgelocal report`: what it reads, the object it prints, the tables and the words."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from device_tests.device.runs import RESIDUAL, answer, command, write_data
from device_tests.device.sample_report import MIB, loaded, sample_metrics, sample_report, write_run
from edgelocal.errors import CheckpointError
from edgelocal.memory.advice import advice_on
from edgelocal.report import words
from edgelocal.report.load import load_report
from edgelocal.report.model import parse_report
from edgelocal.report.page import render_page
from edgelocal.report.terminal import ASCII, UNICODE, MemoryBar, closing_lines, report_table


def shown(raw: dict[str, Any], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(report_table(raw))
    console.print(closing_lines(raw), soft_wrap=True, markup=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def drawn(html: str) -> set[str]:
    """Names of the charts that have a drawing."""
    figures = re.findall(r'<figure id="chart-([a-z]+)">(.*?)</figure>', html, re.DOTALL)
    return {name for name, content in figures if "<svg" in content}


def page(raw: dict[str, Any]) -> str:
    return render_page(parse_report(raw))


# What is read


def test_the_object_is_the_report_with_its_metrics_and_its_beginning(tmp_path: Path) -> None:
    report = sample_report(3)
    metrics = sample_metrics(report)
    run = write_run(tmp_path / "run", report, metrics)
    result = answer("report", run)
    assert {key: result[key] for key in report} == report
    assert result["metrics"] == metrics
    assert result["unfinished"] is None
    assert result["run"]["config"]["batch"] == 128
    assert set(result) == {*report, "metrics", "run", "unfinished"}


def test_an_unfinished_run_shows_how_far_it_is(tmp_path: Path) -> None:
    metrics = sample_metrics(sample_report(3), epochs=4)
    run = write_run(tmp_path / "run", None, metrics)
    done = command("report", run, "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert "the run is unfinished: epoch 4 of 12 and 316 steps are done" in done.stdout
    assert f"{metrics[-1]['blocks']['01']['loss']:.4f}" in done.stdout
    assert "bundle resnet32" in done.stdout
    assert answer("report", run)["threads"] == 2
    assert drawn((tmp_path / "page.html").read_text()) == {"loss", "accuracy"}


def test_a_run_in_its_first_epoch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", None, [])
    assert "has not finished its first epoch" in shown(load_report(run))
    assert drawn(page(load_report(run))) == set()


def test_a_sequential_run_says_its_stage(tmp_path: Path) -> None:
    report = sample_report(3, schedule="sequential")
    run = write_run(tmp_path / "run", report, sample_metrics(report)[:17])
    (run / "report.json").unlink()
    assert "stage 2, epoch 5 of 12 and 1343 steps are done" in load_report(run)["unfinished"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("report.json", b'{"network": "resn', "report.json is damaged"),
        ("report.json", b"[]", "expected an object"),
        ("report.json", b'{"budget_bytes": "much"}', r"report.budget_bytes: expected int, found 'much'"),
        ("report.json", b'{"budget_bytes": -5}', "expected a number from 0"),
        ("report.json", b'{"train_s": NaN}', "expected a number from 0"),
        ("report.json", b'{"blocks": [{"name": "00", "predicted": {"total": 1e400}}]}', "expected a number from 0"),
        ("report.json", b'{"timeline": [[0, 1]]}', r"timeline\[0\]: expected seconds, bytes and block"),
        ("report.json", b'{"timeline": [[0, 1, 0.5]]}', "expected the index of a block"),
        ("report.json", b'{"network": "a", "network": "b"}', "duplicate key"),
        ("report.json", b'{"run": 1, "blocks": ' + b"[" * 100_000, "report.json is damaged"),
        ("metrics.jsonl", b'{"stage": 0}\n', "missing keys"),
        ("metrics.jsonl", b"7\n", "expected an object"),
        ("run.json", b"{}", "has format None"),
    ],
)
def test_damage_is_named(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    run = write_run(tmp_path / "run", sample_report(2), [])
    (run / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_report(run)


def test_no_run_and_no_file(tmp_path: Path) -> None:
    error = answer("report", tmp_path, code=4)
    assert "is not a run: it has no run.json" in error["error"]
    run = write_run(tmp_path / "run", None, [])
    (run / "report.json").mkdir()
    assert "not a regular file" in answer("report", run, code=4)["error"]
    (run / "report.json").rmdir()
    command("report", run, "--html", tmp_path / "missing" / "page.html")
    assert answer("report", run, "--html", tmp_path / "missing" / "page.html", code=8)["kind"] == "StorageError"


def parts(raw: dict[str, Any]) -> list[tuple[str, ...]]:
    """Every key of the report, of its blocks and of what they hold."""
    block = raw["blocks"][0]
    inner = [("blocks", key, deep) for key, value in block.items() if isinstance(value, dict) for deep in value]
    return [(key,) for key in raw] + [("blocks", key) for key in block if key != "name"] + inner


@pytest.mark.parametrize("path", parts(loaded(1)), ids="/".join)
@pytest.mark.parametrize("absent", [True, False], ids=["absent", "null"])
def test_whatever_an_older_run_lacks_is_a_dash(path: tuple[str, ...], absent: bool) -> None:
    raw = loaded(3)
    for holder in raw["blocks"] if path[0] == "blocks" and len(path) > 1 else [raw]:
        inner = holder[path[1]] if len(path) == 3 else holder
        if absent:
            del inner[path[-1]]
        else:
            inner[path[-1]] = None
    text, html = shown(raw), page(raw)
    assert "None" not in text + html
    assert "nan" not in html
    gone = {"timeline": "no timeline was recorded", "frontier": "no frontier was recorded", "metrics": "no epoch was"}
    gone |= {"blocks/train_s": "no times were recorded", "blocks/latency_s": "no step latencies were recorded"}
    assert gone.get("/".join(path), "") in html


def test_the_report_of_an_old_version(tmp_path: Path) -> None:
    """As 0.1 wrote it before there were plans: nothing of memory but peaks of the process."""
    block = {"name": "00", "units": ["stem"], "parameters": {"network": 176, "auxiliary": 72_906}, "peak_bytes": 10**8}
    block |= {"training": {"loss": 0.5, "accuracy": 0.9}, "validation": None, "train_s": 3.7, "steps": 184}
    report = {"network": "resnet14", "rule": "auglocal", "loss": "cross_entropy", "schedule": "interleaved"}
    report |= {"blocks": [block], "validation": None, "samples": 1437, "steps": 184, "train_s": 3.7, "notes": []}
    report |= {"process_peak_bytes": 10**8, "budget_bytes": None, "runtime": {"onnxruntime": "1.19.2"}}
    raw = load_report(write_run(tmp_path / "run", report, []))
    text = shown(raw)
    assert re.search(r"00 +│ +0\.5000 │ +90\.00 % │ +- │ 3\.7 s │ +- │", text)
    assert "peak memory 95.4 MiB, 3.7 s in steps" in text
    assert "working set" not in text
    html = page(raw)
    for sentence in (
        "no working sets were",
        "no timeline was",
        "no epoch was",
        "no step latencies were",
        "no frontier",
    ):
        assert sentence in html
    assert drawn(html) == {"time"}


# The terminal


def test_the_table_says_what_was_planned_beside_what_was_measured() -> None:
    raw = loaded(3)
    raw["blocks"][1] |= {"working_set_bytes": 30 * MIB, "predicted": {"total": 40 * MIB}}
    text = shown(raw)
    assert re.search(r"01 +│ +40 MiB │ +30 MiB │ +1\.33 │", text)  # predicted / measured, as in docs/promises.md
    assert "peak memory" in text
    assert "12 MiB of state paged, 210 MiB of outputs cached in float16" in text
    assert "note: the data has no test split" in text
    assert max(len(line) for line in text.splitlines() if "│" in line) <= 80


def test_mean_absolute_error_where_there_is_no_accuracy() -> None:
    raw = loaded(2) | {"loss": "mse"}
    for block in raw["blocks"]:
        block["training"] = block["validation"] = {"loss": 0.25, "mean_absolute_error": 0.125}
    text = shown(raw)
    assert "absolute error" in text
    assert "0.1250" in text
    assert "Mean absolute error of every block" in page(raw)


def test_a_memory_bar_character_by_character() -> None:
    bar = MemoryBar(idle=30, measured=40, predicted=50, budget=100, full=100)
    assert bar.text(20, ASCII) == "::::::########" + " +" + "   |"
    assert bar.text(20, UNICODE) == "░░░░░░████████" + " ┃" + "   ▕"
    assert MemoryBar(0, None, None, None, 100).text(12, ASCII) == " " * 12
    assert MemoryBar(30, 40, 20, None, 70).text(14, ASCII) == "::::::###+####"


def test_bars_are_ascii_where_the_terminal_is() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=stream, width=80, color_system=None)
    console.print(report_table(loaded(2)))
    stream.flush()
    text = stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert re.search(r":{5,}#{5,}", text)
    assert "# measured" in text


def test_the_real_command_on_a_real_run(tmp_path: Path) -> None:
    data = write_data(tmp_path / "d.npz", RESIDUAL)
    trained = answer("train", RESIDUAL, "--data", data, "--out", tmp_path / "run", "--epochs", 3)
    result = answer("report", tmp_path / "run", "--html", tmp_path / "page.html")
    assert {key: result[key] for key in trained} == trained
    assert [record["epoch"] for record in result["metrics"]] == [1, 2, 3]
    html = (tmp_path / "page.html").read_text()
    assert {"loss", "accuracy", "time"} <= drawn(html)
    done = command("report", tmp_path / "run")
    assert f"{100 * trained['validation']['accuracy']:.2f} %" in done.stdout
    for block in trained["blocks"]:
        assert f"{block['training']['loss']:.4f}" in done.stdout


# Words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4.2e-6, "0.004 ms"),
        (0.0123, "12.3 ms"),
        (0.5, "500 ms"),
        (4.06, "4.1 s"),
        (99.9, "99.9 s"),
        (99.96, "1 min 40 s"),
        (200, "3 min 20 s"),
        (3599.9, "1 h 0 min"),
        (7500.0, "2 h 5 min"),
        (None, "-"),
    ],
)
def test_times_in_words(value: float | None, text: str) -> None:
    assert words.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (999.7, "1 k"), (1250, "1.25 k"), (31.4e9, "31.4 G"), (999.9e6, "1 G"), (2e15, "2,000 T")],
)
def test_counts_in_words(value: float, text: str) -> None:
    assert words.short_count(value) == text


def frontier(batch: int | None, ran: int, checkpointing_macs: int = 13 * 10**9) -> dict[str, Any]:
    """A report with six blocks beside others, weighed at `batch`, run at `ran`."""
    own = {"kind": "partition", "blocks": 6, "training_macs": 13 * 10**9, "chosen": True}
    others = [("bp", 80, 10**10), ("checkpointing", 50, checkpointing_macs), ("linear", 20, 10**10)]
    points = [own | {"working_set_bytes": 34 * MIB, "estimated": False}]
    for kind, mib, macs in others:
        point = {"kind": kind, "blocks": 1, "working_set_bytes": mib * MIB, "training_macs": macs, "chosen": False}
        points.append(point | {"estimated": kind == "checkpointing"})
    if batch is None:  # as reports were before they said so
        return {"batch": ran, "frontier": [{k: v for k, v in point.items() if k != "estimated"} for point in points]}
    return {"batch": ran, "frontier": [point | {"batch": batch} for point in points]}


def test_the_comparison_with_backpropagation_in_figures() -> None:
    raw = frontier(128, 128)
    assert words.comparison(parse_report(raw))[:3] == [
        "What was trained (6 blocks) has a working set of 34 MiB at batch 128 with nothing else loaded, and 13 G "
        "multiply-accumulates a sample, as the export predicted: 42 % of the memory and 1.30 times the work of "
        "backpropagation (80 MiB).",
        "Backpropagation with checkpointing (estimate): 50 MiB, 62 % of the memory and 1.30 times the work of "
        "backpropagation.",
        "Linear classifiers as auxiliaries: 20 MiB, 25 % of the memory and 1.00 times the work of backpropagation.",
    ]
    raw["frontier"] = [point for point in raw["frontier"] if not point["chosen"]]
    assert words.comparison(parse_report(raw)) == []


@pytest.mark.parametrize("macs", [12 * 10**9, 14 * 10**9])
def test_the_report_gives_the_verdict_of_the_export(macs: int) -> None:
    report = parse_report(frontier(128, 128, macs))
    verdict = advice_on(report.frontier or ())
    assert "checkpointed back-propagation" in verdict
    assert words.comparison(report)[-1].lower() == f"{verdict}.".lower()


def test_a_run_with_another_batch_is_not_compared_with_the_export() -> None:
    raw = loaded(6) | frontier(16, 128)
    (said,) = words.comparison(parse_report(raw))
    assert "batch 16" in said
    assert "batch 128" in said
    assert "MiB" not in said
    assert "34 MiB" not in shown(raw)
    html = page(raw)
    assert "working set at batch 16" in html
    assert "This run has batch 128: its working sets are not these." in html
    assert "budget less idle" not in html
    assert "budget less idle" in page(loaded(6) | frontier(128, 128))


def test_a_frontier_of_unknown_batch_is_compared_without_naming_one() -> None:
    said = words.comparison(parse_report(frontier(None, 128)))
    assert said[0].startswith("What was trained (6 blocks) has a working set of 34 MiB with nothing else")
    assert "checkpointing (estimate)" in said[1]


def test_estimates_are_marked_wherever_they_are_shown() -> None:
    html = page(loaded(6) | frontier(128, 128))
    drawing, figures = re.findall(r'<figure id="chart-frontier">(.*?)<details>(.*?)</figure>', html, re.DOTALL)[0]
    assert ">checkpointing (estimate)</text>" in drawing
    assert ">checkpointing (estimate)</th>" in figures
    for exact in ("bp", "linear"):
        assert f">{exact}</text>" in drawing
        assert f">{exact}</th>" in figures


def test_hostile_text_on_the_terminal_is_text() -> None:
    raw = loaded(2) | {"network": "[red]net[/red]", "notes": ["[bold]\x1b[31mnote"]}
    raw["blocks"][0]["name"] = "[link=x]00[/link]"
    text = shown(raw, 120)
    assert "[red]net[/red]" in text
    assert "[link=x]00[/link]" in text
