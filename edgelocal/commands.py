"""`eval`, `finish` and `doctor` as functions: paths in, plain values out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from edgelocal.budget import format_size
from edgelocal.data import Split, has_split, open_dataset
from edgelocal.device import describe
from edgelocal.doctor import examine, installed_packages
from edgelocal.evaluate import evaluate
from edgelocal.finish import finish
from edgelocal.run import open_trained
from edgelocal.run_info import data_digest


def evaluate_run(run: Path, data: Path, bundle: Path | None, batch: int | None, threads: int | None) -> dict[str, Any]:
    """Scores of a run on the test split of `data`, or on all of it."""
    trained = open_trained(run, threads or describe().cores, bundle)
    manifest = trained.bundle.manifest
    split: Split = "test" if has_split(data, "test") else "train"
    with open_dataset(data, split, manifest.input, manifest.task) as dataset:
        scores = evaluate(trained.blocks, dataset, manifest, batch or trained.info.config.batch, exits=True)
    exits = [{"block": block.spec.name, **score} for block, score in zip(trained.blocks, scores, strict=True)]
    notes = list(trained.notes)
    if split == "train" and data_digest(dataset) == trained.info.data_digest:
        notes.append("these are the samples that the run was trained on: the data has no test split")
    return {
        "run": str(run),
        "data": dataset.source,
        "split": split,
        "samples": len(dataset),
        **scores[-1],
        "exits": exits,
        "notes": notes,
    }


def exits_table(result: dict[str, Any]) -> Table:
    """A row an exit: the accuracy of the network cut at that block."""
    table = Table(title=Text(f"{result['samples']} samples of {result['data']}"), title_justify="left")
    metric = "accuracy" if "accuracy" in result else "mean_absolute_error"
    for name in ("exit at block", "loss", metric.replace("_", " ")):
        table.add_column(name, justify="right")
    for row in result["exits"]:
        value = f"{100 * row[metric]:.2f} %" if metric == "accuracy" else f"{row[metric]:.4f}"
        table.add_row(row["block"], f"{row['loss']:.4f}", value)
    return table


def finish_run(run: Path, out: Path, exit_block: int | None, bundle: Path | None) -> dict[str, Any]:
    """Write the deployable model of a run; see `edgelocal.finish`."""
    trained = open_trained(run, 1, bundle)
    return finish(trained.bundle, trained.blocks, out, exit_block) | {"notes": list(trained.notes)}


def finish_text(result: dict[str, Any]) -> str:
    """What was written, and how to feed it."""
    shape = ", ".join(str(d) for d in result["input"])
    lines = [
        f"wrote {result['out']}/model.onnx and {result['out']}/weights.safetensors",
        f"model.onnx: x ({shape}) {result['dtype']} -> logits (N, {result['classes']})",
    ]
    if result["dtype"] == "float32":
        mean, std = (", ".join(f"{v:.6g}" for v in result["normalization"][key]) for key in ("mean", "std"))
        lines.append(f"x is (bytes / 255 - mean) / std by channel: mean {mean}; std {std} (also in its metadata)")
    return "\n".join(lines)


def doctor_report() -> dict[str, Any]:
    """What `doctor --json` prints."""
    return examine(describe(), installed_packages()).as_dict()


def doctor_table(report: dict[str, Any]) -> Table:
    """Machine, packages and problems as a table."""
    table = Table(show_header=False, title="edgelocal doctor", title_justify="left")
    table.add_column("what")
    table.add_column("found", overflow="fold")
    device = report["device"]
    board = device["model"] or device["machine"]
    table.add_row("machine", f"{board}, {device['system']}, {device['cores']} usable cores")
    limit = device["memory_limit_bytes"]
    bound = f", limited to {format_size(limit)}" if limit is not None else ""
    memory = f"{format_size(device['memory_available_bytes'])} free of {format_size(device['memory_total_bytes'])}"
    table.add_row("memory", memory + bound)
    table.add_row("disk", f"{format_size(device['disk_free_bytes'])} free here")
    table.add_row("accelerator", "Jetson" if device["jetson"] else "NVIDIA GPU" if device["cuda"] else "none found")
    table.add_row("Python", device["python"])
    for name, version in report["packages"].items():
        table.add_row(name, version)
    if not report["runtimes"] or "(" in report["advice"]:
        table.add_row("runtime for this machine", Text(report["advice"]))
    table.add_row("training build", Text(report["training"]))
    for problem in report["problems"]:
        table.add_row(Text("problem", style="red"), Text(f"{problem['found']}\n-> {problem['remedy']}"))
    if not report["problems"]:
        table.add_row("problems", "none found")
    return table
