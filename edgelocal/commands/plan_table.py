"""What `edgelocal plan` shows a person, from the values it prints with --json."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from edgelocal.machine.budget import format_size, size_up
from edgelocal.report.terminal import MemoryBar

COLUMNS = {
    "state": ("parameters", "optimizer", "buffers"),
    "act": ("activations",),
    "grad": ("gradients",),
    "work": ("workspace",),
    "in/out": ("input", "output"),
    "rest": ("runtime", "pipeline"),
}


def plan_table(result: dict[str, Any]) -> Table:
    """A row a block: what it trains and how, its predicted working set by kind, and that beside the budget."""
    idle, budget = result["idle_bytes"], result["budget_bytes"]
    title = f"{result['network']}, {result['schedule']}, batch {result['batch']}: MiB while a block works"
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    table.add_column("block", no_wrap=True, min_width=5)
    table.add_column("units", overflow="ellipsis", min_width=4)  # the one that gives way on a narrow terminal
    table.add_column("batch", justify="right", no_wrap=True, min_width=6)
    table.add_column("", no_wrap=True, min_width=5)
    for name in (*COLUMNS, "all"):
        table.add_column(name, justify="right", no_wrap=True, min_width=max(5, len(name)))
    table.add_column("budget", no_wrap=True, width=10)
    for block, units in zip(result["blocks"], result["units"], strict=True):
        predicted = block["predicted"]
        table.add_row(
            Text(block["name"]),
            Text(units[0] if len(units) == 1 else f"{units[0]}+{len(units) - 1}"),
            _share(block),
            "kept" if block["resident"] else "paged",
            *(_mib(sum(predicted[kind] for kind in kinds)) for kinds in COLUMNS.values()),
            _mib(predicted["total"]),
            MemoryBar(idle, predicted["total"], None, budget, budget),
        )
    return table


def plan_lines(result: dict[str, Any]) -> str:
    """The plan of the whole process, and what it gave up, a line each."""
    peak, budget, idle = result["peak_bytes"], result["budget_bytes"], result["idle_bytes"]
    whose = f"assumed for {result['profile']['model']}" if result["profile"] else "measured here"
    graphs = result["graphs_bytes"]
    lines = [
        f"predicted peak of the process: {format_size(peak)} of {format_size(budget)} ({100 * peak / budget:.0f} %), "
        f"{format_size(idle)} of it the idle process ({whose})",
        "graphs: all stay loaded" if graphs is None else f"graphs: loaded when used, {format_size(graphs)} at a time",
        f"paging: {format_size(result['paged_bytes_per_step'])} read and written a step"
        if result["paged_bytes_per_step"]
        else "paging: none",
        *_device(result["device"]),
        _thresholds(result["thresholds"], whole=result["most_at_once"] >= result["batch"]),
    ]
    if result["cache"]:
        lines.append(_cache(result["cache"]))
    return "\n".join([*lines, *(f"note: {note}" for note in result["advice"])])


def _device(device: dict[str, Any] | None) -> list[str]:
    """What of it lies on the device."""
    if device is None:
        return []
    sizes = {
        name: format_size(device[f"{name}_bytes"]) for name in ("peak", "context", "tensors", "handles", "workspace")
    }
    return [
        f"on the device: {sizes['peak']}; {sizes['context']} of it context, {sizes['tensors']} tensors, "
        f"{sizes['handles']} handles, {sizes['workspace']} for kernels; paged states wait on the {device['paging']}"
    ]


def _share(block: dict[str, Any]) -> str:
    """ "128", or "43 x 3"."""
    parts = block["accumulation"]
    return str(block["micro_batch"]) if parts == 1 else f"{block['micro_batch']} x {parts}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f}"


def _thresholds(values: dict[str, int | None], *, whole: bool) -> str:
    kept = {
        "everything_bytes": "keeps everything",
        "states_bytes": "all states",
        "whole_batch_bytes": "the batch whole" if whole else "micro-batches as large as allowed",
        "smallest_bytes": "is the least",
    }
    sizes = ((values[key], what) for key, what in kept.items())
    return "budgets: " + ", ".join(f"{size_up(size)} {what}" for size, what in sizes if size is not None)


def _cache(cache: dict[str, Any]) -> str:
    taken = "none while the data is augmented" if cache["augmented"] else cache["auto"].replace("off", "none")
    return (
        f"cached outputs: {format_size(cache['float32_bytes'])} on disk in float32, "
        f"{format_size(cache['float16_bytes'])} in float16; --cache auto takes {taken} "
        f"({format_size(cache['disk_free_bytes'])} free on this machine)"
    )
