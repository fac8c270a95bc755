"""Numbers and comparisons in words, the same on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgelocal.machine.budget import format_size
from edgelocal.memory.advice import advice_on
from edgelocal.report.model import FrontierPoint, Report

NONE = "-"
NAMES = {
    "bp": "backpropagation",
    "checkpointing": "backpropagation with checkpointing",
    "per-unit": "a block a unit",
    "linear": "linear classifiers as auxiliaries",
    "partition": "partition",
}


def size(value_bytes: float | None) -> str:
    """A size, or "-"."""
    return NONE if value_bytes is None else format_size(round(value_bytes))


def count(value: int | None) -> str:
    """A number with separators of thousands, or "-"."""
    return NONE if value is None else f"{value:,}"


def short_count(value: float) -> str:
    """ "950", "1.25 M", "31.4 G": three digits."""
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g}{unit}" if value < 999.5 * limit else f"{value / limit:,.0f}{unit}"
    return f"{value:.3g}"


def seconds(value_s: float | None) -> str:
    """ "12.3 ms", "4.1 s", "3 min 20 s", "2 h 5 min", or "-"."""
    if value_s is None:
        return NONE
    if value_s < 1:
        digits = 0 if value_s >= 0.1 else 1 if value_s >= 0.01 else 2 if value_s >= 0.001 else 3
        return f"{1000 * value_s:.{digits}f} ms"
    if value_s < 99.95:
        return f"{value_s:.1f} s"
    minutes, rest = divmod(round(value_s), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def ratio(part: float | None, whole: float | None) -> str:
    """`part` / `whole` as "0.97", or "-"."""
    return NONE if part is None or not whole else f"{part / whole:.2f}"


def percent(part: float, whole: float) -> str:
    """ "41 %"."""
    return f"{100 * part / whole:.0f} %"


def score(values: Mapping[str, float] | None, key: str) -> str:
    """A loss or a metric of a block, or "-"."""
    if not values or key not in values:
        return NONE
    return f"{100 * values[key]:.2f} %" if key == "accuracy" else f"{values[key]:.4f}"


def metric_text(values: Mapping[str, float]) -> str:
    """What stands beside the loss: accuracy in percent or mean absolute error; "-" without either."""
    return score(values, "accuracy" if "accuracy" in values else "mean_absolute_error")


def loss_text(values: Mapping[str, float]) -> str:
    """ "loss 0.058 98.06 %"."""
    loss = f"{values['loss']:.3f}" if "loss" in values else NONE
    return f"loss {loss} {metric_text(values)}"


def blocks_text(number: int) -> str:
    """ "1 block", "6 blocks"."""
    return f"{number} block{'s' * (number != 1)}"


def title(report: Report) -> str:
    """ "resnet32, rule auglocal, interleaved" of what is known."""
    rule = f"rule {report.rule}" if report.rule else None
    return ", ".join(part for part in (report.name, rule, report.schedule, trained_by(report)) if part)


def trained_by(report: Report) -> str:
    """Said where it was not by the step graphs."""
    return "by the training artifacts" if report.trained_by == "ort-training" else ""


def peak_text(report: Report) -> str:
    """ "peak memory 105.6 MiB, planned 110 MiB, of a budget of 256 MiB"."""
    if report.process_peak_bytes is None:
        return f"budget {size(report.budget_bytes)}" if report.budget_bytes else "no budget"
    budget = f" of a budget of {size(report.budget_bytes)}" if report.budget_bytes else ""
    planned = ""
    if report.planned_peak_bytes is not None:
        planned = f", planned {size(report.planned_peak_bytes)}" + ("," if budget else "")
    return f"peak memory {size(report.process_peak_bytes)}{planned}{budget}"


def conclusion(report: Report) -> str:
    """The result of a run in one sentence."""
    parts = [f"validation {loss_text(report.validation)}"] if report.validation else []
    parts.append(peak_text(report))
    if report.train_s is not None:
        parts.append(f"{seconds(report.train_s)} in steps")
    return ", ".join(parts)


def disk_text(report: Report) -> str:
    """What went to the disk and back, or ""."""
    parts = [f"{size(report.paged_bytes)} of state paged"] if report.paged_bytes else []
    if report.cached_bytes:
        precision = f" in {report.cache['precision']}" if report.cache and "precision" in report.cache else ""
        parts.append(f"{size(report.cached_bytes)} of outputs cached{precision}")
    return ", ".join(parts)


def micro_text(report: Report) -> str:
    """Which blocks took the batch in parts, and what that means, or ""."""
    sizes = [b.plan.micro_batch for b in report.blocks if b.plan and (b.plan.accumulation or 1) > 1]
    known = sorted(size for size in sizes if size)
    if not known:
        return ""
    whole = f"the batch of {report.batch}" if report.batch else "a batch"
    several = f"{known[0]} to {known[-1]}" if known[0] < known[-1] else str(known[0])
    return (
        f"{len(known)} of {blocks_text(len(report.blocks))} took {whole} in micro-batches of "
        f"{several}: each of them is all that batch norm saw at a time, and working sets are smaller than with the "
        "whole batch"
    )


def chosen_point(points: Sequence[FrontierPoint]) -> FrontierPoint | None:
    """The point that was trained."""
    return next((point for point in points if point.chosen), None)


def comparison(report: Report) -> list[str]:
    """What was chosen beside backpropagation and the others, and which is the better choice, a sentence each; for a
    run with another batch than the export's only that it cannot be said."""
    points = report.frontier or ()
    chosen = chosen_point(points)
    bp = next((point for point in points if point.kind == "bp"), None)
    if chosen is None:
        return []
    if not report.frontier_applies:
        return [
            f"The export weighed ways to train at batch {report.frontier_batch}, and this run has batch "
            f"{report.batch}: export with that batch to compare it with backpropagation."
        ]
    at_batch = f" at batch {report.frontier_batch}" if report.frontier_batch else ""
    first = (
        f"What was trained ({_name(chosen)}) has a working set of {size(chosen.working_set_bytes)}{at_batch} "
        f"with nothing else loaded, and {short_count(chosen.training_macs)} multiply-accumulates a sample, as the "
        "export predicted"
    )
    if bp is None or bp is chosen:
        return [f"{first}.", *_advice(points)]
    found = [f"{first}: {_beside(chosen, bp)} of backpropagation ({size(bp.working_set_bytes)})."]
    others = [point for point in points if point.kind not in ("partition", "bp") and point is not chosen]
    for kind in dict.fromkeys(point.kind for point in others):
        best = min((p for p in others if p.kind == kind), key=lambda p: p.working_set_bytes)
        found.append(
            f"{_name(best).capitalize()}: {size(best.working_set_bytes)}, {_beside(best, bp)} of backpropagation."
        )
    return found + _advice(points)


def marked(name: str, point: FrontierPoint) -> str:
    """`name`, marked if the bytes of the point are an estimate."""
    return f"{name} (estimate)" if point.is_estimate else name


def _name(point: FrontierPoint) -> str:
    name = blocks_text(point.blocks) if point.kind == "partition" else NAMES.get(point.kind, point.kind)
    return marked(name, point)


def _advice(points: Sequence[FrontierPoint]) -> list[str]:
    """What `export` says of its choice, as a sentence."""
    advice = advice_on(points)
    return [f"{advice[0].upper()}{advice[1:]}."] if advice else []


def _beside(point: FrontierPoint, bp: FrontierPoint) -> str:
    if not bp.working_set_bytes or not bp.training_macs:
        return "not comparable with that"
    times = point.training_macs / bp.training_macs
    return f"{percent(point.working_set_bytes, bp.working_set_bytes)} of the memory and {times:.2f} times the work"
