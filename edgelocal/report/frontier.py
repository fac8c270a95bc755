"""The ways to train the network that were weighed: memory against work, and the one that was taken."""

from __future__ import annotations

from collections.abc import Sequence

from edgelocal.report import words
from edgelocal.report.axes import CHARACTER, WIDTH, Scale, drawing, padded, size_unit, ticks, x_axis, y_axis
from edgelocal.report.figure import Figure
from edgelocal.report.model import FrontierPoint, Report
from edgelocal.report.svg import Markup, circle, line, polygon, polyline, text

TITLE = "What was weighed: memory against work"
LEFT, RIGHT, TOP, BOTTOM = 66, WIDTH - 16, 54, 284
SIZE = 5.5

Box = tuple[float, float, float, float]


def frontier_figure(report: Report) -> Figure:
    """Working set on x, training MACs a sample on y; partitions joined by a line, the others named."""
    points = report.frontier
    if not points:
        return Figure("frontier", TITLE, None, "no frontier was recorded: the bundle was not searched for a partition")
    left_over = report.working_budget_bytes()
    most = max(point.working_set_bytes for point in points)
    fits = report.frontier_applies and left_over is not None and 0 < left_over <= 1.5 * max(1, most)
    budget = left_over if fits else None
    x = Scale(0, 1.08 * max(most, budget or 0, 1), LEFT, RIGHT)
    low, high = padded([float(point.training_macs) for point in points], 0.14)
    y = Scale(max(0.0, low), high, BOTTOM, TOP)
    at_batch = f" at batch {report.frontier_batch}" if report.frontier_batch else ""
    title = f"working set{at_batch} (bytes above idle)"
    parts: list[str] = [
        y_axis(y, ticks(y.low, y.high), words.short_count, "training MACs a sample", LEFT, RIGHT),
        x_axis(x, ticks(0, x.high, 5, size_unit(x.high)), words.size, title, TOP, BOTTOM),
    ]
    taken: list[Box] = []
    if budget is not None:
        taken.append((x(budget) - 5, TOP, x(budget) + 5, BOTTOM))
        label = f"budget less idle: {words.size(budget)}"
        anchor = "end" if x(budget) > WIDTH / 2 else "start"
        parts += [
            line(x(budget), TOP - 6, x(budget), BOTTOM, "budget"),
            text(x(budget), TOP - 10, label, anchor, "name"),
        ]
    partitions = sorted(
        (p for p in points if p.kind == "partition"), key=lambda p: (p.working_set_bytes, -p.training_macs)
    )
    parts.append(polyline([_place(p, x, y) for p in partitions], "front", "partitions"))
    for point in sorted(points, key=lambda p: bool(p.chosen)):
        place = _place(point, x, y)
        taken.append((place[0] - SIZE, place[1] - SIZE, place[0] + SIZE, place[1] + SIZE))
        parts.append(_mark(point, *place))
    parts += _labels(points, x, y, taken)
    described = "; ".join(f"{_label(p)} {words.size(p.working_set_bytes)}" for p in _named(points))
    remarks = []
    if not report.frontier_applies:
        remarks.append(f"This run has batch {report.batch}: its working sets are not these.")
    elif words.micro_text(report):
        remarks.append(f"In this run {words.micro_text(report)}.")
    return Figure(
        "frontier",
        TITLE,
        drawing(BOTTOM + 44, f"{TITLE}: {described}", *parts),
        legend=[("m-partition", "partitions into blocks"), ("m-chosen", "trained")],
        remarks=remarks,
        table=_table(points),
    )


def _place(point: FrontierPoint, x: Scale, y: Scale) -> tuple[float, float]:
    return x(point.working_set_bytes), y(point.training_macs)


def _mark(point: FrontierPoint, x: float, y: float) -> Markup:
    tip = f"{_label(point)}: {words.size(point.working_set_bytes)}, {words.short_count(point.training_macs)} MACs"
    r = SIZE
    shapes = {
        "bp": [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)],
        "checkpointing": [(x - r - 1, y), (x, y - r - 1), (x + r + 1, y), (x, y + r + 1)],
        "per-unit": [(x, y - r - 1), (x + r + 1, y + r), (x - r - 1, y + r)],
        "linear": [(x, y + r + 1), (x + r + 1, y - r), (x - r - 1, y - r)],
    }
    if point.chosen:
        return circle(x, y, 7, "chosen", f"trained: {tip}")
    if point.kind in shapes:
        return polygon(shapes[point.kind], f"point p-{point.kind}", tip)
    return circle(x, y, 3.5, "point p-partition", tip)


def _label(point: FrontierPoint) -> str:
    return words.marked(point.kind if point.kind != "partition" else words.blocks_text(point.blocks), point)


def _named(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The point that was chosen, and the smallest of every kind that is no partition."""
    kinds = dict.fromkeys(point.kind for point in points if point.kind != "partition")
    least = [min((p for p in points if p.kind == kind), key=lambda p: p.working_set_bytes) for kind in kinds]
    return list(dict.fromkeys([p for p in points if p.chosen] + least))


def _labels(points: Sequence[FrontierPoint], x: Scale, y: Scale, taken: list[Box]) -> list[Markup]:
    """Names beside their points, each at the first side where it covers nothing."""
    parts: list[Markup] = []
    for point in _named(points):
        label = _label(point)
        place, box = _free_place(*_place(point, x, y), CHARACTER * len(label), taken)
        taken.append(box)
        parts += [text(*place, label, class_="name")]
    return parts


def _free_place(x: float, y: float, width: float, taken: list[Box]) -> tuple[tuple[float, float], Box]:
    """Left end of the baseline, and the box, of a text `width` wide beside the point (x, y)."""
    sides = [(x + 11, y + 4), (x - 11 - width, y + 4), (x - width / 2, y - 12), (x - width / 2, y + 22)]
    sides += [(x + 9, y - 10), (x + 9, y + 19), (x - 9 - width, y - 10), (x - 9 - width, y + 19)]
    sides += [(x + 9, y - 26), (x - 9 - width, y - 26), (x + 9, y + 35), (x - 9 - width, y + 35)]
    boxes = [(left, base - 11, left + width, base + 3) for left, base in sides]
    costs = [sum(_overlap(box, other) for other in taken) + _outside(box) for box in boxes]
    best = costs.index(min(costs))
    return sides[best], boxes[best]


def _overlap(a: Box, b: Box) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _outside(box: Box) -> float:
    """How much of the box is outside the plot; that is worse than covering something."""
    return 100.0 * sum(max(0.0, d) for d in (LEFT - box[0], TOP - box[1], box[2] - RIGHT, box[3] - BOTTOM))


def _table(points: Sequence[FrontierPoint]) -> list[list[str]]:
    bp = next((point for point in points if point.kind == "bp"), None)
    rows = [["kind", "blocks", "working set", "of bp", "MACs a sample", "of bp", ""]]
    for p in points:
        rows.append(
            [
                words.marked(p.kind, p),
                words.count(p.blocks),
                words.size(p.working_set_bytes),
                words.ratio(p.working_set_bytes, bp.working_set_bytes if bp else None),
                words.short_count(p.training_macs),
                words.ratio(p.training_macs, bp.training_macs if bp else None),
                "trained" if p.chosen else "",
            ]
        )
    return rows
