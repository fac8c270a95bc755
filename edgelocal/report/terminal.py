"""A run on the terminal: two tables a block, one of scores and one of memory, and a few lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from edgelocal.report import words
from edgelocal.report.device import device_rows, device_text, device_title
from edgelocal.report.model import BlockReport, DeviceMemory, Report, parse_report

MIN_BAR, MAX_BAR = 12, 48


@dataclass(frozen=True)
class Glyphs:
    """The characters of a memory bar."""

    idle: str
    measured: str
    predicted: str
    budget: str


UNICODE, ASCII = Glyphs("░", "█", "┃", "▕"), Glyphs(":", "#", "+", "|")


@dataclass(frozen=True)
class MemoryBar:
    """Bytes of a block on a scale from 0 to `full` bytes: the idle process, its measured working set upon it, and marks
    where it was predicted to end and where the budget ends. Any but `idle` may be None."""

    idle: int
    measured: int | None
    predicted: int | None
    budget: int | None
    full: int

    def text(self, width: int, glyphs: Glyphs) -> str:
        """The bar in `width` characters."""
        cells = [" "] * width
        for start, end, glyph in (
            (0, self.idle, glyphs.idle),
            (self.idle, self.idle + (self.measured or 0), glyphs.measured),
        ):
            first, last = (round(width * value / self.full) for value in (start, end))
            cells[first:last] = [glyph] * (last - first)
        marks = ((self.budget, glyphs.budget), (self.predicted and self.idle + self.predicted, glyphs.predicted))
        for end_bytes, glyph in marks:
            if end_bytes is not None:
                cells[min(width - 1, max(0, round(width * end_bytes / self.full) - 1))] = glyph
        return "".join(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.text(min(MAX_BAR, options.max_width), ASCII if options.ascii_only else UNICODE), no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(MIN_BAR, options.max_width), min(MAX_BAR, options.max_width))


def report_table(raw: dict[str, Any]) -> Group:
    """The tables of a report, as `train` returns it or `load_report` reads it."""
    report = parse_report(raw)
    parts: list[RenderableType] = [_scores(report)]
    if any(b.predicted_bytes is not None or b.working_set_bytes is not None for b in report.blocks):
        parts += [_memory(report), _Legend(report)]
    if report.device is not None:
        parts.append(_device(report, report.device))
    return Group(*parts)


def closing_lines(raw: dict[str, Any]) -> str:
    """The result in a sentence, then disk traffic, comparison and notes, a line each."""
    report = parse_report(raw)
    lines = [report.unfinished or "", words.conclusion(report), words.micro_text(report), words.disk_text(report)]
    lines.append(device_text(report))
    lines += words.comparison(report)
    lines += [f"note: {note}" for note in report.notes or ()]
    return "\n".join(line for line in lines if line)


def _scores(report: Report) -> Table:
    metric = report.metric.replace("_", " ").removeprefix("mean ")
    table = Table(title=Text(words.title(report)), title_justify="left")
    table.add_column("block")
    for name in ("local loss", metric, f"validation {metric}", "time", "p50 of a step"):
        table.add_column(name, justify="right")
    for block in report.blocks:
        latency = block.latency_s.p50 if block.latency_s else None
        table.add_row(
            Text(block.name),
            words.score(block.training, "loss"),
            words.score(block.training, report.metric),
            words.score(block.validation, report.metric),
            words.seconds(block.train_s),
            words.seconds(latency),
        )
    return table


def _memory(report: Report) -> Table:
    table = Table(title="working sets: memory above the idle process", title_justify="left")
    table.add_column("block")
    for name in ("predicted", "measured", "ratio"):
        table.add_column(name, justify="right")
    table.add_column(f"0 to {words.size(_full(report))}")
    for block in report.blocks:
        predicted, measured = block.predicted_bytes, block.working_set_bytes
        table.add_row(
            Text(block.name),
            words.size(predicted),
            words.size(measured),
            words.ratio(predicted, measured),
            _bar(report, block),
        )
    return table


def _device(report: Report, device: DeviceMemory) -> Table:
    header, *rows = device_rows(report)
    table = Table(title=Text(device_title(device)), title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


@dataclass(frozen=True)
class _Legend:
    """What the characters of the bars mean."""

    report: Report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glyphs = ASCII if options.ascii_only else UNICODE
        parts = [f"{glyphs.measured} measured", f"{glyphs.predicted} predicted"]
        if self.report.idle_bytes is not None:
            parts.insert(0, f"{glyphs.idle} idle process {words.size(self.report.idle_bytes)}")
            if self.report.budget_bytes is not None:
                parts.append(f"{glyphs.budget} budget {words.size(self.report.budget_bytes)}")
        yield Text("   ".join(parts))


def _bar(report: Report, block: BlockReport) -> MemoryBar:
    budget = None if report.idle_bytes is None else report.budget_bytes
    return MemoryBar(
        report.idle_bytes or 0, block.working_set_bytes, block.predicted_bytes, budget, max(1, _full(report))
    )


def _full(report: Report) -> int:
    """The end of the scale: the budget, or what is larger."""
    idle = report.idle_bytes or 0
    ends = [idle + (value or 0) for b in report.blocks for value in (b.working_set_bytes, b.predicted_bytes)]
    budget = 0 if report.idle_bytes is None else report.budget_bytes or 0
    return max([budget, *ends])
