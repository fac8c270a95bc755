"""A training with everything opened and the run's lock held: attempts, until one has memory enough."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from edgelocal.bundle.folder import Bundle
from edgelocal.commands.on_device import device_notes, device_report
from edgelocal.commands.progress import Display
from edgelocal.commands.run_report import make_report
from edgelocal.commands.train_request import TrainRequest
from edgelocal.commands.watcher import Watcher
from edgelocal.data.formats.base import Dataset
from edgelocal.errors import BudgetError, OverBudgetError
from edgelocal.machine.budget import peak_rss_bytes, reset_peak
from edgelocal.machine.device import describe
from edgelocal.memory.planned import Plan
from edgelocal.runtime.accelerator import Accelerator
from edgelocal.runtime.arena import empty_arena, give_back, reserve
from edgelocal.runtime.library import OOM_ADVICE
from edgelocal.runtime.pages import clear_pages
from edgelocal.runtime.provider import CPU, Provider
from edgelocal.storage.store import Loaded
from edgelocal.training.blocks import load_blocks
from edgelocal.training.checkpoint import Progress, check_progress, read_progress
from edgelocal.training.config import ORT_TRAINING
from edgelocal.training.run import RunFolder, restore
from edgelocal.training.run_info import RUN, RunInfo, read_run
from edgelocal.training.trainer import Trainer

_CACHE = "cache"
_FREE = "free memory, raise the limit of the system, or give a smaller --memory-budget, which pages states"
_FINISHED = "the run was finished before: nothing was trained, and its report is as it was"
_SILENT = "out of memory"  # where the system says no more
_IN_VAIN = "smaller micro-batches did not help in this process: give a --memory-budget or a --micro-batch, or "
_SMALLER = "use a smaller --batch and a new --out, or export more blocks"

Planner = Callable[[int], "Plan | None"]  # an upper bound for all micro-batches -> the plan


class Job:
    """One call of `train`. It begins again with smaller micro-batches where memory runs out and the request says so.

    `planner` makes the plan anew, with one more bound for all micro-batches. What replanning decides is the bound; it
    goes into the run's checkpoints, so that whoever continues the run keeps it.
    """

    def __init__(
        self,
        request: TrainRequest,
        display: Display,
        bundle: Bundle,
        info: RunInfo,
        data: Dataset,
        validation: Dataset | None,
        stop: threading.Event,
        idle_bytes: int,
        planner: Planner,
        device: Accelerator | None = None,
    ) -> None:
        self._request = request
        self._display = display
        self._bundle = bundle
        self._info = info
        self._data = data
        self._validation = validation
        self._stop = stop
        self._idle_bytes = idle_bytes
        self._planner = planner
        self._device = device
        self._threads = request.threads or describe().cores
        self._plan: Plan | None = None
        self._bound: int | None = None  # of micro-batches, once memory ran out
        self._recorded: int | None = None  # the bound as the run's checkpoints have it
        self._peak_bytes = 0  # of the attempts before
        self._notes: list[str] = []
        self._provider = CPU
        self._ran_out = ""  # what was found when memory ran out last

    def run(self, plan: Plan | None, continued: bool) -> dict[str, Any]:
        """Train to the end; the report.

        Raises:
            EdgelocalError: see errors.py; whatever was committed before stands.
        """
        self._plan = plan
        if self._validation is None:
            self._notes.append("the data has no test split, so nothing is validated; give some with --val")
        try:
            report = self._attempt(continued)
            while report is None:  # all that it held is gone by now
                gc.collect()  # an error and the frames it went through may hold each other
                empty_arena()  # a run beside which numpy found no memory has not given it back
                give_back()
                if self._device is not None:
                    self._provider.give_back()
                report = self._attempt(True)
            return report
        finally:
            clear_pages(self._request.out / _CACHE)

    def _attempt(self, continued: bool) -> dict[str, Any] | None:
        """The report; None if memory ran out and there is a smaller plan to go on with."""
        reset_peak()  # that of an attempt before, or of opening the data, is behind us
        folder = RunFolder(self._request.out, self._info)
        try:
            trainer = self._prepare(folder, continued)
        except MemoryError as error:  # smaller micro-batches would not bring it
            raise OverBudgetError(f"{_found(error)} for the state of all blocks; {_FREE}") from error
        try:
            return self._train(folder, trainer)
        except (OverBudgetError, MemoryError) as error:
            self._replan(error)
        finally:
            self._peak_bytes = max(self._peak_bytes, trainer.memory.process_peak_bytes, peak_rss_bytes())
            trainer.release()
        return None

    def _prepare(self, folder: RunFolder, continued: bool) -> Trainer:
        """A trainer that stands where the run's last commit does, or at its start, committed."""
        with folder.resume() if continued else nullcontext() as loaded:  # open until all blocks are loaded
            return self._trainer(folder, continued, loaded)

    def _trainer(self, folder: RunFolder, continued: bool, loaded: Loaded | None) -> Trainer:
        request = self._request
        if continued:
            skipped = loaded.skipped if loaded else ()
            self._note(_resume_notes(request.out, self._info, skipped))
        if loaded is None:
            folder.start()
        else:
            self._keep_bound(read_progress(loaded.state))
        self._provider = self._reserve()
        tensors = loaded.state.tensors if loaded else None
        trainer = Trainer(
            self._bundle.manifest,
            request.config,
            load_blocks(
                self._bundle,
                self._threads,
                tensors,
                self._plan,
                request.out / _CACHE,
                artifacts=request.config.runtime == ORT_TRAINING,
                provider=self._provider,
                waiting=self._device.waiting if self._device else None,
            ),
            self._data,
            self._validation,
            validate_every=request.validate_every,
            budget_bytes=request.budget_bytes,
            plan=self._plan,
            cache_folder=request.out / _CACHE,
            device=self._device,
        )
        if loaded is not None:
            restore(trainer, loaded)
        trainer.memory.process_peak_bytes = max(trainer.memory.process_peak_bytes, self._peak_bytes)
        trainer.micro_batch_bound = self._bound
        if loaded is None:
            folder.commit(trainer)
        return trainer

    def _reserve(self) -> Provider:
        """Set up the memory that graphs run in; what runs them."""
        plan, budget = self._plan, self._request.budget_bytes
        rest = None if budget is None else max(0, budget - self._idle_bytes)  # bounds it where nothing is planned
        if self._device is not None:
            return self._device.provider(plan.device if plan else None, rest)
        if plan is not None:
            reserve(plan.region_bytes, plan.region_limit)
        elif rest is not None:
            reserve(0, rest)
        return CPU

    def _train(self, folder: RunFolder, trainer: Trainer) -> dict[str, Any]:
        report = folder.report if trainer.is_finished else None
        if report is not None:  # it stays as it is: its figures are those of the plan that the run had
            return {**report, "notes": [*report.get("notes", ()), _FINISHED]}
        self._display.start(trainer, self._info, self._threads, self._notes)
        watcher = Watcher(folder, self._display, self._request, self._stop, record=self._bound != self._recorded)
        with self._display:
            trainer.run(watcher)
        scores = trainer.validate(watcher, trainer.blocks, exits=True)
        trainer.memory.check()
        if self._device is not None:
            self._note(device_notes(self._device, trainer.blocks[0].provider))
        report = make_report(trainer, self._info, self._idle_bytes, scores, self._notes, folder.metrics)
        if self._device is not None:
            report["device"] = device_report(self._device, trainer)
        folder.write_report(report)
        return report

    def _keep_bound(self, progress: Progress) -> None:
        """Plan within the bound that the run's checkpoint records, unless it is this job's own."""
        config = self._request.config
        check_progress(progress, self._bundle.manifest, config, -(-len(self._data) // config.batch))
        recorded = self._recorded = progress.micro_batch_bound
        if recorded is None or self._plan is None or (self._bound is not None and self._bound <= recorded):
            return
        self._bound = recorded
        self._note([f"memory ran out in this run before: micro-batches are of at most {recorded}, as recorded then"])
        self._plan = self._planner(recorded)

    def _replan(self, error: OverBudgetError | MemoryError) -> None:
        """Halve the largest micro-batches.

        Raises:
            OverBudgetError: that is not asked for, or not possible.
        """
        found = _found(error)
        largest = max(block.micro_batch for block in self._plan.blocks) if self._plan else 1
        # What smaller micro-batches did not change they will not change further: a graph, or a whole batch.
        again, self._ran_out = found == self._ran_out != _SILENT, found
        if self._request.on_oom != "replan" or largest == 1 or again:
            tried = _IN_VAIN if self._bound != self._recorded else ""
            raised = "raise --memory-budget, " if self._plan is None and self._request.budget_bytes is not None else ""
            raise OverBudgetError(f"{found}; {tried}{raised}{_SMALLER}") from error
        half = -(-largest // 2)
        try:
            self._plan = self._planner(half)
        except BudgetError as refusal:
            raise OverBudgetError(f"{found}, and in micro-batches of at most {half}: {refusal}") from error
        self._bound = half
        self._note([f"memory ran out ({found}); gone on from the last commit with micro-batches of at most {half}"])

    def _note(self, notes: list[str]) -> None:
        """Each once, however many attempts find it."""
        self._notes += [note for note in notes if note not in self._notes]


def _found(error: OverBudgetError | MemoryError) -> str:
    """What happened, without advice."""
    text = str(error).removesuffix(OOM_ADVICE)
    if isinstance(error, OverBudgetError):
        return text
    return f"{_SILENT} ({text})" if text else _SILENT


def _resume_notes(folder: Path, info: RunInfo, skipped: tuple[tuple[Path, str], ...]) -> list[str]:
    notes = [f"{path.name} is damaged ({reason}); the generation before it was used" for path, reason in skipped]
    before = read_run(folder)
    for key, value in info.runtime.items():
        if before.runtime.get(key) != value:
            was = before.runtime.get(key, "not known")
            notes.append(f"{key} was {was} when {RUN} was written and is {value} now: bits may differ")
    if before.micro_batches != info.micro_batches:
        notes.append(
            "the micro-batches that the run was begun with do not fit the memory at hand or the --micro-batch, so "
            "there are others: bits may differ"
        )
    return notes
