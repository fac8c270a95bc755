"""The device's side of the memory benchmark: bundles of one network, each trained by `edgelocal train` in its own
process, as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgelocal.commands.export_options import ExportOptions
from edgelocal.errors import BudgetError, UsageError
from edgelocal.exporters.bench.result import Measurement, Setting
from edgelocal.exporters.pack import export_bundle
from edgelocal.exporters.request import ExportRequest, make_request, parse_input

Say = Callable[[str], None]
_ENOUGH_STEPS = 4  # beyond the two that are measured for memory and so take longer


@dataclass(frozen=True)
class Bundle:
    """An exported variant."""

    variant: str
    folder: Path


def export_variant(
    setting: Setting,
    folder: Path,
    variant: str,
    say: Say,
    *,
    rule: str,
    blocks: str = ExportOptions.blocks,
    budget: str | None = None,
) -> Bundle:
    """Export the network under `rule` with blocks of the given kind, or those that fit `budget`."""
    say(f"exporting {variant}")
    export_bundle(export_request(setting, rule=rule, blocks=blocks, budget=budget), folder, say)
    return Bundle(variant, folder)


def export_request(
    setting: Setting, *, rule: str, blocks: str = ExportOptions.blocks, budget: str | None = None
) -> ExportRequest:
    """What `export_variant` asks for."""
    options = ExportOptions(
        blocks=blocks,
        rule=rule,
        input_shape=setting.input,
        classes=setting.classes,
        pad=0,
        flip=False,
        batch=setting.batch,
        epochs=1,
        lr_schedule="constant",
        seed=setting.seed,
        memory_budget=budget,
        target=setting.device,
        precision="bfloat16" if setting.precision == "bf16" else "float32",
    )
    return replace(make_request(setting.network, options), frontier=False)


def write_samples(setting: Setting, path: Path) -> None:
    """Random images for the steps of one run."""
    shape, _ = parse_input(setting.input)
    rng = np.random.default_rng(setting.seed)
    count = setting.batch * max(setting.steps, _ENOUGH_STEPS + 2)
    x = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    np.savez(path, x_train=x, y_train=rng.integers(0, setting.classes, count))


def measure_own(
    setting: Setting, bundle: Bundle, data: Path, out: Path, budget_bytes: int | None = None
) -> Measurement:
    """Train `bundle` on `data` for one epoch and read its report.

    The time of a step is the sum of its blocks' median times, loading of graphs and paging included.

    Raises:
        BudgetError: it does not fit.
        UsageError: the process failed otherwise; the message holds what it said.
    """
    line = [sys.executable, "-m", "edgelocal", "train", str(bundle.folder), "--data", str(data), "--out", str(out)]
    line += [
        "--batch",
        str(setting.batch),
        "--epochs",
        "1",
        "--threads",
        str(setting.threads),
        "--no-augment",
        "--json",
    ]
    line += ["--checkpoint-seconds", "100000", *device_options(setting)]
    if budget_bytes is not None or setting.device != "cpu":  # on a device a budget is what makes it small
        line += ["--memory-budget", "auto" if budget_bytes is None else str(budget_bytes)]
    done = subprocess.run(line, capture_output=True, text=True, env=dict(os.environ), check=False)
    if done.returncode == BudgetError.exit_code:
        raise BudgetError(_said(done))
    if done.returncode != 0:
        raise UsageError(f"training {bundle.variant} failed with exit code {done.returncode}: {_said(done)}")
    return _measurement(setting, bundle, json.loads(done.stdout))


def device_options(setting: Setting) -> list[str]:
    """Options of `edgelocal train` that the setting asks for; bf16 is a matter of the bundle."""
    if setting.device == "cpu":
        return []
    return ["--device", setting.device, *(["--tf32"] if setting.precision == "tf32" else [])]


def _measurement(setting: Setting, bundle: Bundle, report: dict[str, Any]) -> Measurement:
    step = sum(block["latency_s"]["p50"] for block in report["blocks"])
    losses = tuple(block["training"]["loss"] for block in report["blocks"] if block["training"])
    idle, peak, reserved = _memory(setting, report)
    return Measurement(
        variant=bundle.variant,
        network=setting.network,
        batch=setting.batch,
        segments=0,
        idle_bytes=idle,
        working_set_bytes=peak - idle,
        process_peak_bytes=peak,
        step_s=(step,),
        time_per_sample_s=step / setting.batch,
        parameters=sum(sum(block["parameters"].values()) for block in report["blocks"]),
        loss=losses[-1:],
        reserved_bytes=reserved,
    )


def _memory(setting: Setting, report: dict[str, Any]) -> tuple[int, int, int | None]:
    """Idle and peak bytes of the process, and those of its arena on a device: the one place that knows how a report
    says so.

    Raises:
        UsageError: a training on a device whose report does not say what it took there, or that partly ran elsewhere.
    """
    device = report.get("device")
    if setting.device == "cpu":
        return report["idle_bytes"], report["process_peak_bytes"], None
    if not device or device["name"] != setting.device:
        raise UsageError(f"a training on {setting.device} reported {device!r} as its device; upgrade edgelocal")
    if device["fallback_nodes"]:
        raise UsageError(f"{device['fallback_nodes']} nodes of a training on {setting.device} ran on the CPU")
    # Where nobody counts the context, the peak has none in it either.
    return device["context_bytes"] or 0, device["peak_bytes"], device["arena_bytes"]


def _said(done: subprocess.CompletedProcess[str]) -> str:
    try:
        return str(json.loads(done.stdout)["error"])
    except (ValueError, KeyError):
        return done.stderr[-2000:]
