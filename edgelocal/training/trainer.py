"""The training loop. It reads top to bottom: stages, epochs, batches, blocks.

interleaved   one stage: every batch passes through all blocks, each updates at once (the papers' way);
sequential    a stage a block: the blocks before it are frozen and run in inference mode, or are read from a cache.

Only one block works at a time, so only its activations live. A step is the smallest unit of progress: after each one
the run may commit its state, be stopped by a signal, or find that it is over its budget.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from edgelocal.bundle.spec import Manifest
from edgelocal.data.formats.base import Dataset, Indices
from edgelocal.data.pipeline import batches, prepare
from edgelocal.errors import DataError, InterruptedRunError
from edgelocal.machine.budget import PeakMeter
from edgelocal.memory.planned import Plan
from edgelocal.runtime.accelerator import Accelerator
from edgelocal.runtime.block import Block
from edgelocal.runtime.tensor import Tensor
from edgelocal.runtime.uploads import Uploads
from edgelocal.training.cache import OutputCache
from edgelocal.training.config import TrainConfig
from edgelocal.training.evaluate import evaluate
from edgelocal.training.feed import Feed
from edgelocal.training.measures import BlockMeasures, is_measured, is_slowed, releases
from edgelocal.training.schedule import learning_rate
from edgelocal.training.scores import Score
from edgelocal.training.stages import Position, Stage, stages
from edgelocal.training.watch import MemoryWatch


class Watcher(Protocol):
    """Who is told of the progress, commits the state, and may ask to stop."""

    def step(self, trainer: Trainer) -> None:
        """After every step."""

    def epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After every epoch, with its metrics."""

    def should_stop(self) -> bool:
        """Whether to end after this step."""

    def commit(self, trainer: Trainer) -> None:
        """Make the state durable."""


class Trainer:
    """A run in memory: blocks, data and position. `run` trains to the end or raises.

    `validate_every` counts epochs; 0 leaves validation to the end of the run.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: TrainConfig,
        blocks: Sequence[Block],
        train: Dataset,
        validation: Dataset | None,
        *,
        validate_every: int = 1,
        budget_bytes: int | None = None,
        plan: Plan | None = None,
        position: Position | None = None,
        cache_folder: Path | None = None,
        device: Accelerator | None = None,
    ) -> None:
        self.manifest = manifest
        self.config = config
        self.blocks = tuple(blocks)
        self.train = train
        self.validation = validation
        self.validate_every = validate_every
        self.memory = MemoryWatch(budget_bytes, device)
        self.plan = plan
        self.position = position or Position()
        self.measures = [BlockMeasures() for _ in blocks]
        self.micro_batch_bound: int | None = None  # set where memory ran out
        self.cached_bytes = 0
        self.device = device
        self._uploads = Uploads(self.blocks[0].place)
        self._rounds = 0
        self.stages = stages(config.schedule, len(blocks))
        self._cache_folder = cache_folder
        self._cache: OutputCache | None = None
        self._augment = manifest.augment if config.augment else None

    @property
    def batches_per_epoch(self) -> int:
        """Batches in an epoch; the last may be short."""
        return -(-len(self.train) // self.config.batch)

    @property
    def total_steps(self) -> int:
        """Batches over all stages and epochs."""
        return len(self.stages) * self.config.epochs * self.batches_per_epoch

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.position.stage >= len(self.stages)

    def run(self, watcher: Watcher) -> None:
        """Train from the position to the end.

        Raises:
            InterruptedRunError: the watcher asked to stop; the state was committed.
            DivergedError: a loss is not finite; the last commit stands.
            BudgetError: the process holds more than the budget; the last commit stands.
            DataError: a sample cannot be used; the state before its batch was committed.
        """
        if self._cache_folder is not None:
            OutputCache.clear(self._cache_folder)
        self.memory.look_at_device()
        try:
            self.stop_point(watcher)
            for number in range(self.position.stage, len(self.stages)):
                self._run_stage(number, watcher)
                self.position.stage, self.position.epoch, self.position.batch = number + 1, 0, 0
                watcher.commit(self)
        except DataError:
            watcher.commit(self)  # a batch is read before any block trains on it, so the state is whole
            raise
        finally:
            if self._cache is not None:
                self._cache.close()

    def _run_stage(self, number: int, watcher: Watcher) -> None:
        stage = self.stages[number]
        self._rounds = 0
        self._fill_cache(stage, watcher)
        self.memory.check()
        for epoch in range(self.position.epoch, self.config.epochs):
            started = time.perf_counter()
            self._run_epoch(stage, number, epoch, watcher)
            watcher.epoch(self, self._finish_epoch(stage, epoch, time.perf_counter() - started, watcher))
            self.memory.check()
        for index in stage.trained:
            self.blocks[index].release()

    def _run_epoch(self, stage: Stage, number: int, epoch: int, watcher: Watcher) -> None:
        make = partial(self._sample, epoch)
        with Feed(self._order(number, epoch), make, ahead=self.device is not None) as feed:
            for indices in feed:
                self._step(stage, epoch, *feed.take(), len(indices))
                watcher.step(self)
                self.memory.check()
                self.stop_point(watcher)

    def stop_point(self, watcher: Watcher) -> None:
        """Commit and raise InterruptedRunError, if the watcher asks to stop."""
        if watcher.should_stop():
            watcher.commit(self)
            raise InterruptedRunError(
                f"stopped after step {self.position.steps} of {self.total_steps}; the state is committed. "
                "The same command goes on from there"
            )

    def _order(self, stage: int, epoch: int) -> Iterator[Indices]:
        """The batches still to do; every stage and epoch has an order of its own."""
        seed, start = self.config.seed, self.position.batch
        return batches(len(self.train), self.config.batch, seed, self._data_epoch(stage, epoch), True, start)

    def _data_epoch(self, stage: int, epoch: int) -> int:
        return stage * self.config.epochs + epoch

    def _sample(self, epoch: int, indices: Indices) -> tuple[Tensor, Tensor]:
        """What goes into the blocks that work: samples, or cached outputs of the frozen ones, and labels."""
        x = self._input(indices, epoch) if self._cache is None else self._cache.read(indices)
        return x, self._uploads.of(self.train.labels[indices])

    def _step(self, stage: Stage, epoch: int, x: Tensor, y: Tensor, samples: int) -> None:
        if self._cache is None:
            x = self._through(stage.frozen, x)
        hyper = {"lr": self._rate(epoch), **self.config.all_hyper(self.manifest)}
        for index in stage.trained:
            x = self._train_block(index, x, y, hyper, samples)
        self.memory.look_at_device()
        self.position.batch += 1
        self.position.steps += 1
        self._rounds += 1

    def _rate(self, epoch: int) -> float:
        config = self.config
        return learning_rate(config.lr_schedule, config.lr, epoch + 1, config.epochs, config.warmup_epochs)

    def _train_block(self, index: int, x: Tensor, y: Tensor, hyper: dict[str, float], samples: int) -> Tensor:
        measures = self.measures[index]
        own = self.plan.blocks[index] if self.plan else None
        micro = own.micro_batch if own and own.accumulation > 1 else None
        release = self._releases
        started = time.perf_counter()
        self.memory.note()  # the meter sets the peak back
        with PeakMeter() as meter:
            result = self.blocks[index].step(x, y, hyper, self.config.seed, self.position.steps, micro, release=release)
        measures.add_time(time.perf_counter() - started, slowed=is_slowed(self._rounds))
        if is_measured(self._rounds) and self.device is None:  # on a device only the whole can be seen
            arena = max(0, meter.growth_bytes - result.written_bytes) if self._only_arena_grows(index) else None
            measures.add_memory(self._rounds, meter.peak_bytes, arena)
        self.memory.add_step(meter.peak_bytes, index)
        measures.score.add(samples, result.loss, result.metric)
        return result.h

    def _only_arena_grows(self, index: int) -> bool:
        """Whether a step of the block takes nothing but the arena and what it writes: neither loads a graph, nor reads
        the state from disk."""
        if self._rounds == 0:
            return False
        return self.plan is None or (self.plan.graphs_bytes is None and self.plan.blocks[index].resident)

    def _input(self, indices: Indices, epoch: int) -> Tensor:
        images = self.train.read(indices)
        data_epoch = self._data_epoch(self.position.stage, epoch)
        self._uploads.turn()
        return self._uploads.of(
            prepare(
                images,
                indices,
                input=self.manifest.input,
                augment=self._augment,
                seed=self.config.seed,
                epoch=data_epoch,
            )
        )

    def _through(self, frozen: range, x: Tensor) -> Tensor:
        for index in frozen:
            x = self.blocks[index].forward(x, release=self._releases)
        return x

    @property
    def _releases(self) -> bool:
        """Whether runs give the arena back. On a device nothing would be seen by it: the region stays."""
        return self.device is None and releases(self._rounds)

    def _fill_cache(self, stage: Stage, watcher: Watcher) -> None:
        """Bring the cache, if the run keeps one, to the outputs of the stage's frozen blocks."""
        if self.config.cache == "off" or not stage.frozen or self._cache_folder is None:
            return
        order = list(batches(len(self.train), self.config.batch, 0, 0, shuffle=False))
        before = self._cache
        reusable = before is not None and before.depth == len(stage.frozen) - 1
        inputs = before.read if before is not None and reusable else partial(self._input, epoch=0)
        blocks = [self.blocks[i] for i in (stage.frozen[-1:] if reusable else stage.frozen)]
        stop = partial(self.stop_point, watcher)
        self._cache = OutputCache.build(
            self._cache_folder, inputs, blocks, order, stop, self.config.cache, self._uploads
        )
        self.cached_bytes += self._cache.written_bytes
        if before is not None:
            before.close()
        for block in blocks:
            block.release()

    def _finish_epoch(self, stage: Stage, epoch: int, seconds: float, watcher: Watcher) -> dict[str, Any]:
        """The epoch's record; the scores start anew, the position moves to the next epoch."""
        task = self.manifest.task
        record: dict[str, Any] = {
            "stage": self.position.stage,
            "epoch": epoch + 1,
            "lr": self._rate(epoch),
            "steps": self.position.steps,
            "seconds": round(seconds, 3),
            "blocks": {self.blocks[i].spec.name: self.measures[i].score.result(task) for i in stage.trained},
        }
        if self.validation is not None and self.validate_every and (epoch + 1) % self.validate_every == 0:
            record["validation"] = self.validate(watcher, self.blocks[: stage.trained[-1] + 1])[-1]
        for index in stage.trained:
            self.measures[index].score = Score()
        self.position.epoch, self.position.batch = epoch + 1, 0
        return record

    def validate(self, watcher: Watcher, blocks: Sequence[Block], *, exits: bool = False) -> list[dict[str, float]]:
        """Scores of the network up to the last of `blocks` on the validation data, with `exits` of every block's head.

        Empty without validation data. The watcher may stop it after any batch, as `stop_point` says.
        """
        if self.validation is None:
            return []
        stop = partial(self.stop_point, watcher)
        found = evaluate(
            blocks,
            self.validation,
            self.manifest,
            self.config.batch,
            exits=exits,
            after_batch=stop,
            place=self._uploads,
        )
        blocks[0].start_anew()
        self.memory.look_at_device()
        return found

    def release(self) -> None:
        """Drop all tensors and graphs: the training is over."""
        self.drop_tensors()
        for block in self.blocks:
            block.release()

    def drop_tensors(self) -> None:
        """Drop states and batches; graphs stay."""
        self._uploads.clear()
        for block in self.blocks:
            block.close()
