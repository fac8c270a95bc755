"""`edgelocal doctor` as a function: the machine in, plain values out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from edgelocal.machine.budget import format_size
from edgelocal.machine.cuda_doctor import capabilities, dotted
from edgelocal.machine.doctor import examine, installed_packages
from edgelocal.machine.elf import GpuCode
from edgelocal.runtime.cuda_setup import look


def doctor_report() -> dict[str, Any]:
    """What `doctor --json` prints."""
    device, cuda = look()
    return examine(device, installed_packages(), cuda).as_dict()


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
    for what, found in _cuda_rows(report["cuda"]):
        table.add_row(what, Text(found))
    for problem in report["problems"]:
        table.add_row(Text("problem", style="red"), Text(f"{problem['found']}\n-> {problem['remedy']}"))
    for hint in report["hints"]:
        table.add_row("hint", Text(f"{hint['found']}\n-> {hint['remedy']}"))
    if not report["problems"]:
        table.add_row("problems", "none found")
    return table


def _cuda_rows(cuda: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """The GPU, the provider and its libraries; nothing on a machine that has neither GPU nor provider."""
    if cuda is None:
        return
    gpu, setup = cuda["gpu"], cuda["setup"]
    if gpu["names"] or gpu["driver"]:
        capability = f", compute capability {dotted(gpu['capability'])}" if gpu["capability"] else ""
        driver = f", driver {gpu['driver']}" if gpu["driver"] else ""
        memory = ", in the memory of the CPU" if gpu["shared_memory"] else ""
        yield "GPU", f"{', '.join(gpu['names']) or 'of unknown name'}{capability}{driver}{memory}"
    if setup["provider"]:
        code = "" if setup["code"] is None else f", code for {capabilities(GpuCode(**setup['code'])) or 'no GPU'}"
        version = f", CUDA {setup['major']}" if setup["major"] else ""
        yield "CUDA provider", f"in the installed runtime{version}{code}"
        for library in setup["libraries"]:
            places = library["places"]
            none = "not found" if library["needed"] else "not found, not needed"
            yield library["name"], f"{places[0][0]}: {places[0][1]}" if places else none
