"""Resident memory over the time of the run, with the blocks that worked and the budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from edgelocal.report import words
from edgelocal.report.axes import (
    CHARACTER,
    WIDTH,
    Scale,
    clip,
    depth_style,
    drawing,
    size_unit,
    ticks,
    time_unit,
    x_axis,
    y_axis,
)
from edgelocal.report.figure import Figure
from edgelocal.report.memory import FAR
from edgelocal.report.model import Report
from edgelocal.report.svg import Markup, line, polygon, polyline, rect, text

TITLE = "Memory over time"
LEFT, RIGHT, TOP, BOTTOM = 72, WIDTH - 14, 28, 230
STRIP = 12  # height of the strip of blocks
MANY = 150  # more turns than this cannot be told apart at this width


def timeline_figure(report: Report) -> Figure:
    """A line of resident bytes, a strip of the blocks below it, a line for the budget."""
    points = report.timeline
    if not points or len(points) < 2:
        return Figure("timeline", TITLE, None, "no timeline was recorded")
    most = max(point[1] for point in points)
    budget = report.budget_bytes if report.budget_bytes and report.budget_bytes <= FAR * max(1, most) else None
    first, last = points[0][0], points[-1][0]
    x = Scale(0 if first < 0.1 * last else first, max(last, first + 1e-9), LEFT, RIGHT)
    y = Scale(0, 1.06 * max(most, budget or 0, 1), BOTTOM, TOP)
    turns = _turns(points)
    parts: list[str] = [*_axes(x, y)]
    parts += _strip(report, turns, x) if len(turns) <= MANY else []
    places = [(x(seconds), y(resident)) for seconds, resident, _ in points]
    parts += [polygon([(places[0][0], BOTTOM), *places, (places[-1][0], BOTTOM)], "area"), polyline(places, "series")]
    if budget is not None:
        parts.append(line(LEFT, y(budget), RIGHT, y(budget), "budget"))
        parts.append(text(RIGHT, y(budget) - 5, f"budget {words.size(budget)}", "end", "name"))
    if report.idle_bytes:
        parts.append(line(LEFT, y(report.idle_bytes), RIGHT, y(report.idle_bytes), "idle"))
        parts.append(text(RIGHT - 3, y(report.idle_bytes) + 14, f"idle {words.size(report.idle_bytes)}", "end", "name"))
    spent = points[-1][0] - points[0][0]
    label = f"{TITLE}: up to {words.size(most)} in {words.seconds(spent)}, budget {words.size(report.budget_bytes)}"
    return Figure("timeline", TITLE, drawing(BOTTOM + 58, label, *parts), remarks=_remarks(report, turns, budget))


def _axes(x: Scale, y: Scale) -> list[Markup]:
    unit, name = time_unit(x.high)
    return [
        y_axis(y, ticks(0, y.high, 5, size_unit(y.high)), words.size, "resident bytes", LEFT, RIGHT),
        x_axis(x, ticks(x.low, x.high, 6, unit), lambda s: f"{s / unit:g}", f"time ({name})", TOP, BOTTOM + STRIP),
    ]


def _turns(points: Sequence[tuple[float, ...]]) -> list[tuple[int, float, float]]:
    """(block or -1, first second, last second) of stretches in which one block worked; what lies between two steps of a
    block is part of its stretch."""
    stretches = [(int(block), list(group)) for block, group in groupby(points, key=lambda point: point[2])]
    ends = [group[0][0] for _, group in stretches[1:]] + [points[-1][0]]
    turns: list[tuple[int, float, float]] = []
    for (block, group), end in zip(stretches, ends, strict=True):
        start = group[0][0]
        if [turn[0] for turn in turns[-2:]] == [block, -1]:
            start = turns[-2][1]
            del turns[-2:]
        turns.append((block, start, end))
    return turns


def _strip(report: Report, turns: list[tuple[int, float, float]], x: Scale) -> list[Markup]:
    parts = []
    for block, start, end in turns:
        if block < 0:
            continue
        name = report.blocks[block].name if block < len(report.blocks) else str(block)
        style = depth_style(block, len(report.blocks))
        left, width = x(start), x(end) - x(start)
        parts.append(rect(left, TOP, width, BOTTOM - TOP, f"shade shade-{block % 2}"))
        parts.append(
            rect(left, BOTTOM + 1, width, STRIP - 2, "depth", f"block {name} from {words.seconds(start)}", style)
        )
        shown = clip(name, 6)
        if width > CHARACTER * len(shown) + 6:
            parts.append(text(left + width / 2, BOTTOM - 6, shown, "middle", "tick"))
    return parts


def _remarks(report: Report, turns: list[tuple[int, float, float]], budget: int | None) -> list[str]:
    found = []
    worked = sorted({block for block, _, _ in turns if block >= 0})
    if len(turns) > MANY:
        found.append(f"{words.blocks_text(len(worked)).capitalize()} took turns, too quickly to be drawn one by one.")
    elif len(worked) > 1:
        found.append("Shades, and the strip below, show which block worked: dark is early in the network.")
    if report.budget_bytes and budget is None:
        found.append(f"The budget, {words.size(report.budget_bytes)}, is beyond the scale.")
    return found
