"""`edgelocal eval` as a function: paths in, plain values out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from edgelocal.bundle.targets import Device
from edgelocal.commands.on_device import DeviceRequest, device_notes, open_device
from edgelocal.data.pipeline import Split, has_split, open_dataset
from edgelocal.machine.device import describe
from edgelocal.runtime.provider import CPU
from edgelocal.training.evaluate import evaluate
from edgelocal.training.run import open_trained
from edgelocal.training.run_info import data_digest


def evaluate_run(
    run: Path,
    data: Path,
    bundle: Path | None,
    batch: int | None,
    threads: int | None,
    device: Device = "cpu",
    tf32: bool = False,
    allow_cpu_fallback: bool = False,
) -> dict[str, Any]:
    """Scores of a run on the test split of `data`, or on all of it."""
    request = DeviceRequest(device, tf32, allow_cpu_fallback)
    request.check()
    accelerator = open_device(request, bounded=False)
    provider = CPU if accelerator is None else accelerator.provider(None, None)
    trained = open_trained(run, threads or describe().cores, bundle, provider)
    manifest = trained.bundle.manifest
    split: Split = "test" if has_split(data, "test") else "train"
    with open_dataset(data, split, manifest.input, manifest.task) as dataset:
        scores = evaluate(trained.blocks, dataset, manifest, batch or trained.info.config.batch, exits=True)
    exits = [{"block": block.spec.name, **score} for block, score in zip(trained.blocks, scores, strict=True)]
    notes = [*trained.notes, *(device_notes(accelerator, provider) if accelerator else ())]
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
