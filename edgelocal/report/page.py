"""One page that holds everything: no scripts, nothing fetched, readable offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgelocal import __version__
from edgelocal.report import words
from edgelocal.report.curves import loss_figure, metric_figure
from edgelocal.report.device import device_rows, device_text, device_title
from edgelocal.report.figure import facts, table
from edgelocal.report.frontier import frontier_figure
from edgelocal.report.memory import memory_figure
from edgelocal.report.model import Report, parse_report
from edgelocal.report.style import CSS
from edgelocal.report.svg import Markup, tag
from edgelocal.report.timeline import timeline_figure
from edgelocal.report.times import latency_figure, time_figure
from edgelocal.storage.whole import atomic_write

DIGEST = 16  # so many digits of a digest are shown
FIGURES = (memory_figure, timeline_figure, loss_figure, metric_figure, time_figure, latency_figure, frontier_figure)


def write_page(raw: dict[str, Any], path: Path) -> None:
    """Write what `load_report` read as a page to the file `path`, whole or not at all.

    Raises:
        StorageError: the system refused.
    """
    atomic_write(path, [render_page(parse_report(raw)).encode()])


def render_page(report: Report) -> str:
    """The page as text."""
    name = words.title(report)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{name} - edgelocal report"),
        tag("style", Markup(CSS)),
    )
    body = tag("main", *_header(report), _tiles(report), _charts(report), *_sections(report))
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def _charts(report: Report) -> Markup:
    """The charts in two columns of about one height; on a phone one column, in their order."""
    figures = [figure(report) for figure in FIGURES]
    cards = [(figure.height, figure.html()) for figure in figures]
    sentences = words.comparison(report)
    cards.append((60 + 75 * max(1, len(sentences)), _beside_bp(sentences)))
    columns: tuple[list[Markup], list[Markup]] = ([], [])
    heights = [0.0, 0.0]
    for order, (height, card) in enumerate(cards):
        shorter = heights.index(min(heights))
        columns[shorter].append(tag("div", card, class_="card", style=f"order:{order}"))
        heights[shorter] += height
    return tag("div", *(tag("div", *column, class_="column") for column in columns), class_="charts")


def _header(report: Report) -> list[Markup]:
    rule = f"rule {report.rule}" if report.rule else ""
    batch = f"batch {report.batch}" if report.batch else ""
    samples = f"{words.count(report.samples)} samples" if report.samples is not None else ""
    parts = [part for part in (rule, report.schedule or "", words.trained_by(report), batch, samples) if part]
    found = [tag("h1", report.name), tag("p", ", ".join(parts), class_="lead")]
    if report.unfinished:
        found.append(tag("p", report.unfinished, class_="state"))
    return found


def _tiles(report: Report) -> Markup:
    tiles = [_peak_tile(report)]
    scores, what = report.validation, "validation"
    if not scores:
        scores, what = (report.blocks[-1].training if report.blocks else None), "training, last block"
    metric = report.metric.replace("_", " ")
    loss = f", loss {words.score(scores, 'loss')}" if scores else ""
    tiles.append(_tile(words.score(scores, report.metric), f"{metric} ({what}){loss}"))
    steps = f"in {words.count(report.steps)} steps" if report.steps is not None else "in steps"
    tiles.append(_tile(words.seconds(report.train_s), steps))
    units = sum(len(block.units or ()) for block in report.blocks)
    of_units = f" of {units} unit{'s' * (units != 1)}" if units else ""
    tiles.append(_tile(str(len(report.blocks)), f"block{'s' * (len(report.blocks) != 1)}{of_units}"))
    tiles += _working_set_tile(report)
    disk = words.disk_text(report)
    if disk:
        tiles.append(_tile(words.size((report.paged_bytes or 0) + (report.cached_bytes or 0)), f"on disk: {disk}"))
    return tag("div", *tiles, class_="tiles")


def _tile(figure: str, what: str, *more: Markup) -> Markup:
    return tag("div", tag("b", figure), *more, tag("span", what), class_="tile")


def _peak_tile(report: Report) -> Markup:
    peak, budget = report.process_peak_bytes, report.budget_bytes
    if peak is None or not budget:
        return _tile(words.size(peak), "peak of the process" + ("" if budget else ", no budget"))
    share = min(100.0, 100 * peak / budget)
    planned = f", planned {words.size(report.planned_peak_bytes)}" if report.planned_peak_bytes is not None else ""
    meter = tag("div", tag("div", style=f"width:{share:.1f}%"), class_="meter", aria_hidden="true")
    what = f"peak of the process{planned}, {words.percent(peak, budget)} of {words.size(budget)}"
    return _tile(words.size(peak), what, meter)


def _working_set_tile(report: Report) -> list[Markup]:
    known = [block for block in report.blocks if block.working_set_bytes is not None]
    if not known:
        return []
    largest = max(known, key=lambda block: block.working_set_bytes or 0)
    predicted = largest.predicted_bytes
    beside = f", predicted {words.size(predicted)}" if predicted is not None else ""
    return [_tile(words.size(largest.working_set_bytes), f"largest working set (block {largest.name}){beside}")]


def _sections(report: Report) -> list[Markup]:
    found = [tag("section", tag("h2", "Blocks"), table(_block_rows(report)), id="blocks")]
    if report.device is not None:
        rows, said = table(device_rows(report)), tag("p", device_text(report))
        found.append(tag("section", tag("h2", _capitalised(device_title(report.device))), rows, said, id="device"))
    places = tag("div", tag("h2", "What was run where"), facts(_places(report)))
    settings = tag("div", tag("h2", "Settings"), facts(_settings(report)))
    found.append(tag("section", tag("div", places, settings, class_="two"), id="run"))
    if report.notes:
        items = tag("ul", *(tag("li", note) for note in report.notes), class_="notes")
        found.append(tag("section", tag("h2", "Notes"), items, id="notes"))
    return found


def _beside_bp(sentences: list[str]) -> Markup:
    """The frontier in words."""
    none = tag("p", "no frontier was recorded, so there are no figures for backpropagation", class_="empty")
    said = [tag("p", sentence) for sentence in sentences] or [none]
    return tag("section", tag("h2", "Beside backpropagation"), *said, id="bp")


def _block_rows(report: Report) -> list[list[str]]:
    metric = report.metric.replace("_", " ")
    header = [
        "block",
        "units",
        "parameters",
        "auxiliary",
        "local loss",
        metric,
        f"validation {metric}",
        "steps",
        "state",
    ]
    rows = [header]
    for block in report.blocks:
        parameters = block.parameters or {}
        resident = block.plan.resident if block.plan else None
        rows.append(
            [
                block.name,
                _units(block.units),
                words.count(parameters.get("network")),
                words.count(parameters.get("auxiliary")),
                words.score(block.training, "loss"),
                words.score(block.training, report.metric),
                words.score(block.validation, report.metric),
                words.count(block.steps),
                words.NONE if resident is None else "in memory" if resident else "paged",
            ]
        )
    return rows


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _units(units: Sequence[str] | None) -> str:
    if not units:
        return words.NONE
    return ", ".join(units) if len(units) < 3 else f"{units[0]} ... {units[-1]} ({len(units)})"


def _places(report: Report) -> list[tuple[str, str]]:
    run = report.run or {}
    rows = [(name.replace("_", " "), value) for name, value in (report.runtime or {}).items()]
    rows.append(("threads", words.count(report.threads)))
    for name in ("bundle", "bundle_digest", "data", "data_digest"):
        shown = run.get(name, words.NONE)
        rows.append((name.replace("_", " "), shown[:DIGEST] if name.endswith("digest") else shown))
    rows.append(("samples", words.count(report.samples)))
    rows.append(("page by", f"edgelocal {__version__}"))
    return rows


def _settings(report: Report) -> list[tuple[str, str]]:
    rows = [(name.replace("_", " "), value) for name, value in (report.settings or {}).items()]
    return [*rows, ("memory budget", words.size(report.budget_bytes))]
