"""Loss and accuracy over the epochs, a line a block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edgelocal.report import words
from edgelocal.report.axes import (
    WIDTH,
    Scale,
    clip,
    depth_style,
    drawing,
    log_ticks,
    padded,
    spread,
    ticks,
    x_axis,
    y_axis,
)
from edgelocal.report.figure import Figure, Rows
from edgelocal.report.model import Epoch, Report
from edgelocal.report.svg import Markup, circle, join, line, polyline, rect, tag, text

LEFT, TOP, BOTTOM = 58, 28, 240
FEW = 10  # so many lines can be named at their ends
LOG_FROM = 12  # largest over smallest loss from which equal ratios get equal heights

Series = list[tuple[float, float]]


def loss_figure(report: Report) -> Figure:
    """Local loss of every block by epoch."""
    return _figure(report, "loss", "loss", "Local loss of every block")


def metric_figure(report: Report) -> Figure:
    """Accuracy, or mean absolute error, of every block by epoch."""
    name = report.metric.replace("_", " ")
    return _figure(report, "accuracy", report.metric, f"{name.capitalize()} of every block")


def _figure(report: Report, name: str, key: str, title: str) -> Figure:
    names = block_names(report)
    lines = {block: _series(report.metrics, block, key) for block in names}
    lines = {block: points for block, points in lines.items() if points}
    if not lines:
        return Figure(name, title, None, "no epoch was recorded")
    held = _held(report.metrics, key)
    values = [value for points in (*lines.values(), held) for _, value in points]
    log = key == "loss" and min(values) > 0 and max(values) / min(values) >= LOG_FROM
    right = WIDTH - (62 if len(lines) <= FEW else 14)
    last = max(epoch for points in (*lines.values(), held) for epoch, _ in points)
    x = Scale(1, max(2, last), LEFT, right)
    y = _scale(values, log, key)
    parts: list[str] = [*_axes(x, y, last, key)]
    for block, points in lines.items():
        parts.append(_line(points, x, y, f"block {block}", depth_style(names.index(block), len(names))))
    if held:
        parts.append(polyline([(x(e), y(v)) for e, v in held], "held", "validation"))
        parts += [circle(x(e), y(v), 3, "held-dot", f"validation, epoch {e:g}") for e, v in held if len(held) == 1]
    few = len(lines) <= FEW
    if few:
        parts += _ends(lines, names, x, y, right)
    else:
        parts.append(_depth_scale(names))
    legend = [("m-held", "validation, at the end of the network")] if held else []
    label = f"{title}: " + "; ".join(f"{block} ends at {_shown(p[-1][1], key)}" for block, p in lines.items())
    height = BOTTOM + 44 if few else BOTTOM + 78
    return Figure(name, title, drawing(height, label, *parts), "", legend, (), _table(report, names, key))


def block_names(report: Report) -> list[str]:
    """Names of the blocks in the order of the network; those only in the metrics come last."""
    trained = [name for record in report.metrics for name in record.blocks]
    return list(dict.fromkeys([*(block.name for block in report.blocks), *trained]))


def _series(metrics: Sequence[Epoch], block: str, key: str) -> Series:
    found = ((record.epoch, record.blocks.get(block, {}).get(key)) for record in metrics)
    return [(float(epoch), value) for epoch, value in found if value is not None]


def _held(metrics: Sequence[Epoch], key: str) -> Series:
    """Validation by epoch, where one network was validated all along (sequential stages validate ever longer ones)."""
    if len({record.stage for record in metrics}) != 1:
        return []
    found = ((record.epoch, (record.validation or {}).get(key)) for record in metrics)
    return [(float(epoch), value) for epoch, value in found if value is not None]


def _scale(values: Sequence[float], log: bool, key: str) -> Scale:
    if log:
        low, high = padded([math.log10(value) for value in values])
        return Scale(10**low, 10**high, BOTTOM, TOP, log=True)
    low, high = padded(values)
    return Scale(max(0.0, low), min(1.0, high) if key == "accuracy" else high, BOTTOM, TOP)


def _axes(x: Scale, y: Scale, last: float, key: str) -> list[Markup]:
    places = log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high)
    titles = {"loss": "loss" + (", log scale" if y.log else ""), "accuracy": "accuracy (%)"}
    label = (lambda v: f"{100 * v:g}") if key == "accuracy" else (lambda v: f"{v:.6g}")
    epochs = [value for value in ticks(1, last, 8) if value == int(value)]
    return [
        y_axis(y, places, label, titles.get(key, key.replace("_", " ")), LEFT, x.end),
        x_axis(x, epochs, lambda v: f"{v:g}", "epoch", TOP, BOTTOM),
    ]


def _line(points: Series, x: Scale, y: Scale, tip: str, style: str) -> Markup:
    places = [(x(epoch), y(value)) for epoch, value in points]
    if len(places) == 1:
        return circle(*places[0], 3.5, "depth", tip, style)
    return polyline(places, "curve", tip, style)


def _ends(lines: Mapping[str, Series], names: list[str], x: Scale, y: Scale, right: float) -> list[Markup]:
    """The name of each line beside its end, moved apart where ends meet, with a leader."""
    ends = [(x(points[-1][0]), y(points[-1][1])) for points in lines.values()]
    places = spread([place for _, place in ends], 15, TOP + 2, BOTTOM)
    parts = []
    for block, (end_x, end_y), place in zip(lines, ends, places, strict=True):
        style = depth_style(names.index(block), len(names))
        parts.append(polyline([(end_x + 2, end_y), (right + 8, place), (right + 13, place)], "leader", "", style))
        parts.append(text(right + 16, place + 4, clip(block, 6), class_="name"))
    return parts


def _depth_scale(names: list[str]) -> Markup:
    """What the colours of many lines mean."""
    width, top = (WIDTH - 14 - LEFT) / len(names), BOTTOM + 46
    parts: list[str] = [
        rect(LEFT + width * i, top, width + 0.3, 10, "depth", f"block {name}", depth_style(i, len(names)))
        for i, name in enumerate(names)
    ]
    middle = len(names) // 2
    for i, anchor in ((0, "start"), (middle, "middle"), (len(names) - 1, "end")):
        place = LEFT + width * (i + {"start": 0, "middle": 0.5, "end": 1}[anchor])
        parts += [
            line(place, top + 10, place, top + 14, "leader-plain"),
            text(place, top + 27, clip(f"block {names[i]}", 12), anchor, "tick"),
        ]
    return tag("g", join(parts))


def _shown(value: float, key: str) -> str:
    return words.score({key: value}, key)


def _table(report: Report, names: list[str], key: str) -> Rows:
    """First, best and last value of every block."""
    rows = [["block", "first epoch", "best", "last epoch"]]
    best = max if key == "accuracy" else min
    for name in names:
        values = [value for _, value in _series(report.metrics, name, key)]
        if values:
            rows.append([name, *(_shown(value, key) for value in (values[0], best(values), values[-1]))])
    return rows
