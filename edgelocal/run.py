"""A run on disk: the folder that `train` writes and `eval`, `finish` and `report` read.

run.json       bundle (path, digest), data, configuration, budget, runtime; written once
state/         checkpoints, two generations
metrics.jsonl  one line an epoch
report.json    what was reached and measured; written at the end
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgelocal import __version__
from edgelocal.block import Block
from edgelocal.bundle import Bundle, open_bundle
from edgelocal.config import TrainConfig
from edgelocal.errors import CheckpointError, UsageError
from edgelocal.formats.base import Dataset
from edgelocal.session import runtime_info
from edgelocal.state import TrainingState, encode_state
from edgelocal.store import CheckpointStore, Loaded, atomic_write
from edgelocal.tensors import Array
from edgelocal.trainer import Position, Trainer, stages

RUN = "run.json"
METRICS = "metrics.jsonl"
REPORT = "report.json"
FORMAT = "edgelocal-run"
SCHEMA = 1


@dataclass(frozen=True)
class RunInfo:
    """What run.json says."""

    bundle: str
    bundle_digest: str
    data: str
    data_digest: str
    config: TrainConfig
    budget_bytes: int | None
    runtime: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """What its checkpoints carry."""
        return self.config.fingerprint(self.bundle_digest, self.data_digest)

    def render(self) -> bytes:
        """run.json."""
        payload = {"format": FORMAT, "schema": SCHEMA, "edgelocal": __version__, **asdict(self)}
        return json.dumps(payload, indent=1, sort_keys=True).encode()


def data_digest(data: Dataset) -> str:
    """Number of samples and labels; pixels are not read, which could take longer than the training."""
    return hashlib.sha256(str(len(data)).encode() + data.labels.tobytes()).hexdigest()


def describe_run(bundle: Bundle, data: Dataset, data_path: Path, config: TrainConfig, budget: int | None) -> RunInfo:
    """The description of a new run."""
    return RunInfo(
        bundle=str(bundle.folder.resolve()),
        bundle_digest=bundle.digest,
        data=str(data_path.resolve()),
        data_digest=data_digest(data),
        config=config,
        budget_bytes=budget,
        runtime=runtime_info().as_dict(),
    )


def read_run(folder: Path) -> RunInfo:
    """The description of the run in `folder`.

    Raises:
        CheckpointError: no run there, or a damaged or newer one.
    """
    path = folder / RUN
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a run: it has no {RUN}; `edgelocal train` writes one")
    try:
        raw = json.loads(path.read_bytes())
        if raw["format"] != FORMAT or raw["schema"] > SCHEMA:
            raise CheckpointError(
                f"{path} has format {raw['format']} {raw['schema']}, this edgelocal reads {FORMAT} {SCHEMA}"
            )
        config = TrainConfig(**raw["config"])
        known = {key: raw[key] for key in ("bundle", "bundle_digest", "data", "data_digest", "budget_bytes", "runtime")}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); the run cannot be read") from None
    return RunInfo(config=config, **known)


def load_blocks(bundle: Bundle, threads: int, tensors: dict[str, Array] | None) -> list[Block]:
    """The blocks of a bundle with their initial state, or with that of a checkpoint.

    Raises:
        CheckpointError: the checkpoint lacks a tensor.
    """
    blocks = []
    for index, spec in enumerate(bundle.manifest.blocks):
        state = None
        if tensors is not None:
            missing = [t.name for t in spec.state() if f"{spec.name}:{t.name}" not in tensors]
            if missing:
                raise CheckpointError(f"the checkpoint has no {missing[0]!r} for block {spec.name}; start a new run")
            state = {t.name: tensors[f"{spec.name}:{t.name}"] for t in spec.state()}
        blocks.append(Block(bundle, index, threads, state))
    return blocks


@dataclass(frozen=True)
class Trained:
    """A run read back: its description, its bundle, and its blocks in their last committed state.

    `notes` says where the run stands if it is not at its end.
    """

    info: RunInfo
    bundle: Bundle
    blocks: list[Block]
    notes: tuple[str, ...]


def open_trained(folder: Path, threads: int, bundle_folder: Path | None = None) -> Trained:
    """The run in `folder`. `bundle_folder` if the bundle was moved.

    Raises:
        CheckpointError: no run, no checkpoint, or the bundle is not the one it was trained from.
    """
    info = read_run(folder)
    place = bundle_folder or Path(info.bundle)
    if bundle_folder is None and not place.exists():
        raise CheckpointError(f"{folder} was trained from {place}, which is gone; say where it is now with --bundle")
    bundle = open_bundle(place)
    if bundle.digest != info.bundle_digest:
        raise CheckpointError(
            f"{bundle.folder} is not the bundle that {folder} was trained from; give it with --bundle"
        )
    loaded = CheckpointStore(folder, writable=False).load(info.fingerprint)
    if loaded is None:
        raise CheckpointError(f"{folder} has no checkpoint yet; wait for the first, or train again")
    notes = _unfinished(info.config, Position(**loaded.state.progress["position"]), len(bundle.manifest.blocks))
    return Trained(info, bundle, load_blocks(bundle, threads, loaded.state.tensors), notes)


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

    def resume(self) -> Loaded | None:
        """The newest whole checkpoint; also restores the metrics it was committed with."""
        loaded = self.store.load(self.info.fingerprint)
        if loaded is not None:
            self._metrics = list(loaded.state.progress["metrics"])
            self._last_steps = loaded.state.progress["position"]["steps"]
            self._write_metrics()
        return loaded

    def start(self) -> None:
        """Write run.json."""
        atomic_write(self.folder / RUN, [self.info.render()])

    def due(self, trainer: Trainer, every_steps: int | None, every_s: float) -> bool:
        """Whether a commit is due, by steps or by seconds."""
        by_steps = every_steps is not None and trainer.position.steps - max(self._last_steps, 0) >= every_steps
        return by_steps or time.monotonic() - self._last_commit >= every_s

    def commit(self, trainer: Trainer) -> None:
        """Make the state durable; nothing where it is what was committed last."""
        tensors = {f"{b.spec.name}:{name}": array for b in trainer.blocks for name, array in b.state().items()}
        progress = {
            "position": asdict(trainer.position),
            "scores": [asdict(m.score) for m in trainer.measures],
            "measures": [{k: v for k, v in asdict(m).items() if k != "score"} for m in trainer.measures],
            "process_peak_bytes": trainer.process_peak_bytes,
            "metrics": self._metrics,
        }
        self.store.commit(encode_state(TrainingState(progress, tensors), self.info.fingerprint))
        self._last_commit, self._last_steps = time.monotonic(), trainer.position.steps

    def add_metrics(self, record: dict[str, Any]) -> None:
        """Append an epoch's record to metrics.jsonl."""
        self._metrics.append(record)
        self._write_metrics()

    @property
    def metrics(self) -> Sequence[dict[str, Any]]:
        """The records so far."""
        return tuple(self._metrics)

    def write_report(self, report: dict[str, Any]) -> None:
        """Write report.json."""
        atomic_write(self.folder / REPORT, [json.dumps(report, indent=1, sort_keys=True).encode()])

    def _write_metrics(self) -> None:
        # Whole and atomic, so that a resumed run continues exactly behind what its checkpoint knows.
        lines = "".join(json.dumps(record, sort_keys=True) + "\n" for record in self._metrics)
        atomic_write(self.folder / METRICS, [lines.encode()])


def restore(trainer: Trainer, loaded: Loaded) -> None:
    """Set position, scores and measures to what the checkpoint says."""
    progress = loaded.state.progress
    trainer.position = Position(**progress["position"])
    trainer.process_peak_bytes = progress["process_peak_bytes"]
    for measures, values, score in zip(trainer.measures, progress["measures"], progress["scores"], strict=True):
        for key, value in values.items():
            setattr(measures, key, value)
        for key, value in score.items():
            setattr(measures.score, key, value)


def check_resume(folder: Path, resume: str) -> bool:
    """Whether the run in `folder` is to be continued, by --resume auto, never or must.

    Raises:
        UsageError: "never" and something is there; "must" and nothing is; or the folder holds something else.
    """
    exists = (folder / RUN).is_file()
    others = folder.exists() and not (folder.is_dir() and all(_begun(p) for p in folder.iterdir()))
    if resume == "never" and others:
        raise UsageError(f"{folder} exists; choose another --out, remove it, or continue it with --resume auto")
    if resume == "must" and not exists:
        raise UsageError(f"{folder} holds no run to continue; check --out, or leave --resume out")
    if others and not exists:
        raise UsageError(f"{folder} exists and is not a run; choose another --out")
    return exists


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
