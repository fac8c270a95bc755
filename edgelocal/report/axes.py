"""Scales, ticks and axes: data -> places in a drawing of `WIDTH` units, which can be read on a phone and on a desk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from edgelocal.report.svg import Markup, join, line, tag, text

WIDTH = 460
CHARACTER = 8.6  # width of a character at the charts' largest font size, on average


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` -> places from `start` to `end`; `log` needs positive values."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, most: int = 5, unit: float = 1) -> list[float]:
    """Round values in `low`..`high`, at most about `most`, at 1, 2, 2.5 or 5 times a power of ten of `unit`."""
    low, high = low / unit, high / unit
    if not high > low:
        return [low * unit]
    raw = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m for m in (1, 2, 2.5, 5, 10, 20) if raw <= m * magnitude * 1.0001) * magnitude
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [i * step * unit for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in `low`..`high`; powers alone where these would be many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    many = len(exponents) > 4
    found = [m * 10.0**e for e in exponents for m in ((1,) if many else (1, 2, 5))]
    return [value for value in found if low <= value <= high]


def size_unit(high_bytes: float) -> int:
    """The unit of a scale of sizes: 1, KiB, MiB or GiB."""
    return 1024 ** max(0, min(3, int(math.log(high_bytes, 1024)))) if high_bytes >= 1 else 1


def time_unit(high_s: float) -> tuple[float, str]:
    """The unit of a scale of times: (seconds, name)."""
    return next(
        (unit for limit, unit in ((1, (0.001, "ms")), (200, (1.0, "s")), (10800, (60.0, "min"))) if high_s < limit),
        (3600.0, "h"),
    )


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """The range of values with some room, also where they are all the same."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def x_axis(
    scale: Scale, values: Sequence[float], label: Callable[[float], str], title: str, top: float, bottom: float
) -> Markup:
    """Vertical grid lines from `top` to `bottom` with their labels, and the title of the axis, below."""
    parts: list[str] = []
    for value in values:
        place = scale(value)
        parts += [line(place, top, place, bottom, "grid"), text(place, bottom + 17, label(value), "middle", "tick")]
    return join([*parts, text((scale.start + scale.end) / 2, bottom + 36, title, "middle", "axis")])


def y_axis(
    scale: Scale, values: Sequence[float], label: Callable[[float], str], title: str, left: float, right: float
) -> Markup:
    """Horizontal grid lines from `left` to `right` with their labels, and the title of the axis, at the top."""
    parts: list[str] = []
    for value in values:
        place = scale(value)
        parts += [line(left, place, right, place, "grid"), text(left - 7, place + 4, label(value), "end", "tick")]
    return join([*parts, text(2, 14, title, class_="axis")])


class Drawing(NamedTuple):
    """An svg element, and its height in the units of `WIDTH`."""

    height: float
    svg: Markup


def drawing(height: float, label: str, *parts: str) -> Drawing:
    """The parts as one element, with a description for those who cannot see it."""
    svg = tag(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewbox=f"0 0 {WIDTH} {height:g}",
        role="img",
        aria_label=label,
    )
    return Drawing(height, svg)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved as little as needed to be `gap` apart within `low`..`high`; the order is kept."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    found = [0.0] * len(places)
    before = -math.inf
    for i in order:
        before = found[i] = max(places[i], before + gap, low)
    after = high + gap
    for i in reversed(order):
        after = found[i] = min(found[i], after - gap)
    return found


def clip(name: str, characters: int) -> str:
    """A name cut to a number of characters."""
    return name if len(name) <= characters else name[: characters - 1] + "…"


_ANCHORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis


def depth_style(index: int, count: int) -> str:
    """Colours of a block by its depth, for light and dark pages, from a scale that every kind of sight can order."""
    share = index / (count - 1) if count > 1 else 0.4
    return f"--light:{_viridis(0.78 * share)};--dark:{_viridis(0.3 + 0.7 * share)}"


def _viridis(share: float) -> str:
    place = share * (len(_ANCHORS) - 1)
    i = min(int(place), len(_ANCHORS) - 2)
    mixed = (round(a + (b - a) * (place - i)) for a, b in zip(_ANCHORS[i], _ANCHORS[i + 1], strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
