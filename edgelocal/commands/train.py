"""`edgelocal train` as one function: bundle + data + configuration -> run folder."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from edgelocal.bundle.folder import Bundle, open_bundle, verify
from edgelocal.bundle.spec import Manifest
from edgelocal.bundle.targets import for_device
from edgelocal.commands.job import Job
from edgelocal.commands.on_device import open_device
from edgelocal.commands.progress import Display
from edgelocal.commands.train_request import TrainRequest
from edgelocal.data.formats.base import Dataset
from edgelocal.data.formats.images import warm_up
from edgelocal.data.pipeline import Split, has_split, holds_images, open_dataset, pipeline_bytes
from edgelocal.errors import BudgetError, InterruptedRunError, RuntimeMissingError
from edgelocal.machine.budget import format_size, parse_budget, rss_bytes
from edgelocal.machine.device import describe
from edgelocal.machine.packages import package
from edgelocal.memory.needs import DeviceNeeds
from edgelocal.memory.peaks import Workload
from edgelocal.memory.plan import has_model, idle_range, make_plan
from edgelocal.memory.planned import Plan
from edgelocal.runtime.accelerator import Accelerator
from edgelocal.runtime.arena import give_back, start
from edgelocal.runtime.library import has_training, runtime_info
from edgelocal.storage.store import lock
from edgelocal.training.cache import cache_precision
from edgelocal.training.config import ORT_TRAINING, PORTABLE, TrainConfig
from edgelocal.training.run import check_resume, check_same
from edgelocal.training.run_info import RUN, RunInfo, describe_run, read_run


def train(request: TrainRequest, display: Display, stop: threading.Event) -> dict[str, Any]:
    """Train and return the report, which is also written to the run. Setting `stop` ends it after the current step.

    Raises:
        EdgelocalError: see errors.py; whatever was committed before stands.
    """
    start()
    bundle = open_bundle(request.bundle)
    manifest = bundle.manifest
    if request.config.runtime == ORT_TRAINING and not has_training():
        raise _no_training_build(PORTABLE in manifest.runtimes)
    verify(bundle)  # damage is found now, not when the block's turn comes after hours
    request.device.check()
    bundle = replace(bundle, manifest=for_device(manifest, request.device.name))
    manifest = bundle.manifest
    device = open_device(request.device, bounded=request.budget_bytes is not None)
    request = with_share(request, device)
    if any(holds_images(path) for path in (request.data, request.validation) if path is not None):
        warm_up()
    give_back()
    measured = rss_bytes() + (device.needs.context if device else 0)
    data, validation = open_data(request.data, request.validation, manifest, request.out)
    request = replace(request, config=settled(request.config, request.out, bundle, len(data)))
    request.config.check(manifest)
    threads = request.threads or describe().cores
    runtime = device.runtime_info() if device else runtime_info().as_dict()
    info = describe_run(bundle, data, request.data, request.config, request.budget_bytes, runtime, threads)
    wanted = _begun_with(request.out, info)
    needs = device.needs if device else None
    plan = _plan(request, bundle, data, validation, measured, needs, wanted)
    check_resume(request.out, request.resume)  # before the lock, which makes the folder
    if plan is not None:
        info = replace(info, micro_batches=tuple(b.micro_batch for b in plan.blocks))
    if stop.is_set():
        raise InterruptedRunError("stopped before the first step; nothing was written")
    with lock(request.out):
        continued = check_resume(request.out, request.resume)  # what another process has done until we held it
        if continued:
            check_same(request.out, info)
        with data, validation or nullcontext():  # unpacks what is compressed, so damage is found now and not in epoch 1
            replan = partial(_plan, request, bundle, data, validation, measured, needs, wanted or info.micro_batches)
            job = Job(request, display, bundle, info, data, validation, stop, measured, replan, device)
            return job.run(plan, continued)


def with_share(request: TrainRequest, device: Accelerator | None) -> TrainRequest:
    """The request with a budget that is a share taken of host and device together, where they have memory each."""
    if device is None or device.needs.shared or request.memory_budget is None:
        return request
    there = describe().effective_bytes + (device.needs.most or device.meter.free_bytes())
    return replace(request, budget_bytes=parse_budget(request.memory_budget, there))


def _no_training_build(portable: bool) -> RuntimeMissingError:
    """What to do without it; `portable`: whether the bundle has step graphs."""
    row = package(describe(), "ort-training")
    remedies = [f"{row.command} in an environment of its own"] if row else []
    remedies.append(
        "train with --runtime portable" if portable else "export the bundle with --runtime portable or both"
    )
    none = "" if row else " (none is made for this machine and Python)"
    return RuntimeMissingError(
        "the artifacts need ONNX Runtime's training build, and the one installed here is another"
        f"{none}: {', or '.join(remedies)}"
    )


def settled(config: TrainConfig, out: Path, bundle: Bundle, samples: int) -> TrainConfig:
    """`config` with a cache "auto" decided: as the run in `out` has it, or else the best precision the disk has room
    for, with as much left over, while one cache is built from the one before."""
    if config.cache != "auto":
        return config
    if (out / RUN).is_file():
        return replace(config, cache=read_run(out).config.cache)
    free = describe(folder=out if out.is_dir() else out.absolute().parent).disk_free_bytes
    return replace(config, cache=cache_precision(bundle.manifest, samples, free) if not config.augment else "off")


def _begun_with(out: Path, info: RunInfo) -> tuple[int, ...] | None:
    """The micro-batches that the run in `out` was begun with, where it is the one that `info` describes: the idle
    process is a little larger in one start than in another, and a run that goes on keeps its bits nevertheless."""
    if not (out / RUN).is_file():
        return None
    before = read_run(out)
    return before.micro_batches if before.fingerprint == info.fingerprint else None


def _plan(
    request: TrainRequest,
    bundle: Bundle,
    data: Dataset,
    validation: Dataset | None,
    measured: int,
    device: DeviceNeeds | None,
    wanted: Sequence[int] | None,
    bound: int | None = None,
) -> Plan | None:
    """The plan of the run; for a bundle without a memory model, and for artifacts, which have none, a rough check.

    `measured` are bytes of the idle process, `wanted` micro-batches to keep if they fit, `bound` is one more upper
    bound for them, besides the request's.

    Raises:
        BudgetError: it cannot fit. Nothing was allocated or written.
    """
    manifest, config = bundle.manifest, request.config
    if config.runtime == ORT_TRAINING or not has_model(manifest):
        _check_fit(bundle, request.budget_bytes)
        return None
    datasets = [data, *([validation] if validation is not None else [])]
    augment = manifest.augment if config.augment else None

    idle, spare = idle_range(measured)
    work = Workload.of(
        manifest,
        batch=min(config.batch, len(data)),
        schedule=config.schedule,
        idle_bytes=idle,
        spare_bytes=spare,
        pipeline=lambda batch: pipeline_bytes(datasets, batch, manifest.input, augment),
        validates=validation is not None,
        micro_batch=min((m for m in (request.micro_batch, bound) if m is not None), default=None),
        threads=request.threads or describe().cores,
        device=device,
    )
    return make_plan(work, request.budget_bytes, wanted)


def open_data(path: Path, validation: Path | None, manifest: Manifest, scratch: Path) -> tuple[Dataset, Dataset | None]:
    """Training and validation data; the validation defaults to the test split of `path`, if it has one.

    What must be unpacked goes into `scratch`, see `open_dataset`.
    """
    data = open_dataset(path, "train", manifest.input, manifest.task, scratch)
    if validation is not None:
        split: Split = "test" if has_split(validation, "test") else "train"
        return data, open_dataset(validation, split, manifest.input, manifest.task, scratch)
    if has_split(path, "test"):
        return data, open_dataset(path, "test", manifest.input, manifest.task, scratch)
    return data, None


def _check_fit(bundle: Bundle, budget: int | None) -> None:
    """Refuse before anything is allocated what cannot fit: the idle process with the state of all blocks."""
    if budget is None:
        return
    state = sum(4 * t.elements_per_sample() for block in bundle.manifest.blocks for t in block.state())
    need = rss_bytes() + state
    if need > budget:
        raise BudgetError(
            f"the idle process ({format_size(rss_bytes())}) and the state of the blocks ({format_size(state)}) need "
            f"{format_size(need)} before the first step, the budget is {format_size(budget)}; raise --memory-budget, "
            "or export a smaller network or shallower auxiliaries"
        )
