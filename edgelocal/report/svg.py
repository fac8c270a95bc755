"""Elements of SVG and HTML as text. What is not markup already is escaped, so no text of a run can become markup."""

from __future__ import annotations

import html
import re

# Characters that XML forbids, whole or half: names in a run may be any text.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_VOID = {"meta", "br"}
_SPELLED = {"viewbox": "viewBox", "class_": "class"}


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """Any text as markup that shows it."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(_FORBIDDEN.sub("\ufffd", text)))


def number(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """An element. Attributes of None are left out; `class_` is class, and underscores become hyphens."""
    shown = "".join(
        f' {_SPELLED.get(key, key.replace("_", "-"))}="{escape(value if isinstance(value, str) else number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{join(children)}</{name}>")


def join(children: tuple[str, ...] | list[str]) -> Markup:
    """Children one after the other."""
    return Markup("".join(escape(child) for child in children))


def text(x: float, y: float, content: str, anchor: str = "start", class_: str | None = None) -> Markup:
    """A line of text with its baseline at y."""
    return tag("text", content, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str, tip: str = "", style: str = "") -> Markup:
    """A rectangle; `tip` shows when pointed at."""
    tips = (tag("title", tip),) if tip else ()
    return tag("rect", *tips, x=x, y=y, width=max(0.0, width), height=height, class_=class_, style=style or None)


def polyline(points: list[tuple[float, float]], class_: str, tip: str = "", style: str = "") -> Markup:
    """An open line through points."""
    tips = (tag("title", tip),) if tip else ()
    places = " ".join(f"{number(float(x))},{number(float(y))}" for x, y in points)
    return tag("polyline", *tips, points=places, class_=class_, style=style or None)


def circle(x: float, y: float, radius: float, class_: str, tip: str = "", style: str = "") -> Markup:
    """A dot."""
    tips = (tag("title", tip),) if tip else ()
    return tag("circle", *tips, cx=x, cy=y, r=radius, class_=class_, style=style or None)


def polygon(points: list[tuple[float, float]], class_: str, tip: str = "") -> Markup:
    """A filled shape."""
    tips = (tag("title", tip),) if tip else ()
    places = " ".join(f"{number(float(x))},{number(float(y))}" for x, y in points)
    return tag("polygon", *tips, points=places, class_=class_)
