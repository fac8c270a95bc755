"""What a run was begun with: run.json, written once."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from edgelocal import __version__
from edgelocal.bundle.folder import Bundle
from edgelocal.data.formats.base import Dataset
from edgelocal.errors import CheckpointError
from edgelocal.storage.decode import decode, expect, unique
from edgelocal.storage.disk import read_regular, reason
from edgelocal.training.config import PORTABLE, TRAINING_SCHEDULES, TrainConfig

RUN = "run.json"
FORMAT = "edgelocal-run"
SCHEMA = 1
MAX_RUN_BYTES = 1 << 20


@dataclass(frozen=True)
class RunInfo:
    """What run.json says. `threads`, those of every loaded graph, decide no bits: a run goes on with any number."""

    bundle: str
    bundle_digest: str
    data: str
    data_digest: str
    config: TrainConfig
    budget_bytes: int | None
    runtime: dict[str, str]
    micro_batches: tuple[int, ...] | None = None
    threads: int | None = None

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


def describe_run(
    bundle: Bundle,
    data: Dataset,
    data_path: Path,
    config: TrainConfig,
    budget: int | None,
    runtime: dict[str, str],
    threads: int,
) -> RunInfo:
    """The description of a new run."""
    return RunInfo(
        bundle=str(bundle.folder.resolve()),
        bundle_digest=bundle.digest,
        data=str(data_path.resolve()),
        data_digest=data_digest(data),
        config=config,
        budget_bytes=budget,
        runtime=runtime,
        threads=threads,
    )


def read_run(folder: Path) -> RunInfo:
    """The description of the run in `folder`.

    Raises:
        CheckpointError: no run there, or a damaged or newer one.
    """
    path = folder / RUN
    try:
        data = read_regular(path, MAX_RUN_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder} is not a run: it has no {RUN}; `edgelocal train` writes one") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}; check path and permissions") from error
    try:
        return _parse_run(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); restore it from a copy, or train anew with a new --out"
        ) from None
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None


def _parse_run(data: bytes) -> RunInfo:
    raw = json.loads(data, object_pairs_hook=unique)
    expect(isinstance(raw, dict), RUN, "an object", raw)
    kind, schema, _ = (raw.pop(key, None) for key in ("format", "schema", "edgelocal"))
    if kind != FORMAT or (type(schema) is int and schema > SCHEMA):
        raise CheckpointError(f"has format {kind} {schema}, this edgelocal reads {FORMAT} {SCHEMA}")
    expect(type(schema) is int and schema >= 1, "schema", "a positive integer", schema)
    if isinstance(raw.get("config"), dict):
        raw["config"].setdefault("runtime", PORTABLE)  # runs from before there was another
    info: RunInfo = decode(RunInfo, raw, RUN)
    os.fsencode(info.bundle)  # what names no file is no path
    expect("\0" not in info.bundle, "bundle", "a path", info.bundle)
    config = info.config
    expect(config.epochs >= 1 and config.batch >= 1, "config", "positive epochs and batch", config)
    expect(config.schedule in TRAINING_SCHEDULES, "config.schedule", f"one of {TRAINING_SCHEDULES}", config.schedule)
    for size in info.micro_batches or ():
        expect(size >= 1, "micro_batches", "positive integers", size)
    expect(info.threads is None or info.threads >= 1, "threads", "a positive integer", info.threads)
    return info
