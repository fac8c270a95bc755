"""`edgelocal bench memory`: PyTorch and edgelocal side by side, each variant in its own process, rounds interleaved.

PyTorch stands for what a user would do instead: plain back-propagation, the best uniform activation checkpointing, and
a batch cut until it needs as little as blocks of one unit, and as each searched partition. Its allocator keeps freed
memory unless told otherwise, so each is measured twice, as it is and with glibc's MALLOC_MMAP_THRESHOLD_ set, which
costs time and gives memory back.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from edgelocal.bundle.folder import open_bundle
from edgelocal.errors import BudgetError, UsageError
from edgelocal.exporters.bench.own_side import Bundle, export_variant, measure_own, write_samples
from edgelocal.exporters.bench.result import LEAST_BATCH, Measurement, Setting
from edgelocal.exporters.bench.rounds import Figures, Variant, check_writable, write_figures
from edgelocal.exporters.bench.torch_side import (
    SEARCH_STEPS,
    batch_at_peak,
    best_checkpointing,
    measure_bp,
    measure_checkpointed,
)
from edgelocal.machine.budget import format_size
from edgelocal.machine.device import describe
from edgelocal.memory.needs import PipelineBytes
from edgelocal.memory.peaks import Workload
from edgelocal.memory.plan import make_thresholds

Say = Callable[[str], None]
SHARES = (0.5, 0.25, 0.12)  # of PyTorch's working set: the budgets of the partitions
MIB = 1 << 20
_IDLE_VARIES = 1 << 20  # from one process to the next
_TUNED = " (malloc tuned)"
_PER_UNIT = "edgelocal, a block for every unit"
_PARTITION = "edgelocal, partition for "


def bench_memory(setting: Setting, rounds: int, out: Path | None, say: Say) -> dict[str, Any]:
    """Measure everything and return plain values; after every round they are also written to `out`, if it is given.

    Raises:
        UsageError: a worker failed, or a setting is out of range.
        StorageError: `out` cannot be written.
    """
    setting.check()
    if rounds < 1:
        raise UsageError(f"--rounds is {rounds}, expected at least 1")
    if out is not None:
        check_writable(out)
    figures, cuts = Figures(say), []
    with tempfile.TemporaryDirectory(prefix="edgelocal-bench-") as folder:
        variants = _variants(setting, Path(folder), figures, say)
        for number in range(1, rounds + 1):
            where, started = f"round {number} of {rounds}", time.monotonic()
            figures.measure(variants, where)
            if number == 1:
                cuts = _cut_batches(setting, figures, say)
                smaller = _smaller(setting, cuts)
                figures.measure(smaller, where)
                variants += smaller
            if number < rounds:
                left = (rounds - number) * (time.monotonic() - started)
                say(f"{where} is done, {left / 60:.0f} minutes left")
            found = _found(setting, rounds, number, figures, cuts)
            if out is not None:
                write_figures(out, found)
    return found


def _variants(setting: Setting, folder: Path, figures: Figures, say: Say) -> list[Variant]:
    """PyTorch's and ours, but for the batches that are cut to what ours need."""
    plain = measure_bp(setting)
    say(f"PyTorch holds {format_size(plain.working_set_bytes)} above its idle process")
    settings = (("", setting), (_TUNED, replace(setting, tuned=True)))
    segments = [best_checkpointing(given, say).segments for _, given in settings]
    found = [_plain(f"PyTorch{suffix}", given) for suffix, given in settings]
    found += [
        _checkpointed(f"PyTorch, {count} checkpoints{suffix}", given, count)
        for count, (suffix, given) in zip(segments, settings, strict=True)
    ]
    return found + _own_variants(setting, plain.working_set_bytes, folder, figures, say)


def _plain(name: str, setting: Setting) -> Variant:
    return Variant(name, lambda: measure_bp(setting))


def _checkpointed(name: str, setting: Setting, segments: int) -> Variant:
    return Variant(name, lambda: measure_checkpointed(setting, segments))


def _own_variants(setting: Setting, plain_bytes: int, folder: Path, figures: Figures, say: Say) -> list[Variant]:
    """Back-propagation in one block, blocks of one unit, and for each budget both the searched partition and these."""
    data = folder / "data.npz"
    write_samples(setting, data)
    runs = (folder / f"run{number}" for number in range(1_000_000))
    bp = export_variant(setting, folder / "bp", "edgelocal, back-propagation in one block", say, rule="bp")
    units = export_variant(setting, folder / "units", _PER_UNIT, say, rule="auglocal", blocks="per-unit")
    first = measure_own(setting, units, data, folder / "first")
    least = figures.budgets[_PER_UNIT] = _smallest(setting, units, first, say)
    found = [_trained(setting, bp, data, runs), _trained(setting, units, data, runs, least)]
    for share in SHARES:
        budget = first.idle_bytes + int(share * plain_bytes)
        label = f"{share:.0%} of PyTorch"
        figures.budgets |= {f"{_PARTITION}{label}": budget, f"{_PER_UNIT}, {label}": budget}
        name = f"{_PARTITION}{label}"
        try:
            chosen = _searched(setting, folder / f"fit{share}", name, budget, say)
            found.append(_trained(setting, chosen, data, runs, budget))
        except BudgetError as error:
            figures.skip(name, str(error))
        found.append(_trained(setting, replace(units, variant=f"{_PER_UNIT}, {label}"), data, runs, budget))
    return found


def _searched(setting: Setting, folder: Path, name: str, budget: int, say: Say) -> Bundle:
    """The partition for a budget. Where none fits a whole batch, it is searched for half of it, and so on: the device
    then takes the batch in micro-batches.

    Raises:
        BudgetError: not even one sample fits.
    """
    batch = setting.batch
    while True:
        try:
            return export_variant(replace(setting, batch=batch), folder, name, say, rule="auglocal", budget=str(budget))
        except BudgetError:
            if batch == 1:
                raise
            say(f"no partition fits {format_size(budget)} with a batch of {batch}: looking for one with half of it")
            batch = -(-batch // 2)


def _trained(setting: Setting, bundle: Bundle, data: Path, runs: Iterator[Path], budget: int | None = None) -> Variant:
    return Variant(bundle.variant, lambda: measure_own(setting, bundle, data, next(runs), budget))


def _smallest(setting: Setting, units: Bundle, first: Measurement, say: Say) -> int:
    """The least budget under which blocks of one unit still train the whole batch at once."""
    work = Workload.of(
        open_bundle(units.folder).manifest,
        batch=setting.batch,
        schedule="interleaved",
        idle_bytes=first.idle_bytes + _IDLE_VARIES,
        pipeline=PipelineBytes(1 << 20, 8 << 20),
        validates=False,
        threads=setting.threads,
    )
    budget = make_thresholds(work).batch
    assert budget is not None, "the host takes any batch with some budget"
    say(f"blocks of one unit need {format_size(budget)} with nothing kept that can wait on disk")
    return budget


def _cut_batches(setting: Setting, figures: Figures, say: Say) -> list[dict[str, Any]]:
    """The batches with which PyTorch needs as little as ours did: the blocks of one unit with the least budget, and
    every searched partition. Those for which no batch is small enough are left out of the rounds."""
    found = []
    for suffix, given in (("", setting), (_TUNED, replace(setting, tuned=True))):
        probe = _remembering(replace(given, steps=min(SEARCH_STEPS, given.steps)))
        for name, own in figures.results().items():
            if name == _PER_UNIT or name.startswith(_PARTITION):
                fitted = batch_at_peak(given, own.working_set_bytes, say, probe)
                if fitted is None:
                    why = f"a batch of {LEAST_BATCH} needs more than {format_size(own.working_set_bytes)}"
                    figures.skip(f"PyTorch, batch cut to the peak of: {name}{suffix}", why)
                else:
                    variant = f"PyTorch, batch cut to {fitted.batch}{suffix}"
                    found.append({"peak_of": name, "batch": fitted.batch, "tuned": given.tuned, "variant": variant})
    return found


def _remembering(short: Setting) -> Callable[[Setting], Measurement]:
    """Measures every batch once, in few steps: several bisections ask for the same."""
    known: dict[int, Measurement] = {}

    def measure(given: Setting) -> Measurement:
        if given.batch not in known:
            known[given.batch] = measure_bp(replace(short, batch=given.batch))
        return known[given.batch]

    return measure


def _smaller(setting: Setting, cuts: list[dict[str, Any]]) -> list[Variant]:
    """PyTorch with each of the cut batches."""
    wanted = {cut["variant"]: replace(setting, batch=cut["batch"], tuned=cut["tuned"]) for cut in cuts}
    return [_plain(name, given) for name, given in wanted.items()]


def _found(setting: Setting, rounds: int, done: int, figures: Figures, cuts: list[dict[str, Any]]) -> dict[str, Any]:
    """`partial` is the number of rounds that are done, None when all are."""
    return {
        "network": setting.network,
        "input": setting.input,
        "batch": setting.batch,
        "rounds": rounds,
        "partial": None if done == rounds else done,
        "steps": setting.steps,
        "machine": {"machine": platform.machine(), "cores": describe().cores, "threads": setting.threads},
        "variants": _rows(figures),
        "budgets": figures.budgets,
        "cut_batches": cuts,
        "skipped": list(figures.skipped),
    }


def _rows(figures: Figures) -> list[dict[str, Any]]:
    """A variant's medians, its times of all rounds, and `time_ratio`, its time beside that of the first variant."""
    times = figures.times()
    rows = []
    for name, found in figures.results().items():
        values = asdict(found)
        del values["step_s"]
        ratio = figures.time_ratio(name, next(iter(times)))
        rows.append({"name": name, **values, "times_per_sample_s": times[name], "time_ratio": ratio})
    return rows


def bench_table(found: dict[str, Any]) -> Table:
    """A row a variant, in figures and as parts of PyTorch's."""
    title = f"{found['network']}, {found['input']}, batch {found['batch']}, {found['rounds']} rounds, interleaved"
    table = Table(title=title, title_justify="left")
    table.add_column("variant", overflow="fold")
    for name in ("batch", "working\nset, MiB", "of\nPyTorch", "process,\nMiB", "ms a\nsample", "of\nPyTorch"):
        table.add_column(name, justify="right", no_wrap=True)
    first = found["variants"][0]
    for row in found["variants"]:
        table.add_row(
            row["name"],
            str(row["batch"]),
            f"{row['working_set_bytes'] / MIB:.1f}",
            f"{row['working_set_bytes'] / first['working_set_bytes']:.3f}",
            f"{row['process_peak_bytes'] / MIB:.1f}",
            f"{1000 * row['time_per_sample_s']:.2f}",
            f"{row['time_ratio']:.2f}",
        )
    return table
