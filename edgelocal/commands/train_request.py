"""What `edgelocal train` is asked to do, with the bundle's defaults for what is left open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelocal.bundle.folder import open_bundle
from edgelocal.bundle.spec import Manifest
from edgelocal.bundle.targets import Device
from edgelocal.commands.on_device import CPU_REQUEST, DeviceRequest
from edgelocal.errors import UsageError
from edgelocal.machine.budget import parse_budget
from edgelocal.machine.device import describe
from edgelocal.training.config import ORT_TRAINING, PORTABLE, TrainConfig


@dataclass(frozen=True)
class TrainRequest:
    """What the command line asks for. None means: what the bundle, the data or the machine suggest."""

    bundle: Path
    data: Path
    validation: Path | None
    out: Path
    config: TrainConfig
    budget_bytes: int | None
    resume: str
    checkpoint_steps: int | None
    checkpoint_s: float
    threads: int | None
    validate_every: int
    micro_batch: int | None = None
    on_oom: str = "stop"
    memory_budget: str | None = None  # as it was written; a share is of the memory that there is
    device: DeviceRequest = CPU_REQUEST


def make_request(
    *,
    bundle: Path,
    data: Path,
    validation: Path | None,
    out: Path,
    epochs: int | None,
    batch: int | None,
    lr: float | None,
    lr_schedule: str | None,
    warmup_epochs: int,
    hyper: Sequence[str],
    schedule: str,
    runtime: str,
    cache: str,
    augment: bool,
    memory_budget: str | None,
    micro_batch: int | None,
    on_oom: str,
    resume: str,
    checkpoint_steps: int | None,
    checkpoint_seconds: float,
    threads: int | None,
    seed: int,
    val_every: int,
    device: Device,
    tf32: bool,
    allow_cpu_fallback: bool,
) -> TrainRequest:
    """The request of the command line, with the bundle's defaults for what it leaves out."""
    manifest = open_bundle(bundle).manifest
    defaults = manifest.defaults
    config = TrainConfig(
        epochs=defaults.epochs if epochs is None else epochs,
        batch=defaults.batch if batch is None else batch,
        lr=defaults.lr if lr is None else lr,
        lr_schedule=lr_schedule or defaults.lr_schedule,
        warmup_epochs=warmup_epochs,
        schedule=schedule,
        seed=seed,
        augment=augment,
        cache=cache,
        hyper=dict(_hyper(item) for item in hyper),
        runtime=choose_runtime(runtime, manifest),
    )
    if config.runtime == ORT_TRAINING:
        _check_artifacts(micro_batch, on_oom, device)
    if not checkpoint_seconds > 0:
        raise UsageError(f"--checkpoint-seconds is {checkpoint_seconds}, expected a number above 0")
    budget = None if memory_budget is None else parse_budget(memory_budget, describe().effective_bytes)
    return TrainRequest(
        bundle=bundle,
        data=data,
        validation=validation,
        out=out,
        config=config,
        budget_bytes=budget,
        resume=resume,
        checkpoint_steps=checkpoint_steps,
        checkpoint_s=checkpoint_seconds,
        threads=threads,
        validate_every=val_every,
        micro_batch=micro_batch,
        on_oom=on_oom,
        memory_budget=memory_budget,
        device=DeviceRequest(device, tf32, allow_cpu_fallback),
    )


def _check_artifacts(micro_batch: int | None, on_oom: str, device: Device) -> None:
    """That nothing is asked for which the training artifacts cannot do."""
    if micro_batch is not None:
        raise UsageError("--micro-batch needs --runtime portable: the artifacts take the whole batch at once")
    if on_oom == "replan":
        raise UsageError("--on-oom replan needs --runtime portable: for the artifacts nothing is planned")
    if device != "cpu":
        raise UsageError("--device cuda needs --runtime portable: the artifacts' last runtime is not made for it here")


def choose_runtime(asked: str, manifest: Manifest) -> str:
    """What the blocks are trained with; "auto" is the faster one that the bundle has (docs/decisions/0013).

    Raises:
        UsageError: the bundle was not exported for what is asked for.
    """
    if asked == "auto":
        return PORTABLE if PORTABLE in manifest.runtimes else ORT_TRAINING
    if asked not in manifest.runtimes:
        has = " and ".join(manifest.runtimes)
        raise UsageError(f"this bundle has what --runtime {has} needs; export it with --runtime {asked}, or both")
    return asked


def _hyper(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not equals or not math.isfinite(number):
        raise UsageError(f"--hyper {text!r} is not NAME=NUMBER, for example momentum=0.8")
    return name, number
