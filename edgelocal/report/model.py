"""report.json and metrics.jsonl as dataclasses. Older runs lack keys: whatever is absent or null is None or empty."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from edgelocal.storage.decode import decode, expect

LARGEST = 1e100  # far above a float32, whose losses may be anything finite; sums of it are still floats

# What happens in the memory of a block's working set, in the order of the charts. Ten kinds are more than colours can
# tell apart, so charts join neighbours; the tables keep all.
KINDS = (
    "runtime",
    "pipeline",
    "parameters",
    "buffers",
    "optimizer",
    "gradients",
    "activations",
    "workspace",
    "input",
    "output",
)


@dataclass(frozen=True)
class Plan:
    """What was decided for a block."""

    micro_batch: int | None = None
    accumulation: int | None = None
    resident: bool | None = None


@dataclass(frozen=True)
class Latency:
    """Seconds of a step: median and upper percentiles."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None


@dataclass(frozen=True)
class BlockReport:
    """A block. Scores: `loss`, and `accuracy` or `mean_absolute_error`; all sizes in bytes.

    `predicted` has the keys of `KINDS` and `total`, the working set: bytes of the process above idle while the block
    works. `working_set_bytes` is the same, measured.
    """

    name: str
    units: tuple[str, ...] | None = None
    parameters: dict[str, int] | None = None
    training: dict[str, float] | None = None
    validation: dict[str, float] | None = None
    train_s: float | None = None
    steps: int | None = None
    plan: Plan | None = None
    predicted: dict[str, int] | None = None
    working_set_bytes: int | None = None
    arena_bytes: int | None = None
    predicted_arena_bytes: int | None = None
    latency_s: Latency | None = None
    paged_bytes: int | None = None

    @property
    def predicted_bytes(self) -> int | None:
        """The predicted working set."""
        return (self.predicted or {}).get("total")


@dataclass(frozen=True)
class FrontierPoint:
    """A way to train the network: kind ("partition", "bp", ...), blocks, bytes with batches of `batch` samples (that of
    the export), and multiply-accumulates of a step for each sample."""

    kind: str
    blocks: int
    working_set_bytes: int
    training_macs: int
    chosen: bool | None = None
    batch: int | None = None
    estimated: bool | None = None

    @property
    def is_estimate(self) -> bool:
        """Whether the bytes are a guess; where a report does not say, checkpointing is one."""
        return self.kind == "checkpointing" if self.estimated is None else self.estimated


@dataclass(frozen=True)
class Epoch:
    """A line of metrics.jsonl; `blocks` holds the scores of those that were trained."""

    stage: int
    epoch: int
    lr: float
    steps: int
    seconds: float
    blocks: dict[str, dict[str, float]]
    validation: dict[str, float] | None = None


@dataclass(frozen=True)
class DevicePlan:
    """What was planned for a device, in bytes; `paging` is where states wait, "host" or "disk"."""

    peak_bytes: int | None = None
    context_bytes: int | None = None
    handles_bytes: int | None = None
    tensors_bytes: int | None = None
    workspace_bytes: int | None = None
    limit_bytes: int | None = None
    paging: str | None = None


@dataclass(frozen=True)
class DeviceMemory:
    """What a run held on a device, in bytes, as `measured_by` ("nvml", "driver") says; of the arena, `workspace_bytes`
    are those beyond the planned tensors. `fallback_nodes` ran on the CPU."""

    name: str | None = None
    gpu: str | None = None
    shared_memory: bool | None = None
    tf32: bool | None = None
    measured_by: str | None = None
    peak_bytes: int | None = None
    context_bytes: int | None = None
    arena_bytes: int | None = None
    workspace_bytes: int | None = None
    outside_bytes: int | None = None
    fallback_nodes: int | None = None
    planned: DevicePlan | None = None


@dataclass(frozen=True)
class Report:
    """report.json, and beside it what `load_report` adds: `metrics`, `run` (run.json as text), `settings` (its
    config) and `unfinished`.

    `timeline` is rows of (seconds, resident bytes, index of the block that works or -1).
    """

    network: str | None = None
    rule: str | None = None
    loss: str | None = None
    schedule: str | None = None
    trained_by: str | None = None
    samples: int | None = None
    steps: int | None = None
    train_s: float | None = None
    notes: tuple[str, ...] | None = None
    runtime: dict[str, str] | None = None
    threads: int | None = None
    batch: int | None = None
    budget_bytes: int | None = None
    process_peak_bytes: int | None = None
    planned_peak_bytes: int | None = None
    idle_bytes: int | None = None
    blocks: tuple[BlockReport, ...] = ()
    paged_bytes: int | None = None
    cached_bytes: int | None = None
    cache: dict[str, str] | None = None
    device: DeviceMemory | None = None
    timeline: tuple[tuple[float, ...], ...] | None = None
    frontier: tuple[FrontierPoint, ...] | None = None
    validation: dict[str, float] | None = None
    metrics: tuple[Epoch, ...] = ()
    run: dict[str, str] | None = None
    settings: dict[str, str] | None = None
    unfinished: str | None = None

    @property
    def name(self) -> str:
        """The network; where no report names it, the folder of its bundle."""
        bundle = PurePath((self.run or {}).get("bundle", "?")).name.encode(errors="replace").decode()
        return self.network or f"bundle {bundle}"

    @property
    def metric(self) -> str:
        """Key of the score beside the loss."""
        return "mean_absolute_error" if self.loss == "mse" else "accuracy"

    @property
    def frontier_batch(self) -> int | None:
        """The batch of the export, which the bytes of the frontier are for."""
        return self.frontier[0].batch if self.frontier else None

    @property
    def frontier_applies(self) -> bool:
        """Whether the frontier is for the batch of this run, as far as is known."""
        return not self.frontier_batch or not self.batch or self.frontier_batch == self.batch

    def working_budget_bytes(self) -> int | None:
        """What the budget leaves above the idle process."""
        if self.budget_bytes is None or self.idle_bytes is None:
            return None
        return self.budget_bytes - self.idle_bytes


def parse_report(raw: Any) -> Report:
    """Parsed JSON -> Report; keys it does not know are left out.

    Raises:
        DecodeError: a value of another type, or a number out of range.
    """
    expect(isinstance(raw, dict), "report", "an object", raw)
    texts = {key: _texts(raw.get(key), key) for key in ("runtime", "cache", "run")}
    run = raw.get("run") or {}
    texts["settings"] = _texts(run.get("config"), "run.config")
    blocks, metrics = ([] if raw.get(key) is None else raw[key] for key in ("blocks", "metrics"))
    known = _known(Report, {**raw, **texts, "blocks": blocks, "metrics": metrics})
    _check_numbers(known, "report")
    report: Report = decode(Report, known, "report")
    for index, point in enumerate(report.timeline or ()):
        where = f"report.timeline[{index}]"
        expect(len(point) == 3, where, "seconds, bytes and block", list(point))
        expect(point[2] == int(point[2]), where, "the index of a block or -1", point[2])
    return report


def _texts(raw: Any, where: str) -> dict[str, str] | None:
    """Settings of any kind as they are shown."""
    if raw is None:
        return None
    expect(isinstance(raw, dict), where, "an object", raw)
    return {str(key): value if isinstance(value, str) else _plain(value) for key, value in raw.items()}


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(_plain(inner) for inner in value) or "-"
    return {True: "yes", False: "no", None: "-"}[value] if value is None or type(value) is bool else str(value)


def _known(kind: Any, raw: Any) -> Any:
    """`raw` without what the dataclasses in `kind` do not name, and without nulls in its objects."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(a for a in typing.get_args(kind) if a is not type(None))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(raw, dict):
        hints = typing.get_type_hints(kind)
        return {key: _known(hints[key], value) for key, value in raw.items() if key in hints and value is not None}
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and isinstance(raw, list):
        return [_known(arguments[0], item) for item in raw]
    if typing.get_origin(kind) is dict and isinstance(raw, dict):
        return {key: _known(arguments[1], value) for key, value in raw.items() if value is not None}
    return raw


def _check_numbers(values: Any, where: str) -> None:
    """Sizes, times, counts and losses are not negative (-1: no block), and what is drawn must be a float."""
    if isinstance(values, int | float):
        expect(-1 <= values <= LARGEST, where, f"a number from 0 to {LARGEST:g}", values)
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        _check_numbers(value, f"{where}.{key}")
