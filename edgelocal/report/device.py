"""The memory of a device, planned beside measured, as rows of text."""

from __future__ import annotations

from edgelocal.report import words
from edgelocal.report.model import DeviceMemory, DevicePlan, Report


def device_title(device: DeviceMemory) -> str:
    """Whose memory it is, and who measured it."""
    name = device.gpu or device.name or "device"
    shared = ", which is the host's" if device.shared_memory else ""
    by = f", measured by {device.measured_by}" if device.measured_by else ""
    return f"memory on {name}{shared}{by}"


def device_rows(report: Report) -> list[list[str]]:
    """A header, then a row for each part; empty where there was no device.

    What the arena took beyond the planned tensors is workspace of kernels. Handles and code
    of libraries lie outside of it; what of them came before the plan counts as context.
    """
    device = report.device
    if device is None:
        return []
    planned = device.planned or DevicePlan()
    rows = [
        ("context", planned.context_bytes, device.context_bytes),
        ("arena", _sum(planned.tensors_bytes, planned.workspace_bytes), device.arena_bytes),
        ("of it beyond planned tensors", planned.workspace_bytes, device.workspace_bytes),
        ("handles and code", planned.handles_bytes, device.outside_bytes),
        ("peak", planned.peak_bytes, device.peak_bytes),
    ]
    return [["", "planned", "measured"], *([name, words.size(a), words.size(b)] for name, a, b in rows)]


def device_text(report: Report) -> str:
    """How it was computed, in a sentence, or ""."""
    device = report.device
    if device is None:
        return ""
    precision = "with TF32" if device.tf32 else "without TF32"
    waits = device.planned.paging if device.planned else None
    paged = [block for block in report.blocks if block.plan and block.plan.resident is False]
    of_all = f"{len(paged)} of {words.blocks_text(len(report.blocks))}"
    where = f"; states of {of_all} waited on the {waits}" if paged else ""
    nodes = device.fallback_nodes
    cpu = "it is not known which nodes ran on the CPU" if nodes is None else f"{nodes} nodes ran on the CPU"
    return f"computed on {device.gpu or device.name} {precision}; {cpu}{where}"


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second
