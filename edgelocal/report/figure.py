"""A chart with its title, legend, remarks and figures in a table, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edgelocal.report.axes import Drawing
from edgelocal.report.svg import Markup, escape, join, tag

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """`drawing` is None where the run has no data for it, and `empty` says so in its place.

    `legend` has (swatch, words): the class of a colour, or the name of a mark drawn by the style sheet. The first row
    of `table` is its header.
    """

    name: str
    title: str
    drawing: Drawing | None
    empty: str = ""
    legend: Sequence[tuple[str, str]] = ()
    remarks: Sequence[str] = ()
    table: Rows = field(default=())

    @property
    def height(self) -> float:
        """About how high it is on a wide page, to balance columns."""
        return 1.17 * self.drawing.height + 130 if self.drawing else 150

    def html(self) -> Markup:
        """The figure element, with the id "chart-" + name."""
        parts: list[str] = [tag("h2", self.title)]
        if self.drawing is None:
            parts.append(tag("p", self.empty, class_="empty"))
        else:
            if self.legend:
                parts.append(tag("ul", *(_entry(*entry) for entry in self.legend), class_="legend"))
            parts.append(self.drawing.svg)
        parts += [tag("p", remark, class_="remark") for remark in self.remarks]
        if len(self.table) > 1:
            parts.append(tag("details", tag("summary", "the figures"), table(self.table)))
        return tag("figure", *parts, id=f"chart-{self.name}")


def _entry(swatch: str, words: str) -> Markup:
    return tag("li", tag("span", class_=f"swatch {swatch}", aria_hidden="true"), words)


def table(rows: Rows) -> Markup:
    """A table with a header row; the first column is words, the others are aligned as numbers."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in rows[0]))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows[1:]]
    return scrolling(tag("table", tag("thead", head), tag("tbody", *body), class_="figures"))


def facts(rows: Sequence[tuple[str, str]]) -> Markup:
    """Names and what they are, in two columns."""
    return tag("dl", *(join((tag("dt", name), tag("dd", value))) for name, value in rows))


def scrolling(content: Markup) -> Markup:
    """What may be wider than a phone scrolls by itself, not the page."""
    return tag("div", escape(content), class_="scroll")
