"""A run on disk: the folder that `train` writes and `eval`, `finish` and `report` read.

run.json       bundle (path, digest), data, configuration, budget, runtime; written once
state/         checkpoints, two generations
metrics.jsonl  one line an epoch
report.json    what was reached and measured; written at the end
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelocal.bundle.folder import Bundle, open_bundle
from edgelocal.errors import CheckpointError, DivergedError, UsageError
from edgelocal.runtime.block import Block
from edgelocal.runtime.provider import CPU, Provider
from edgelocal.storage.disk import is_there, read_regular, reason
from edgelocal.storage.state import encode_state
from edgelocal.storage.store import CheckpointStore, Loaded
from edgelocal.storage.whole import atomic_write
from edgelocal.training.blocks import load_blocks
from edgelocal.training.checkpoint import apply, capture, check_progress, read_progress
from edgelocal.training.config import TrainConfig
from edgelocal.training.run_info import RUN, RunInfo, read_run
from edgelocal.training.stages import Position, stages
from edgelocal.training.trainer import Trainer

METRICS = "metrics.jsonl"
REPORT = "report.json"
MAX_REPORT_BYTES = 1 << 26


@dataclass(frozen=True)
class Trained:
    """A run read back: its description, its bundle, and its blocks in their last committed state.

    `notes` says where the run stands if it is not at its end.
    """

    info: RunInfo
    bundle: Bundle
    blocks: list[Block]
    notes: tuple[str, ...]


def open_trained(folder: Path, threads: int, bundle_folder: Path | None = None, provider: Provider = CPU) -> Trained:
    """The run in `folder`. `bundle_folder` if the bundle was moved; `provider` runs its graphs.

    Raises:
        CheckpointError: no run, no checkpoint, or the bundle is not the one it was trained from.
    """
    info = read_run(folder)
    place = bundle_folder or Path(info.bundle)
    if bundle_folder is None and not os.path.lexists(place):
        raise CheckpointError(f"{folder} was trained from {place}, which is gone; say where it is now with --bundle")
    bundle = open_bundle(place)
    if bundle.digest != info.bundle_digest:
        raise CheckpointError(
            f"{bundle.folder} is not the bundle that {folder} was trained from; give it with --bundle"
        )
    _check_checkpoints(folder)
    loaded = CheckpointStore(folder, writable=False).load(info.fingerprint)
    if loaded is None:
        raise CheckpointError(f"{folder} has no checkpoint yet; wait for the first, or train again")
    with loaded:
        progress = read_progress(loaded.state)
        check_progress(progress, bundle.manifest, info.config)
        notes = _unfinished(info.config, progress.position, len(bundle.manifest.blocks))
        blocks = load_blocks(bundle, threads, loaded.state.tensors, provider=provider)
        return Trained(info, bundle, blocks, notes)


def _unfinished(config: TrainConfig, position: Position, blocks: int) -> tuple[str, ...]:
    """Where a run stands that is not at its end."""
    count = len(stages(config.schedule, blocks))
    if position.stage >= count:
        return ()
    stage = f"stage {position.stage + 1} of {count}, " if count > 1 else ""
    return (
        f"the run is unfinished: {stage}epoch {position.epoch + 1} of {config.epochs}, {position.steps} steps done",
    )


class RunFolder:
    """The writer of a run: commits, metrics, report. One process holds it at a time."""

    def __init__(self, folder: Path, info: RunInfo) -> None:
        self.folder = folder
        self.info = info
        self.store = CheckpointStore(folder)
        self._last_commit = time.monotonic()
        self._last_steps = -1
        self._metrics: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def resume(self) -> Iterator[Loaded | None]:
        """The newest whole checkpoint, open inside of `with`; also restores the metrics it was committed with."""
        loaded = self.store.load(self.info.fingerprint)
        if loaded is None:
            yield None
            return
        with loaded:
            self._last_steps = read_progress(loaded.state).position.steps
            self._metrics = list(loaded.state.progress["metrics"])
            self._write_metrics()
            yield loaded

    def start(self) -> None:
        """Write run.json."""
        atomic_write(self.folder / RUN, [self.info.render()])

    def due(self, trainer: Trainer, every_steps: int | None, every_s: float) -> bool:
        """Whether a commit is due, by steps or by seconds."""
        by_steps = every_steps is not None and trainer.position.steps - max(self._last_steps, 0) >= every_steps
        return by_steps or time.monotonic() - self._last_commit >= every_s

    def commit(self, trainer: Trainer) -> None:
        """Make the state durable."""
        self.store.commit(encode_state(capture(trainer, self._metrics), self.info.fingerprint))
        self._last_commit, self._last_steps = time.monotonic(), trainer.position.steps

    def add_metrics(self, record: dict[str, Any]) -> None:
        """Append an epoch's record to metrics.jsonl.

        Raises:
            DivergedError: a number in it is not finite.
        """
        _refuse_not_finite(record, f"the record of epoch {record['epoch']}")
        self._metrics.append(record)
        self._write_metrics()

    @property
    def metrics(self) -> Sequence[dict[str, Any]]:
        """The records so far."""
        return tuple(self._metrics)

    @property
    def report(self) -> dict[str, Any] | None:
        """What report.json says; None where there is none that can be read."""
        try:
            report = json.loads(read_regular(self.folder / REPORT, MAX_REPORT_BYTES))
        except (OSError, ValueError):
            return None
        return report if isinstance(report, dict) else None

    def write_report(self, report: dict[str, Any]) -> None:
        """Write report.json.

        Raises:
            DivergedError: a number in it is not finite.
        """
        _refuse_not_finite(report, "the report")
        atomic_write(self.folder / REPORT, [json.dumps(report, indent=1, sort_keys=True, allow_nan=False).encode()])

    def _write_metrics(self) -> None:
        # Whole and atomic, so that a resumed run continues exactly behind what its checkpoint knows.
        lines = "".join(json.dumps(record, sort_keys=True, allow_nan=False) + "\n" for record in self._metrics)
        atomic_write(self.folder / METRICS, [lines.encode()])


def _refuse_not_finite(values: dict[str, Any], what: str) -> None:
    wrong = next(_not_finite(values), None)
    if wrong is not None:
        raise DivergedError(f"{what} has {wrong}; the last checkpoint is kept. Use a smaller --lr or a warm-up")


def _not_finite(values: Any) -> Iterator[str]:
    """The numbers in parsed JSON that are not finite, with the keys that lead there."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key} {value}"
        yield from (f"{key} {inner}" for inner in _not_finite(value))


def restore(trainer: Trainer, loaded: Loaded) -> None:
    """Set position, scores and measures to what the checkpoint says.

    Raises:
        CheckpointError: a value is of another type, or out of the range of this training.
    """
    apply(read_progress(loaded.state), trainer)


def check_resume(folder: Path, resume: str) -> bool:
    """Whether the run in `folder` is to be continued, by --resume auto, never or must.

    Raises:
        UsageError: "never" and something is there; "must" and nothing is; or the folder holds something else, or
            cannot be one.
        CheckpointError: the run had begun, and its checkpoints are gone.
    """
    try:
        others = is_there(folder) and not (folder.is_dir() and all(_begun(p) for p in folder.iterdir()))
        exists = (folder / RUN).is_file()
    except OSError as error:
        raise UsageError(f"{folder} cannot be used: {reason(error)}; choose another --out") from error
    if resume == "never" and others:
        raise UsageError(f"{folder} exists; choose another --out, remove it, or continue it with --resume auto")
    if resume == "must" and not exists:
        raise UsageError(f"{folder} holds no run to continue; check --out, or leave --resume out")
    if others and not exists:
        raise UsageError(f"{folder} exists and is not a run; choose another --out")
    if exists and not _check_checkpoints(folder) and resume == "must":
        raise UsageError(f"{folder} was stopped before its first checkpoint; leave --resume out to start it again")
    return exists


def _check_checkpoints(folder: Path) -> bool:
    """Whether the run in `folder` has checkpoints; one that was killed before its first has none.

    Raises:
        CheckpointError: it had, and they are gone: training never starts anew without being asked to.
    """
    store = CheckpointStore(folder, writable=False)
    if store.generations():
        return True
    later = [name for name in (METRICS, REPORT) if os.path.lexists(folder / name)]
    if later or not os.path.lexists(store.folder):
        found = f"it has {later[0]}, but {store.folder} is empty" if later else f"{store.folder} is missing"
        raise CheckpointError(
            f"the checkpoints of {folder} are gone ({found}): restore them from a copy; or remove the folder, or give "
            "a new --out, to train anew"
        )
    return False


def check_same(folder: Path, info: RunInfo) -> None:
    """That the run in `folder` was begun with the bundle, data and settings of `info`.

    Raises:
        CheckpointError: it was not; the message names what differs.
    """
    before = read_run(folder)
    if before.fingerprint == info.fingerprint:
        return
    differs = [
        f"{name.replace('_', ' ')} {old!r} (now {new!r})"
        for (name, old), new in zip(before.config.as_dict().items(), info.config.as_dict().values(), strict=True)
        if old != new
    ]
    if before.bundle_digest != info.bundle_digest:
        differs.append(f"another bundle, {before.bundle}")
    if before.data_digest != info.data_digest:
        differs.append(f"other data, {before.data}")
    raise CheckpointError(
        f"{folder} was begun with {', '.join(differs)}: a run goes on only as it was begun; give what it was begun "
        "with, or a new --out"
    )


def _begun(path: Path) -> bool:
    """Whether it is one of the things that a run leaves which was killed before it could write run.json."""
    empty = path.name == "state" and path.is_dir() and not any(path.iterdir())
    return empty or path.name == ".lock" or (path.name.startswith(f".{RUN}.") and path.name.endswith(".tmp"))
