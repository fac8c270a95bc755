"""`eval`, `finish` and `doctor` as functions: paths in, plain values out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from edgelocal.data import Split, has_split, open_dataset
from edgelocal.device import describe
from edgelocal.doctor import examine, installed_packages
from edgelocal.evaluate import evaluate
from edgelocal.finish import finish
from edgelocal.run import open_trained


def evaluate_run(run: Path, data: Path, bundle: Path | None, batch: int | None, threads: int | None) -> dict[str, Any]:
    """Scores of a run on the test split of `data`, or on all of it."""
    info, opened, blocks = open_trained(run, threads or describe().cores, bundle)
    manifest = opened.manifest
    split: Split = "test" if has_split(data, "test") else "train"
    dataset = open_dataset(data, split, manifest.input, manifest.task)
    scores = evaluate(blocks, dataset, manifest, batch or info.config.batch, exits=True)
    exits = [{"block": block.spec.name, **score} for block, score in zip(blocks, scores, strict=True)]
    return {"run": str(run), "data": dataset.source, "samples": len(dataset), **scores[-1], "exits": exits}


def exits_table(result: dict[str, Any]) -> Table:
    """A row an exit: the accuracy of the network cut at that block."""
    table = Table(title=escape(f"{result['samples']} samples of {result['data']}"), title_justify="left")
    metric = "accuracy" if "accuracy" in result else "mean_absolute_error"
    for name in ("exit at block", "loss", metric.replace("_", " ")):
        table.add_column(name, justify="right")
    for row in result["exits"]:
        value = f"{100 * row[metric]:.2f} %" if metric == "accuracy" else f"{row[metric]:.4f}"
        table.add_row(row["block"], f"{row['loss']:.4f}", value)
    return table


def finish_run(run: Path, out: Path, exit_block: int | None, bundle: Path | None) -> dict[str, Any]:
    """Write the deployable model of a run; see `edgelocal.finish`."""
    _, opened, blocks = open_trained(run, 1, bundle)
    return finish(opened, blocks, out, exit_block)


def doctor_report() -> dict[str, Any]:
    """What `doctor --json` prints."""
    return examine(describe(), installed_packages()).as_dict()


def doctor_table(report: dict[str, Any]) -> Table:
    """Machine, packages and problems as a table."""
    table = Table(show_header=False, title="edgelocal doctor", title_justify="left")
    table.add_column("what")
    table.add_column("found", overflow="fold")
    for key, value in report["device"].items():
        table.add_row(key, escape(str(value)))
    for name, version in report["packages"].items():
        table.add_row(name, version)
    table.add_row("advice", escape(report["advice"]))
    for problem in report["problems"]:
        table.add_row("[red]problem[/red]", escape(f"{problem['found']}\n-> {problem['remedy']}"))
    if not report["problems"]:
        table.add_row("problems", "none found")
    return table
