"""Time of every block: all its steps together, and the spread of a step."""

from __future__ import annotations

from edgelocal.report import words
from edgelocal.report.axes import CHARACTER, WIDTH, Scale, drawing, log_ticks, ticks, time_unit, x_axis
from edgelocal.report.figure import Figure
from edgelocal.report.memory import LEFT, diamond, row_height, row_names
from edgelocal.report.model import Latency, Report
from edgelocal.report.svg import Markup, circle, line, rect, text

TIME, STEP = "Time in the steps of every block", "Time of a step"
RIGHT, TOP = WIDTH - 14, 12
NAMED = 30  # up to so many bars have their value at the end
LOG_FROM = 30


def time_figure(report: Report) -> Figure:
    """A bar a block: seconds in its steps, over the run."""
    times = [block.train_s for block in report.blocks]
    known = [value for value in times if value is not None]
    if not known:
        return Figure("time", TIME, None, "no times were recorded")
    blocks, height = report.blocks, row_height(len(report.blocks))
    named = len(blocks) <= NAMED
    room = max(len(words.seconds(value)) for value in times) * CHARACTER + 8 if named else 0
    scale = Scale(0, max(max(known), 1e-3), LEFT, RIGHT - room)
    bottom = TOP + height * len(blocks) + 4
    unit, name = time_unit(scale.high)
    parts: list[str] = [
        x_axis(scale, ticks(0, scale.high, 5, unit), lambda s: f"{s / unit:g}", f"time ({name})", TOP - 4, bottom),
        *row_names(blocks, TOP),
    ]
    for i, block in enumerate(blocks):
        top = TOP + height * (i + 0.2)
        value = block.train_s
        if value is not None:
            tip = f"block {block.name}: {words.seconds(value)} in {words.count(block.steps)} steps"
            parts.append(rect(LEFT, top, scale(value) - LEFT, 0.6 * height, "bar", tip))
        if named:
            place = LEFT if value is None else scale(value)
            parts.append(text(place + 5, TOP + height * (i + 0.5) + 4, words.seconds(value), class_="name"))
    label = f"{TIME}: " + "; ".join(f"{b.name} {words.seconds(b.train_s)}" for b in blocks)
    rows = [["block", "time", "steps", "a step, on average"]]
    rows += [[b.name, words.seconds(b.train_s), words.count(b.steps), _mean(b.train_s, b.steps)] for b in blocks]
    return Figure("time", TIME, drawing(bottom + 44, label, *parts), table=rows)


def _mean(time_s: float | None, steps: int | None) -> str:
    return words.seconds(time_s / steps) if time_s is not None and steps else words.NONE


def latency_figure(report: Report) -> Figure:
    """A row a block: median, 90th and 99th percentile of the time of a step."""
    spreads = [block.latency_s or Latency() for block in report.blocks]
    values = [value for s in spreads for value in (s.p50, s.p90, s.p99) if value is not None]
    if not values:
        return Figure("latency", STEP, None, "no step latencies were recorded")
    log = min(values) > 0 and max(values) / min(values) >= LOG_FROM
    scale = Scale(0.8 * min(values) if log else 0, max(1.04 * max(values), 1e-6), LEFT, RIGHT, log)
    height = row_height(len(report.blocks))
    bottom = TOP + height * len(report.blocks) + 4
    unit, name = time_unit(scale.high)
    places = log_ticks(scale.low, scale.high) if log else ticks(0, scale.high, 5, unit)
    title = f"time of a step ({name}{', log scale' if log else ''})"
    parts: list[str] = [
        x_axis(scale, places, lambda s: f"{s / unit:g}", title, TOP - 4, bottom),
        *row_names(report.blocks, TOP),
    ]
    for i, (block, spread) in enumerate(zip(report.blocks, spreads, strict=True)):
        parts += _spread(spread, scale, TOP + height * (i + 0.5), min(6.0, 0.34 * height), block.name)
    legend = [("m-p50", "p50"), ("m-p90", "p90"), ("m-p99", "p99")]
    rows = [["block", "p50", "p90", "p99"]]
    for block, spread in zip(report.blocks, spreads, strict=True):
        rows.append([block.name, *(words.seconds(value) for value in (spread.p50, spread.p90, spread.p99))])
    label = f"{STEP}: " + "; ".join(f"{row[0]} p50 {row[1]}, p90 {row[2]}, p99 {row[3]}" for row in rows[1:])
    return Figure("latency", STEP, drawing(bottom + 44, label, *parts), "", legend, (), rows)


def _spread(spread: Latency, scale: Scale, y: float, radius: float, name: str) -> list[Markup]:
    known = [value for value in (spread.p50, spread.p90, spread.p99) if value is not None]
    parts = [line(scale(min(known)), y, scale(max(known)), y, "whisker")] if known else []
    if spread.p99 is not None:
        x = scale(spread.p99)
        parts.append(line(x, y - radius, x, y + radius, "p99"))
    if spread.p90 is not None:
        parts.append(diamond(scale(spread.p90), y, radius, f"block {name}, p90 {words.seconds(spread.p90)}", "p90"))
    if spread.p50 is not None:
        parts.append(
            circle(scale(spread.p50), y, 0.85 * radius, "p50", f"block {name}, p50 {words.seconds(spread.p50)}")
        )
    return parts
