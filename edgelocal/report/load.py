"""A run folder -> what is known of the run, as plain values: what `report --json` prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from edgelocal.errors import CheckpointError
from edgelocal.report.model import parse_report
from edgelocal.storage.decode import expect, unique
from edgelocal.storage.disk import read_regular, reason
from edgelocal.training.run import MAX_REPORT_BYTES, METRICS, REPORT
from edgelocal.training.run_info import RunInfo, read_run

_MEND = "restore it from a copy, or let `edgelocal train` write it again by the command that began the run"


def load_report(run: Path) -> dict[str, Any]:
    """report.json of the run, with `metrics` (a record an epoch), `run` (run.json) and `unfinished` (null, or where
    the run stands).

    Without report.json the run is unfinished: then what run.json and the metrics tell takes its place.

    Raises:
        CheckpointError: no run there, or a file of it is damaged or cannot be read.
    """
    info = read_run(run)
    lines = _read(run / METRICS) or b""
    metrics = [_parse(run / METRICS, line) for line in lines.splitlines() if line.strip()]
    _check(run / METRICS, {"metrics": metrics})
    data = _read(run / REPORT)
    report = _so_far(info, metrics) if data is None else {**_parse(run / REPORT, data), "unfinished": None}
    loaded = {**report, "metrics": metrics, "run": dataclasses.asdict(info)}
    _check(run / REPORT, loaded)
    return loaded


def _check(path: Path, raw: dict[str, Any]) -> None:
    """That whatever is drawn later has the right types."""
    try:
        parse_report(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {_MEND}") from None


def _read(path: Path) -> bytes | None:
    """The content of a file; None if there is none."""
    try:
        return read_regular(path, MAX_REPORT_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}; check path and permissions") from error


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        raw: dict[str, Any] = json.loads(data, object_pairs_hook=unique)
        expect(isinstance(raw, dict), path.name, "an object", raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {_MEND}") from None
    return raw


def _so_far(info: RunInfo, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """What stands in for the report of a run that has none yet: the scores of its last epochs."""
    scores = {name: values for record in metrics for name, values in record["blocks"].items()}
    last = metrics[-1] if metrics else {}
    return {
        "schedule": info.config.schedule,
        "batch": info.config.batch,
        "budget_bytes": info.budget_bytes,
        "runtime": info.runtime,
        "threads": info.threads,
        "steps": last.get("steps", 0),
        "blocks": [{"name": name, "training": values} for name, values in scores.items()],
        "validation": last.get("validation"),
        "unfinished": _where(info, last),
    }


def _where(info: RunInfo, last: dict[str, Any]) -> str:
    if not last:
        return "the run has not finished its first epoch"
    stage = f"stage {last['stage'] + 1}, " if info.config.schedule == "sequential" else ""
    epochs = f"epoch {last['epoch']} of {info.config.epochs}"
    return f"the run is unfinished: {stage}{epochs} and {last['steps']} steps are done"
