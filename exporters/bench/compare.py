"""`edgelocal bench memory`: PyTorch and edgelocal side by side, each variant in its own process, rounds interleaved.

PyTorch stands for what a user would do instead: plain back-propagation, the best uniform activation checkpointing, and
a batch cut until it needs as little. Its allocator keeps freed memory unless told otherwise, so each is measured twice,
as it is and with glibc's MALLOC_MMAP_THRESHOLD_ set, which costs time and gives memory back.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from edgelocal.budget import format_size
from edgelocal.bundle import open_bundle
from edgelocal.device import describe
from edgelocal.errors import BudgetError
from edgelocal.exporters.bench.own_side import Bundle, export_variant, measure_own, write_samples
from edgelocal.exporters.bench.result import Measurement, Setting, combine
from edgelocal.exporters.bench.torch_side import (
    batch_at_peak,
    best_checkpointing,
    measure_bp,
    measure_checkpointed,
)
from edgelocal.plan import PipelineBytes, make_thresholds

Say = Callable[[str], None]
SHARES = (0.5, 0.25, 0.12)  # of PyTorch's working set: the budgets of the partitions
_IDLE_VARIES = 1 << 20  # from one process to the next
_TUNED = " (malloc tuned)"


@dataclass(frozen=True)
class Variant:
    """Something to measure, once a round."""

    name: str
    run: Callable[[], Measurement]


def bench_memory(setting: Setting, rounds: int, out: Path | None, say: Say) -> dict[str, Any]:
    """Measure everything and return plain values, which are also written to `out` if it is given.

    Raises:
        UsageError: a worker failed, or a setting is out of range.
    """
    setting.check()
    tuned = replace(setting, tuned=True)
    with tempfile.TemporaryDirectory(prefix="edgelocal-bench-") as place:
        folder = Path(place)
        plain = measure_bp(setting)
        say(f"PyTorch holds {format_size(plain.working_set_bytes)} above its idle process")
        segments = best_checkpointing(setting, say).segments
        tuned_segments = best_checkpointing(tuned, say).segments
        variants = [
            Variant("PyTorch", lambda: measure_bp(setting)),
            Variant("PyTorch" + _TUNED, lambda: measure_bp(tuned)),
            Variant(f"PyTorch, {segments} checkpoints", lambda: measure_checkpointed(setting, segments)),
            Variant(
                f"PyTorch, {tuned_segments} checkpoints" + _TUNED, lambda: measure_checkpointed(tuned, tuned_segments)
            ),
        ]
        own, skipped = _own_variants(setting, plain.working_set_bytes, folder, say)
        variants += own
        results = _rounds(variants, rounds, skipped, say)
        least = results[_PER_UNIT].working_set_bytes
        cut = batch_at_peak(setting, least, say)
        cut_tuned = batch_at_peak(tuned, least, say)
    found = {
        "network": setting.network,
        "input": setting.input,
        "batch": setting.batch,
        "rounds": rounds,
        "steps": setting.steps,
        "machine": {"machine": platform.machine(), "cores": describe().cores, "threads": setting.threads},
        "variants": [{"name": name, **_row(value)} for name, value in results.items()],
        "cut_batches": [
            {"name": name, **_row(value)}
            for name, value in (("PyTorch, batch cut", cut), ("PyTorch, batch cut" + _TUNED, cut_tuned))
            if value is not None
        ],
        "skipped": skipped,
    }
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")
    return found


_PER_UNIT = "edgelocal, a block for every unit"


def _own_variants(
    setting: Setting, plain_bytes: int, folder: Path, say: Say
) -> tuple[list[Variant], list[dict[str, str]]]:
    """Back-propagation in one block, blocks of one unit, and for each budget both the searched partition and these."""
    data = folder / "data.npz"
    write_samples(setting, data)
    numbers = iter(range(1_000_000))

    def variant(bundle: Bundle, budget: int | None = None) -> Variant:
        return Variant(
            bundle.variant, lambda: measure_own(setting, bundle, data, folder / f"run{next(numbers)}", budget)
        )

    bp = export_variant(setting, folder / "bp", "edgelocal, back-propagation in one block", say, rule="bp")
    units = export_variant(setting, folder / "units", _PER_UNIT, say, rule="auglocal", blocks="per-unit")
    first = measure_own(setting, units, data, folder / "first")
    variants = [variant(bp), variant(units, _smallest(setting, units, first, say))]
    skipped: list[dict[str, str]] = []
    for share in SHARES:
        budget = first.idle_bytes + int(share * plain_bytes)
        label = f"{share:.0%} of PyTorch"
        try:
            chosen = export_variant(
                setting,
                folder / f"fit{share}",
                f"edgelocal, partition for {label}",
                say,
                rule="auglocal",
                budget=str(budget),
            )
            variants.append(variant(chosen, budget))
        except BudgetError as error:
            skipped.append({"name": f"edgelocal, partition for {label}", "why": str(error)})
        variants.append(variant(replace(units, variant=f"{_PER_UNIT}, {label}"), budget))
    return variants, skipped


def _smallest(setting: Setting, units: Bundle, first: Measurement, say: Say) -> int:
    """The least budget under which blocks of one unit still train the whole batch at once."""
    thresholds = make_thresholds(
        open_bundle(units.folder).manifest,
        batch=setting.batch,
        schedule="interleaved",
        idle_bytes=first.idle_bytes + _IDLE_VARIES,
        pipeline=PipelineBytes(1 << 20, 8 << 20),
        validates=False,
        threads=setting.threads,
    )
    budget = thresholds.batch
    say(f"blocks of one unit need {format_size(budget)} with nothing kept that can wait on disk")
    return budget


def _rounds(variants: list[Variant], rounds: int, skipped: list[dict[str, str]], say: Say) -> dict[str, Measurement]:
    """Every variant once a round; medians over the rounds. What does not fit its budget goes to `skipped`."""
    found: dict[str, list[Measurement]] = {}
    for number in range(rounds):
        for variant in variants:
            if number and variant.name not in found:
                continue
            try:
                result = variant.run()
            except BudgetError as error:
                say(f"{variant.name}: {error}")
                skipped.append({"name": variant.name, "why": str(error)})
                continue
            found.setdefault(variant.name, []).append(result)
            say(
                f"round {number + 1} of {rounds}, {variant.name}: {format_size(result.working_set_bytes)}, "
                f"{1000 * result.time_per_sample_s:.2f} ms a sample"
            )
    return {name: combine(results) for name, results in found.items()}


def _row(found: Measurement) -> dict[str, Any]:
    values = asdict(found)
    del values["step_s"]
    return values


def bench_table(found: dict[str, Any]) -> Table:
    """A row a variant, in figures and as parts of PyTorch's."""
    title = f"{found['network']}, {found['input']}, batch {found['batch']}, {found['rounds']} rounds, interleaved"
    table = Table(title=title, title_justify="left")
    for name in ("variant", "batch", "working set", "of PyTorch", "process", "ms a sample", "of PyTorch"):
        table.add_column(name, justify="left" if name == "variant" else "right", overflow="fold")
    rows = [*found["variants"], *found["cut_batches"]]
    first = rows[0]
    for row in rows:
        table.add_row(
            row["name"],
            str(row["batch"]),
            format_size(row["working_set_bytes"]),
            f"{row['working_set_bytes'] / first['working_set_bytes']:.3f}",
            format_size(row["process_peak_bytes"]),
            f"{1000 * row['time_per_sample_s']:.2f}",
            f"{row['time_per_sample_s'] / first['time_per_sample_s']:.2f}",
        )
    return table
