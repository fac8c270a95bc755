"""What `train` shows while it works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import platform
import time
from types import TracebackType
from typing import Any

import numpy as np
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from edgelocal import __version__
from edgelocal.bundle.spec import TensorSpec
from edgelocal.machine.budget import format_size
from edgelocal.report.words import loss_text
from edgelocal.training.config import PORTABLE
from edgelocal.training.run_info import RunInfo
from edgelocal.training.trainer import Trainer

LINE_EVERY_S = 10.0


class Display:
    """Shows a training on `console` (stderr, so that stdout stays free for results)."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._live: Live | None = None
        self._task: Any = None
        self._started = 0.0
        self._start_steps = 0
        self._last_line = 0.0

    def start(self, trainer: Trainer, info: RunInfo, threads: int, notes: list[str]) -> None:
        """The plan: blocks with their parameters, settings, versions."""
        self._start_steps = trainer.position.steps
        self.console.print(_plan_table(trainer))
        config = trainer.config
        budget = format_size(info.budget_bytes) if info.budget_bytes else "none"
        epochs = f"{config.epochs} epoch{'s' * (config.epochs > 1)}"
        self._line(
            f"{config.schedule}, {epochs} of {len(trainer.train)} samples, batch {config.batch}, "
            f"{trainer.manifest.optimizer.name} lr {config.lr} {config.lr_schedule}, budget {budget}, by the "
            f"{'step graphs' if config.runtime == PORTABLE else 'training artifacts'}\n"
            f"edgelocal {__version__}, Python {platform.python_version()}, numpy {np.__version__}, onnxruntime "
            f"{info.runtime['onnxruntime']} {info.runtime['provider']} on {info.runtime['machine']}; exported with "
            f"{', '.join(f'{name} {version}' for name, version in trainer.manifest.versions.items())}\n"
            f"{threads} threads, {_planned(trainer)}"
        )
        if trainer.position.steps:
            self._line(f"resumed after step {trainer.position.steps} of {trainer.total_steps}")
        for note in notes:
            self._line(f"note: {note}")

    def __enter__(self) -> Display:
        self._started = self._last_line = time.monotonic()
        if self.console.is_terminal:
            one_line = Column(no_wrap=True)
            columns = (
                TextColumn("{task.description}", table_column=one_line),
                BarColumn(12),
                TextColumn("{task.fields[detail]}", table_column=one_line),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("training", total=None, detail="")
            self._live = Live(self._bar, console=self.console, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._bar = self._live = None

    def step(self, trainer: Trainer) -> None:
        """After every step."""
        if self._bar is not None and self._live is not None:
            self._bar.update(
                self._task,
                total=trainer.total_steps,
                completed=trainer.position.steps,
                description=self._where(trainer),
                detail=self._speed(trainer),
            )
            scores = [f"{name} {loss_text(values)}" for name, values in _scores(trainer).items()]
            self._live.update(Group(self._bar, Columns(scores, padding=(0, 3))))
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            scores = [f"{name} {loss_text(values)}" for name, values in _ends(_scores(trainer))]
            left = self._left_s(trainer)
            self._line(f"{self._where(trainer)}: {'  '.join(scores)}  {self._speed(trainer)}, {left:.0f} s left")

    def epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After every epoch: one line with the scores of its blocks."""
        scores = "  ".join(f"{name} {loss_text(values)}" for name, values in record["blocks"].items())
        held = f"  validation {loss_text(record['validation'])}" if "validation" in record else ""
        stage = f"stage {record['stage'] + 1} " if len(trainer.stages) > 1 else ""
        self._line(f"{stage}epoch {record['epoch']}: {scores}{held}  lr {record['lr']:.3g}  {record['seconds']:.1f} s")

    def _line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)  # lines in a log are not cut to 80 columns

    def _where(self, trainer: Trainer) -> str:
        stage = trainer.stages[min(trainer.position.stage, len(trainer.stages) - 1)]
        name = f"block {trainer.blocks[stage.trained[0]].spec.name} " if len(trainer.stages) > 1 else ""
        return f"{name}epoch {trainer.position.epoch + 1}/{trainer.config.epochs}"

    def _speed(self, trainer: Trainer) -> str:
        rate = self._rate(trainer) * trainer.config.batch
        return f"{rate:.0f} samples/s  peak {format_size(trainer.process_peak_bytes)}"

    def _rate(self, trainer: Trainer) -> float:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        return (trainer.position.steps - self._start_steps) / elapsed

    def _left_s(self, trainer: Trainer) -> float:
        return (trainer.total_steps - trainer.position.steps) / max(self._rate(trainer), 1e-9)


def _planned(trainer: Trainer) -> str:
    """The plan in words."""
    plan = trainer.plan
    if plan is None:
        return "no plan: there is no memory model for this; the peak is measured after every step"
    paged = sum(not b.resident for b in plan.blocks)
    parts = [f"planned peak {format_size(plan.peak_bytes)}"]
    if plan.device is not None:
        parts.append(f"{format_size(plan.device.peak)} of it on the device")
    waits = plan.device.paging if plan.device else "disk"
    parts += [f"{paged} of {len(plan.blocks)} blocks paged from {waits}"] if paged else []
    parts += ["graphs loaded when used"] if plan.graphs_bytes is not None else []
    split = [b for b in plan.blocks if b.accumulation > 1]
    if split:
        least, most = (pick(b.micro_batch for b in split) for pick in (min, max))
        sizes = f"{least} to {most}" if least < most else str(most)
        parts.append(f"{len(split)} blocks in micro-batches of {sizes} samples (all that batch norm sees at a time)")
    return ", ".join(parts)


def _plan_table(trainer: Trainer) -> Table:
    table = Table(title=f"{trainer.manifest.network}, rule {trainer.manifest.rule.name}", title_justify="left")
    table.add_column("block")
    table.add_column("units", overflow="fold")
    for name in ("trained parameters", "of these auxiliary"):
        table.add_column(name, justify="right")
    for block in trainer.blocks:
        count = count_parameters(block.spec.step.inputs)
        units = block.spec.units
        listed = ", ".join(units) if len(units) < 4 else f"{units[0]} ... {units[-1]} ({len(units)})"
        table.add_row(block.spec.name, listed, f"{sum(count.values()):,}", f"{count['auxiliary']:,}")
    return table


def count_parameters(tensors: tuple[TensorSpec, ...]) -> dict[str, int]:
    """Numbers of parameters among graph inputs: `network` (kept after training) and `auxiliary`."""
    count = {"network": 0, "auxiliary": 0}
    for tensor in tensors:
        if tensor.kind == "param":
            count["auxiliary" if tensor.name.startswith("param/aux/") else "network"] += tensor.elements_per_sample()
    return count


def _scores(trainer: Trainer) -> dict[str, Any]:
    """Scores of the epoch so far, by name of the blocks that train."""
    stage = trainer.stages[min(trainer.position.stage, len(trainer.stages) - 1)]
    task = trainer.manifest.task
    return {trainer.blocks[i].spec.name: trainer.measures[i].score.result(task) for i in stage.trained}


def _ends(blocks: dict[str, Any]) -> list[tuple[str, Any]]:
    """Both blocks, or the first and the last of more."""
    items = list(blocks.items())
    return items if len(items) <= 2 else [items[0], items[-1]]
