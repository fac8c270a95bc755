"""`edgelocal train` as one function: bundle + data + configuration -> run folder."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgelocal.budget import format_size, parse_budget, reset_peak, rss_bytes
from edgelocal.bundle import Bundle, open_bundle, verify
from edgelocal.cache import cache_precision
from edgelocal.config import TrainConfig
from edgelocal.data import Split, has_split, open_dataset, pipeline_bytes
from edgelocal.device import describe
from edgelocal.errors import BudgetError, InterruptedRunError, OverBudgetError, UsageError
from edgelocal.formats.base import Dataset
from edgelocal.plan import PipelineBytes, Plan, has_model, make_plan
from edgelocal.progress import Display
from edgelocal.run import RunFolder, check_resume, check_same, load_blocks, restore
from edgelocal.run_info import RUN, RunInfo, describe_run, read_run
from edgelocal.run_report import make_report
from edgelocal.session import give_back, reserve, start
from edgelocal.spec import Manifest
from edgelocal.store import lock
from edgelocal.trainer import Trainer

CACHE = "cache"


@dataclass(frozen=True)
class TrainRequest:
    """What the command line asks for. None means: what the bundle, the data or the machine suggest."""

    bundle: Path
    data: Path
    validation: Path | None
    out: Path
    config: TrainConfig
    budget_bytes: int | None
    resume: str
    checkpoint_steps: int | None
    checkpoint_s: float
    threads: int | None
    validate_every: int
    micro_batch: int | None = None
    on_oom: str = "stop"


def make_request(
    *,
    bundle: Path,
    data: Path,
    validation: Path | None,
    out: Path,
    epochs: int | None,
    batch: int | None,
    lr: float | None,
    lr_schedule: str | None,
    warmup_epochs: int,
    hyper: Sequence[str],
    schedule: str,
    cache: str,
    augment: bool,
    memory_budget: str | None,
    micro_batch: int | None,
    on_oom: str,
    resume: str,
    checkpoint_steps: int | None,
    checkpoint_seconds: float,
    threads: int | None,
    seed: int,
    val_every: int,
) -> TrainRequest:
    """The request of the command line, with the bundle's defaults for what it leaves out."""
    defaults = open_bundle(bundle).manifest.defaults
    config = TrainConfig(
        epochs=defaults.epochs if epochs is None else epochs,
        batch=defaults.batch if batch is None else batch,
        lr=defaults.lr if lr is None else lr,
        lr_schedule=lr_schedule or defaults.lr_schedule,
        warmup_epochs=warmup_epochs,
        schedule=schedule,
        seed=seed,
        augment=augment,
        cache=cache,
        hyper=dict(_hyper(item) for item in hyper),
    )
    if not checkpoint_seconds > 0:
        raise UsageError(f"--checkpoint-seconds is {checkpoint_seconds}, expected a number above 0")
    budget = None if memory_budget is None else parse_budget(memory_budget, describe().effective_bytes)
    return TrainRequest(
        bundle=bundle,
        data=data,
        validation=validation,
        out=out,
        config=config,
        budget_bytes=budget,
        resume=resume,
        checkpoint_steps=checkpoint_steps,
        checkpoint_s=checkpoint_seconds,
        threads=threads,
        validate_every=val_every,
        micro_batch=micro_batch,
        on_oom=on_oom,
    )


def _hyper(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not equals or not math.isfinite(number):
        raise UsageError(f"--hyper {text!r} is not NAME=NUMBER, for example momentum=0.8")
    return name, number


def train(request: TrainRequest, display: Display, stop: threading.Event) -> dict[str, Any]:
    """Train and return the report, which is also written to the run. Setting `stop` ends it after the current step.

    Raises:
        EdgelocalError: see errors.py; whatever was committed before stands.
    """
    start()
    bundle = open_bundle(request.bundle)
    manifest = bundle.manifest
    verify(bundle)  # damage is found now, not when the block's turn comes after hours
    give_back()
    idle = rss_bytes()
    data, validation = open_data(request.data, request.validation, manifest, request.out)
    request = replace(request, config=settled(request.config, request.out, bundle, len(data)))
    request.config.check(manifest)
    plan = _plan(request, bundle, data, validation, idle)
    check_resume(request.out, request.resume)  # before the lock, which makes the folder
    micro = tuple(b.micro_batch for b in plan.blocks) if plan else None
    threads = request.threads or describe().cores
    info = describe_run(bundle, data, request.data, request.config, request.budget_bytes, micro, threads)
    if stop.is_set():
        raise InterruptedRunError("stopped before the first step; nothing was written")
    with lock(request.out):
        continued = check_resume(request.out, request.resume)  # what another process has done until we held it
        if continued:
            check_same(request.out, info)
        with data, validation or nullcontext():  # unpacks what is compressed, so damage is found now and not in epoch 1
            job = _Job(request, display, bundle, info, data, validation, stop, idle)
            return job.run(plan, continued)


@dataclass(frozen=True)
class _Job:
    """A training with everything opened and the run's lock held."""

    request: TrainRequest
    display: Display
    bundle: Bundle
    info: RunInfo
    data: Dataset
    validation: Dataset | None
    stop: threading.Event
    idle_bytes: int

    def run(self, plan: Plan | None, continued: bool) -> dict[str, Any]:
        """Train to the end, by a smaller plan where memory runs out and the request says so."""
        notes: list[str] = []
        if self.validation is None:
            notes.append("the data has no test split, so nothing is validated; give some with --val")
        while True:
            try:
                return self._attempt(plan, continued, notes)
            except OverBudgetError as error:
                smaller = plan.halved() if plan is not None and self.request.on_oom == "replan" else None
                if smaller is None:
                    raise
                notes.append(f"memory ran out ({error}); gone on from the last commit with micro-batches halved")
                plan, continued = smaller, True
            give_back()

    def _attempt(self, plan: Plan | None, continued: bool, notes: list[str]) -> dict[str, Any]:
        request, info = self.request, self.info
        reset_peak()  # that of an attempt before, or of opening the data, is behind us
        folder = RunFolder(request.out, info)
        loaded = folder.resume() if continued else None
        if continued:
            notes += _resume_notes(request.out, info, loaded.skipped if loaded else ())
        if loaded is None:
            folder.start()
        if plan is not None:
            reserve(plan.region_bytes, plan.region_limit)
        threads = request.threads or describe().cores
        tensors = loaded.state.tensors if loaded else None
        blocks = load_blocks(self.bundle, threads, tensors, plan, request.out / CACHE)
        trainer = Trainer(
            self.bundle.manifest,
            request.config,
            blocks,
            self.data,
            self.validation,
            validate_every=request.validate_every,
            budget_bytes=request.budget_bytes,
            plan=plan,
            cache_folder=request.out / CACHE,
        )
        if loaded is not None:
            restore(trainer, loaded)
        else:
            folder.commit(trainer)
        del loaded, tensors  # they were copied into the blocks
        self.display.start(trainer, info, threads, notes)
        watcher = _Watcher(folder, self.display, request, self.stop)
        try:
            with self.display:
                trainer.run(watcher)
            scores = trainer.validate(watcher, blocks, exits=True)
            trainer.check_budget()
        finally:
            for block in blocks:
                block.release()
                block.close()
        report = make_report(trainer, info, self.idle_bytes, scores, notes, folder.metrics)
        folder.write_report(report)
        return report


def settled(config: TrainConfig, out: Path, bundle: Bundle, samples: int) -> TrainConfig:
    """`config` with a cache "auto" decided: as the run in `out` has it, or else the best precision the disk has room
    for, with as much left over, while one cache is built from the one before."""
    if config.cache != "auto":
        return config
    if (out / RUN).is_file():
        return replace(config, cache=read_run(out).config.cache)
    free = describe(folder=out if out.is_dir() else out.absolute().parent).disk_free_bytes
    return replace(config, cache=cache_precision(bundle.manifest, samples, free) if not config.augment else "off")


def _plan(request: TrainRequest, bundle: Bundle, data: Dataset, validation: Dataset | None, idle: int) -> Plan | None:
    """The plan of the run; for a bundle without a memory model a rough check instead.

    Raises:
        BudgetError: it cannot fit. Nothing was allocated or written.
    """
    manifest, config = bundle.manifest, request.config
    if not has_model(manifest):
        _check_fit(bundle, request.budget_bytes)
        return None
    datasets = [data, *([validation] if validation is not None else [])]
    augment = manifest.augment if config.augment else None
    resident = sum(d.resident_bytes for d in datasets) + 8 * len(data)  # with the order of the epoch

    def pipeline(batch: int) -> PipelineBytes:
        total = pipeline_bytes(datasets, batch, manifest.input, augment)
        return PipelineBytes(resident, max(0, total - resident))

    return make_plan(
        manifest,
        batch=min(config.batch, len(data)),
        schedule=config.schedule,
        idle_bytes=idle,
        pipeline=pipeline,
        budget_bytes=request.budget_bytes,
        validates=validation is not None,
        micro_batch=request.micro_batch,
        threads=request.threads or describe().cores,
    )


def open_data(path: Path, validation: Path | None, manifest: Manifest, scratch: Path) -> tuple[Dataset, Dataset | None]:
    """Training and validation data; the validation defaults to the test split of `path`, if it has one.

    What must be unpacked goes into `scratch`, see `open_dataset`.
    """
    data = open_dataset(path, "train", manifest.input, manifest.task, scratch)
    if validation is not None:
        split: Split = "test" if has_split(validation, "test") else "train"
        return data, open_dataset(validation, split, manifest.input, manifest.task, scratch)
    if has_split(path, "test"):
        return data, open_dataset(path, "test", manifest.input, manifest.task, scratch)
    return data, None


class _Watcher:
    """Ties the loop to the run folder, the display and the signals."""

    def __init__(self, folder: RunFolder, display: Display, request: TrainRequest, stop: threading.Event) -> None:
        self.folder = folder
        self.display = display
        self.request = request
        self.stop = stop

    def step(self, trainer: Trainer) -> None:
        self.display.step(trainer)
        if self.folder.due(trainer, self.request.checkpoint_steps, self.request.checkpoint_s):
            self.folder.commit(trainer)

    def epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self.folder.add_metrics(record)
        self.display.epoch(trainer, record)

    def should_stop(self) -> bool:
        return self.stop.is_set()

    def commit(self, trainer: Trainer) -> None:
        self.folder.commit(trainer)


def _check_fit(bundle: Bundle, budget: int | None) -> None:
    """Refuse before anything is allocated what cannot fit: the idle process with the state of all blocks."""
    if budget is None:
        return
    state = sum(4 * t.elements_per_sample() for block in bundle.manifest.blocks for t in block.state())
    need = rss_bytes() + state
    if need > budget:
        raise BudgetError(
            f"the idle process ({format_size(rss_bytes())}) and the state of the blocks ({format_size(state)}) need "
            f"{format_size(need)} before the first step, the budget is {format_size(budget)}; raise --memory-budget, "
            "or export a smaller network or shallower auxiliaries"
        )


def _resume_notes(folder: Path, info: RunInfo, skipped: tuple[tuple[Path, str], ...]) -> list[str]:
    notes = [f"{path.name} is damaged ({reason}); the generation before it was used" for path, reason in skipped]
    before = read_run(folder)
    for key, value in info.runtime.items():
        if before.runtime.get(key) != value:
            was = before.runtime.get(key)
            notes.append(f"{key} was {was} when {RUN} was written and is {value} now: bits may differ")
    if before.micro_batches != info.micro_batches:
        notes.append("the memory at hand is another than when the run was begun, so micro-batches are: bits may differ")
    return notes
