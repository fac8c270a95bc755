"""`edgelocal train` as one function: bundle + data + configuration -> run folder."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelocal.budget import format_size, parse_budget, rss_bytes
from edgelocal.bundle import Bundle, open_bundle, verify
from edgelocal.config import TrainConfig
from edgelocal.data import Split, has_split, open_dataset
from edgelocal.device import describe
from edgelocal.errors import BudgetError, InterruptedRunError, UsageError
from edgelocal.formats.base import Dataset
from edgelocal.progress import Display, count_parameters
from edgelocal.run import RunFolder, check_resume, check_same, load_blocks, restore
from edgelocal.run_info import RUN, RunInfo, describe_run, read_run
from edgelocal.session import runtime_info
from edgelocal.spec import Manifest
from edgelocal.store import lock
from edgelocal.trainer import Trainer


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
    cache: bool,
    augment: bool,
    memory_budget: str | None,
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
        bundle, data, validation, out, config, budget, resume, checkpoint_steps, checkpoint_seconds, threads, val_every
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
    bundle = open_bundle(request.bundle)
    manifest = bundle.manifest
    request.config.check(manifest)
    verify(bundle)  # damage is found now, not when the block's turn comes after hours
    data, validation = open_data(request.data, request.validation, manifest, request.out)
    threads = request.threads or describe().cores
    _check_fit(bundle, request.budget_bytes)
    check_resume(request.out, request.resume)  # before the lock, which makes the folder
    info = describe_run(bundle, data, request.data, request.config, request.budget_bytes)
    if stop.is_set():
        raise InterruptedRunError("stopped before the first step; nothing was written")
    with lock(request.out):
        continued = check_resume(request.out, request.resume)  # what another process has done until we held it
        if continued:
            check_same(request.out, info)
        with data, validation or nullcontext():  # unpacks what is compressed, so damage is found now and not in epoch 1
            return _train_locked(request, display, bundle, info, data, validation, threads, continued, stop)


def _train_locked(
    request: TrainRequest,
    display: Display,
    bundle: Bundle,
    info: RunInfo,
    data: Dataset,
    validation: Dataset | None,
    threads: int,
    continued: bool,
    stop: threading.Event,
) -> dict[str, Any]:
    folder = RunFolder(request.out, info)
    loaded = folder.resume() if continued else None
    notes = _resume_notes(request.out, info, loaded.skipped if loaded else ()) if continued else []
    if validation is None:
        notes.append("the data has no test split, so nothing is validated; give some with --val")
    if loaded is None:
        folder.start()
    blocks = load_blocks(bundle, threads, loaded.state.tensors if loaded else None)
    trainer = Trainer(
        bundle.manifest,
        request.config,
        blocks,
        data,
        validation,
        validate_every=request.validate_every,
        budget_bytes=request.budget_bytes,
        cache_folder=request.out / "cache",
    )
    if loaded is not None:
        restore(trainer, loaded)
    else:
        folder.commit(trainer)
    del loaded  # its tensors were copied into the blocks
    display.start(trainer, info, threads, notes)
    watcher = _Watcher(folder, display, request, stop)
    with display:
        trainer.run(watcher)
    scores = trainer.validate(watcher, blocks, exits=True)
    trainer.check_budget()
    report = make_report(trainer, info, scores, notes, folder)
    folder.write_report(report)
    return report


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


def make_report(
    trainer: Trainer, info: RunInfo, scores: Sequence[dict[str, float]], notes: list[str], folder: RunFolder
) -> dict[str, Any]:
    """What was reached and measured, per block and for the whole run; `scores` are those of the exits on validation."""
    manifest = trainer.manifest
    training = {name: values for record in folder.metrics for name, values in record["blocks"].items()}
    blocks = [
        {
            "name": block.spec.name,
            "units": list(block.spec.units),
            "parameters": count_parameters(block.spec.step.inputs),
            "training": training.get(block.spec.name),
            "validation": scores[index] if scores else None,
            "peak_bytes": measures.peak_bytes,
            "train_s": round(measures.step_s, 3),
            "steps": measures.steps,
        }
        for index, (block, measures) in enumerate(zip(trainer.blocks, trainer.measures, strict=True))
    ]
    return {
        "network": manifest.network,
        "rule": manifest.rule.name,
        "loss": manifest.task.loss,
        "schedule": trainer.config.schedule,
        "blocks": blocks,
        "validation": scores[-1] if scores else None,
        "samples": len(trainer.train),
        "steps": trainer.position.steps,
        "train_s": round(sum(m.step_s for m in trainer.measures), 3),
        "process_peak_bytes": trainer.process_peak_bytes,
        "budget_bytes": info.budget_bytes,
        "runtime": info.runtime,
        "notes": notes,
    }


def _check_fit(bundle: Bundle, budget: int | None) -> None:
    """Refuse before anything is allocated what cannot fit: the idle process with the state of all blocks."""
    if budget is None:
        return
    state = sum(4 * t.elements_per_sample() for block in bundle.manifest.blocks for t in block.state())
    runtime_info()  # the runtime is loaded: from here on the process is what it is before the first block
    need = rss_bytes() + state
    if need > budget:
        raise BudgetError(
            f"the idle process ({format_size(rss_bytes())}) and the state of the blocks ({format_size(state)}) need "
            f"{format_size(need)} before the first step, the budget is {format_size(budget)}; raise --memory-budget, "
            "or export a smaller network or shallower auxiliaries"
        )


def _resume_notes(folder: Path, info: RunInfo, skipped: tuple[tuple[Path, str], ...]) -> list[str]:
    notes = [f"{path.name} is damaged ({reason}); the generation before it was used" for path, reason in skipped]
    before = read_run(folder).runtime
    for key, value in info.runtime.items():
        if before.get(key) != value:
            notes.append(f"{key} was {before.get(key)} when {RUN} was written and is {value} now: bits may differ")
    return notes
