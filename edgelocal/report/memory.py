"""Memory of every block: what was predicted, by kind, beside what was measured and the budget."""

from __future__ import annotations

from edgelocal.report import words
from edgelocal.report.axes import WIDTH, Scale, clip, drawing, size_unit, ticks, x_axis
from edgelocal.report.figure import Figure
from edgelocal.report.model import KINDS, BlockReport, Report
from edgelocal.report.svg import Markup, line, polygon, rect, text

TITLE = "Memory of every block"
# Swatch, words, kinds. Neighbours that mean much the same share a colour: sight tells no ten apart.
GROUPS = (
    ("k-runtime", "runtime and pipeline", ("runtime", "pipeline")),
    ("k-parameters", "parameters and buffers", ("parameters", "buffers")),
    ("k-optimizer", "optimizer", ("optimizer",)),
    ("k-gradients", "gradients", ("gradients",)),
    ("k-activations", "activations", ("activations",)),
    ("k-workspace", "workspace", ("workspace",)),
    ("k-feed", "input and output", ("input", "output")),
)
LEFT, RIGHT, TOP = 50, WIDTH - 14, 26
FAR = 3  # a budget of more than this many times the memory would squeeze the bars


def row_height(blocks: int) -> int:
    """Height of a row of a chart with a row a block."""
    return 34 if blocks <= 4 else 25 if blocks <= 16 else 15 if blocks <= 30 else 11


def row_names(blocks: tuple[BlockReport, ...], top: float) -> list[Markup]:
    """The names of the blocks at the left, every second of many."""
    pitch, every = row_height(len(blocks)), 1 if len(blocks) <= 16 else 2
    return [
        text(LEFT - 8, top + pitch * (i + 0.5) + 4, clip(block.name, 6), "end", "tick")
        for i, block in enumerate(blocks)
        if i % every == 0
    ]


def memory_figure(report: Report) -> Figure:
    """A bar a block: memory by kind upon the idle process; marks for both totals, a line for the budget."""
    blocks = [b for b in report.blocks if b.predicted_bytes is not None or b.working_set_bytes is not None]
    if not blocks:
        return Figure("memory", TITLE, None, "no working sets were recorded")
    idle = report.idle_bytes or 0
    most = idle + max(value or 0 for b in blocks for value in (b.predicted_bytes, b.working_set_bytes, _stacked(b)))
    budget = report.budget_bytes if report.idle_bytes is not None else None
    shown = budget if budget is not None and budget <= FAR * max(1, most) else None
    scale = Scale(0, 1.03 * max(most, shown or 0, 1), LEFT, RIGHT)
    height = row_height(len(report.blocks))
    bottom = TOP + height * len(report.blocks) + 4
    places = ticks(0, scale.high, 4, size_unit(scale.high))
    parts: list[str] = [x_axis(scale, places, words.size, "bytes of the process", TOP - 4, bottom)]
    parts += row_names(report.blocks, TOP)
    for i, block in enumerate(report.blocks):
        parts += _bar(block, idle, scale, TOP + height * i, height)
    if shown is not None:
        parts += _budget_line(scale(shown), f"budget {words.size(shown)}", bottom)
    label = f"{TITLE}: {_described(report)}"
    remarks = [f"The budget, {words.size(budget)}, is beyond the scale."] if budget is not None and not shown else []
    if words.micro_text(report):
        remarks.append(f"{words.micro_text(report)}.")
    if report.idle_bytes is None:
        remarks.append("Without the size of the idle process the bars start at zero, and no budget can be drawn.")
    return Figure(
        "memory", TITLE, drawing(bottom + 44, label, *parts), "", _legend(report, blocks), remarks, _table(report)
    )


def _stacked(block: BlockReport) -> int:
    return sum((block.predicted or {}).get(kind, 0) for kind in KINDS)


def _bar(block: BlockReport, idle: int, scale: Scale, top: float, height: float) -> list[Markup]:
    gap = 0.16 * height
    thick = height - 2 * gap
    parts = []
    if idle:
        tip = f"idle process: {words.size(idle)}"
        parts.append(rect(scale(0), top + gap, scale(idle) - scale(0), thick, "k-idle", tip))
    start = idle
    for swatch, name, kinds in GROUPS:
        part = sum((block.predicted or {}).get(kind, 0) for kind in kinds)
        tip = f"block {block.name}, {name}: {words.size(part)}"
        width = scale(start + part) - scale(start)
        if part:  # a thin part would vanish in its outline
            parts.append(rect(scale(start), top + gap, width, thick, f"part {swatch}" if width > 4 else swatch, tip))
        start += part
    if block.predicted_bytes is not None:
        place = scale(idle + block.predicted_bytes)
        parts += [line(place, top + 1, place, top + height - 1, style) for style in ("halo", "predicted")]
    if block.working_set_bytes is not None:
        tip = f"block {block.name}, measured: {words.size(block.working_set_bytes)}"
        parts.append(diamond(scale(idle + block.working_set_bytes), top + height / 2, min(6.0, 0.34 * height), tip))
    return parts


def diamond(x: float, y: float, radius: float, tip: str, class_: str = "measured") -> Markup:
    """The mark of a measurement."""
    return polygon([(x - radius, y), (x, y - radius), (x + radius, y), (x, y + radius)], class_, tip)


def _budget_line(place: float, label: str, bottom: float) -> list[Markup]:
    anchor = "end" if place > WIDTH / 2 else "start"
    return [line(place, TOP - 8, place, bottom, "budget"), text(min(place, RIGHT), TOP - 12, label, anchor, "name")]


def _legend(report: Report, blocks: list[BlockReport]) -> list[tuple[str, str]]:
    entries = [("k-idle", "idle process")] if report.idle_bytes else []
    present = {kind for block in blocks for kind, value in (block.predicted or {}).items() if value}
    entries += [(swatch, name) for swatch, name, kinds in GROUPS if present & set(kinds)]
    if any(b.predicted_bytes is not None for b in blocks):
        entries.append(("m-predicted", "predicted in all"))
    if any(b.working_set_bytes is not None for b in blocks):
        entries.append(("m-measured", "measured"))
    return entries


def _described(report: Report) -> str:
    each = [
        f"{b.name} predicted {words.size(b.predicted_bytes)}, measured {words.size(b.working_set_bytes)}"
        for b in report.blocks
    ]
    return f"working sets by block: {'; '.join(each)}; budget of the process {words.size(report.budget_bytes)}"


def _table(report: Report) -> list[list[str]]:
    used = [kind for kind in KINDS if any((b.predicted or {}).get(kind) for b in report.blocks)]
    rows = [["block", *used, "predicted", "measured", "ratio", "micro-batch", "arena", "arena predicted", "paged"]]
    for b in report.blocks:
        plan = b.plan
        batches = words.NONE
        if plan is not None and plan.micro_batch is not None:
            batches = f"{plan.micro_batch}" + (f" x {plan.accumulation}" if (plan.accumulation or 1) > 1 else "")
        rows.append(
            [
                b.name,
                *(words.size((b.predicted or {}).get(kind)) for kind in used),
                words.size(b.predicted_bytes),
                words.size(b.working_set_bytes),
                words.ratio(b.predicted_bytes, b.working_set_bytes),
                batches,
                words.size(b.arena_bytes),
                words.size(b.predicted_arena_bytes),
                words.size(b.paged_bytes),
            ]
        )
    return rows
