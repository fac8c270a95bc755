"""A training <-> what a checkpoint holds of it. A checkpoint is believed as little as any other file: types, ranges,
names, shapes and dtypes are checked before anything is set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgelocal.bundle.spec import Manifest
from edgelocal.errors import CheckpointError
from edgelocal.runtime.block import Block
from edgelocal.storage.decode import DecodeError, decode, expect
from edgelocal.storage.state import TrainingState
from edgelocal.storage.tensors import Array
from edgelocal.training.config import TrainConfig
from edgelocal.training.measures import BlockMeasures
from edgelocal.training.scores import Score
from edgelocal.training.stages import Position, stages
from edgelocal.training.trainer import Trainer

LARGEST = 1 << 63  # of a count of steps, samples or bytes


@dataclass(frozen=True)
class Measured:
    """`BlockMeasures` without its score and latencies."""

    peak_bytes: int
    step_s: float
    steps: int
    arena_bytes: int


@dataclass(frozen=True)
class EpochRecord:
    """A line of metrics.jsonl."""

    stage: int
    epoch: int
    lr: float
    steps: int
    seconds: float
    blocks: dict[str, dict[str, float]]
    validation: dict[str, float] | None = None


@dataclass(frozen=True)
class Progress:
    """Where a training stands besides its tensors; scores and measures by block. `micro_batch_bound` is set where
    memory ran out: no micro-batch of the run is larger from then on."""

    position: Position
    scores: tuple[Score, ...]
    measures: tuple[Measured, ...]
    process_peak_bytes: int
    metrics: tuple[EpochRecord, ...]
    micro_batch_bound: int | None = None


def capture(trainer: Trainer, metrics: Sequence[dict[str, Any]]) -> TrainingState:
    """The state of a training with the records of its epochs; shares the memory of the blocks' tensors."""
    tensors = _States(trainer.blocks)
    progress = {
        "position": asdict(trainer.position),
        "scores": [asdict(m.score) for m in trainer.measures],
        "measures": [asdict(Measured(m.peak_bytes, m.step_s, m.steps, m.arena_bytes)) for m in trainer.measures],
        "process_peak_bytes": trainer.memory.process_peak_bytes,
        "metrics": list(metrics),
        "micro_batch_bound": trainer.micro_batch_bound,
    }
    return TrainingState(progress, tensors)


class _States(Mapping[str, Array]):
    """The states of all blocks by "block:name"; of blocks on disk one at a time is in memory."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._places = {f"{b.spec.name}:{t.name}": (b, t.name) for b in blocks for t in b.spec.state()}
        self._last: tuple[Block | None, dict[str, Array]] = (None, {})

    def __getitem__(self, key: str) -> Array:
        block, name = self._places[key]
        if self._last[0] is not block:
            self._last = None, {}
            self._last = block, block.state()
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def apply(progress: Progress, trainer: Trainer) -> None:
    """Set position, scores, measures and the bound of micro-batches of a trainer.

    Raises:
        CheckpointError: a value is out of the range of this training.
    """
    check_progress(progress, trainer.manifest, trainer.config, trainer.batches_per_epoch)
    trainer.position = progress.position
    trainer.memory.process_peak_bytes = progress.process_peak_bytes
    trainer.micro_batch_bound = progress.micro_batch_bound
    trainer.measures = [
        BlockMeasures(score, measured.peak_bytes, measured.step_s, measured.steps, measured.arena_bytes)
        for score, measured in zip(progress.scores, progress.measures, strict=True)
    ]


def read_progress(state: TrainingState) -> Progress:
    """The progress in a checkpoint.

    Raises:
        CheckpointError: a value is missing, unknown or of another type.
    """
    with _refused():
        progress: Progress = decode(Progress, state.progress, "progress")
    return progress


def check_progress(progress: Progress, manifest: Manifest, config: TrainConfig, batches: int | None = None) -> None:
    """That a training of `config` can stand there; exactly, if the number of batches in an epoch is known.

    Raises:
        CheckpointError: it cannot.
    """
    with _refused():
        _check_position(progress.position, len(stages(config.schedule, len(manifest.blocks))), config.epochs, batches)
        _check_measures(progress, len(manifest.blocks))
        bound = progress.micro_batch_bound
        if bound is not None:
            expect(1 <= bound <= config.batch, "progress.micro_batch_bound", f"1 to {config.batch}", bound)
        for number, record in enumerate(progress.metrics):
            _check_record(record, manifest, f"progress.metrics[{number}]")


def _check_position(position: Position, stage_count: int, epochs: int, batches: int | None) -> None:
    where, most = "progress.position", LARGEST if batches is None else batches
    _in_range(position.stage, stage_count, f"{where}.stage")
    _in_range(position.epoch, epochs if position.stage < stage_count else 0, f"{where}.epoch")
    _in_range(position.batch, most if position.epoch < epochs and position.stage < stage_count else 0, f"{where}.batch")
    _in_range(position.steps, LARGEST, f"{where}.steps")
    if batches is not None:
        steps = (position.stage * epochs + position.epoch) * batches + position.batch
        expect(position.steps == steps, f"{where}.steps", f"the steps before it, {steps}", position.steps)


def _check_measures(progress: Progress, blocks: int) -> None:
    _in_range(progress.process_peak_bytes, LARGEST, "progress.process_peak_bytes")
    for name, values in (("scores", progress.scores), ("measures", progress.measures)):
        expect(len(values) == blocks, f"progress.{name}", f"one for each of {blocks} blocks", len(values))
    for score, measured in zip(progress.scores, progress.measures, strict=True):
        _in_range(score.samples, LARGEST, "progress.scores.samples")
        _in_range(measured.peak_bytes, LARGEST, "progress.measures.peak_bytes")
        _in_range(measured.steps, progress.position.steps, "progress.measures.steps")
        expect(measured.step_s >= 0, "progress.measures.step_s", "at least 0", measured.step_s)


def _check_record(record: EpochRecord, manifest: Manifest, where: str) -> None:
    known = {block.name for block in manifest.blocks}
    expect(set(record.blocks) <= known, f"{where}.blocks", "blocks of the bundle", sorted(record.blocks))
    wanted = set(Score().result(manifest.task))
    for values in (*record.blocks.values(), record.validation):
        expect(values is None or set(values) == wanted, where, f"scores {sorted(wanted)}", values)


def check_tensors(tensors: Mapping[str, Array], manifest: Manifest) -> None:
    """That `tensors` are the state of all blocks, by name, shape and dtype.

    Raises:
        CheckpointError: one is missing, unknown, or not as the manifest says.
    """
    expected = {f"{block.name}:{t.name}": t for block in manifest.blocks for t in block.state()}
    with _refused():
        unlike = sorted(expected.keys() ^ tensors.keys())
        expect(not unlike, "tensors", "the state of the bundle's blocks", f"{unlike[:1]} in one of both")
        for name, spec in expected.items():
            found = _form(tensors[name])
            expect(found == (spec.dtype, list(spec.shape)), name[:64], f"{spec.dtype} {list(spec.shape)}", found)


def _form(tensor: Array) -> tuple[str, list[int]]:
    return tensor.dtype.name, list(tensor.shape)


def _in_range(value: int, most: int, where: str) -> None:
    expect(0 <= value <= most, where, f"0 to {most}", value)


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except DecodeError as error:
        raise CheckpointError(
            f"the checkpoint is whole, but not one of this run ({error}); restore one from a copy, or start anew with "
            "a new --out"
        ) from None
