"""`edgelocal doctor` as a function: the machine in, plain values out."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from edgelocal.machine.budget import format_size
from edgelocal.machine.device import describe
from edgelocal.machine.doctor import examine, installed_packages


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
    table.add_row("runtime for this machine", Text(report["advice"]))
    table.add_row("training build", Text(report["training"]))
    for problem in report["problems"]:
        table.add_row(Text("problem", style="red"), Text(f"{problem['found']}\n-> {problem['remedy']}"))
    if not report["problems"]:
        table.add_row("problems", "none found")
    return table
