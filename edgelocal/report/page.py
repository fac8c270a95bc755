"""One page that holds everything: no scripts, nothing fetched, readable offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgelocal import __version__
from edgelocal.report import words
from edgelocal.report.curves import loss_figure, metric_figure
from edgelocal.report.figure import facts, table
from edgelocal.report.frontier import frontier_figure
from edgelocal.report.memory import memory_figure
from edgelocal.report.model import Report, parse_report
from edgelocal.report.style import CSS
from edgelocal.report.svg import Markup, tag
from edgelocal.report.timeline import timeline_figure
from edgelocal.report.times import latency_figure, time_figure
from edgelocal.store import atomic_write

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
    charts = tag("div", *(figure(report).html() for figure in FIGURES), class_="charts")
    body = tag("main", *_header(report), _tiles(report), charts, *_sections(report))
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def _header(report: Report) -> list[Markup]:
    rule = f"rule {report.rule}" if report.rule else ""
    batch = f"batch {report.batch}" if report.batch else ""
    samples = f"{words.count(report.samples)} samples" if report.samples is not None else ""
    parts = [part for part in (rule, report.schedule or "", batch, samples) if part]
    found = [tag("h1", report.network or "A run"), tag("p", ", ".join(parts), class_="lead")]
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
    tiles.append(
        _tile(str(len(report.blocks)), f"block{'s' * (len(report.blocks) != 1)}" + f" of {units} units" * (units > 0))
    )
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
    meter = tag("div", tag("div", style=f"width:{share:.1f}%"), class_="meter", aria_hidden="true")
    return _tile(words.size(peak), f"peak of the process, {words.percent(peak, budget)} of {words.size(budget)}", meter)


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
    places = tag("div", tag("h2", "What was run where"), facts(_places(report)))
    settings = tag("div", tag("h2", "Settings"), facts(_settings(report)))
    found.append(tag("section", tag("div", places, settings, class_="two"), id="run"))
    sentences = words.comparison(report.frontier or ())
    said = [tag("p", sentence) for sentence in sentences]
    unknown = tag("p", "no frontier was recorded, so there are no figures for backpropagation", class_="empty")
    found.append(tag("section", tag("h2", "Beside backpropagation"), *(said or [unknown]), id="bp"))
    if report.notes:
        items = tag("ul", *(tag("li", note) for note in report.notes), class_="notes")
        found.append(tag("section", tag("h2", "Notes"), items, id="notes"))
    return found


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


def _units(units: Sequence[str] | None) -> str:
    if not units:
        return words.NONE
    return ", ".join(units) if len(units) < 3 else f"{units[0]} ... {units[-1]} ({len(units)})"


def _places(report: Report) -> list[tuple[str, str]]:
    run = report.run or {}
    rows = [(name.replace("_", " "), value) for name, value in (report.runtime or {}).items()]
    rows += [("bundle", run["bundle"])] * ("bundle" in run)
    rows += [(name.replace("_", " "), run[name]) for name in ("bundle_digest", "data", "data_digest") if name in run]
    rows.append(("samples", words.count(report.samples)))
    rows.append(("page by", f"edgelocal {__version__}"))
    return rows


def _settings(report: Report) -> list[tuple[str, str]]:
    rows = [(name.replace("_", " "), value) for name, value in (report.settings or {}).items()]
    return [*rows, ("memory budget", words.size(report.budget_bytes))]
