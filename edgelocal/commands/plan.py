"""`edgelocal plan` as functions: what a training would hold and give up, without data and without loading a graph."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from edgelocal.bundle.folder import MANIFEST, Bundle, open_bundle, verify
from edgelocal.bundle.spec import BlockSpec, Manifest, TaskSpec
from edgelocal.bundle.targets import Device, for_device
from edgelocal.commands.on_device import DeviceRequest, open_device
from edgelocal.data.formats.base import Labels
from edgelocal.data.pipeline import pipeline_bytes
from edgelocal.errors import BundleError, UsageError
from edgelocal.machine.budget import format_size, parse_budget, rss_bytes, size_up
from edgelocal.machine.device import describe
from edgelocal.machine.profiles import Profile, find_profile, idle_process_bytes
from edgelocal.memory.needs import DeviceNeeds, PipelineBytes, tensor_bytes
from edgelocal.memory.peaks import Workload
from edgelocal.memory.plan import Thresholds, has_model, idle_range, make_plan, make_thresholds
from edgelocal.memory.planned import Plan
from edgelocal.runtime.accelerator import HANDLES_BYTES, WORKSPACE_BYTES
from edgelocal.runtime.arena import give_back, start
from edgelocal.training.cache import cache_precision
from edgelocal.training.config import ORT_TRAINING

# What `train` has loaded by then, in its order.
TRAINING_MODULES = ("commands.progress", "commands.signals", "commands.train", "report.terminal")
VALIDATION_SHARE = 5  # one sample to validate with for so many to train with


@dataclass(frozen=True)
class PlanRequest:
    """What the command line asks for. None means: what the bundle or the machine suggest."""

    bundle: Path
    memory_budget: str
    batch: int | None
    micro_batch: int | None
    schedule: str
    samples: int
    validate: bool
    augment: bool
    profile: str | None
    threads: int | None
    device: Device = "cpu"


@dataclass(frozen=True)
class AssumedData:
    """The sizes of a dataset nobody has opened: samples and labels in rows of a file, as most formats keep them."""

    count: int
    sample_bytes: int
    task: TaskSpec

    @property
    def labels(self) -> Labels:
        """Of the right shape, in no memory."""
        if self.task.loss == "cross_entropy":
            return np.broadcast_to(np.int64(0), (self.count,))
        return np.broadcast_to(np.float32(0), (self.count, self.task.classes))

    @property
    def resident_bytes(self) -> int:
        """As `Dataset.resident_bytes`."""
        return self.labels.nbytes

    def __len__(self) -> int:
        return self.count

    def reading_bytes(self, k: int) -> int:
        """As `Dataset.reading_bytes`, of rows that lie in several files."""
        return 2 * k * self.sample_bytes


def plan_bundle(request: PlanRequest) -> dict[str, Any]:
    """What `plan --json` prints for the bundle at `request.bundle`; errors as of `plan_for`, and

    Raises:
        BundleError: the bundle is damaged.
    """
    if request.profile is None:
        _load_training()
    return plan_for(open_bundle(request.bundle), request)


def plan_for(bundle: Bundle, request: PlanRequest) -> dict[str, Any]:
    """The plan, and what follows from it, as plain values.

    Raises:
        UsageError: no such profile, the budget is not one, or the bundle has only what nothing is planned for.
        BundleError: the bundle says nothing of its memory; or it is damaged, and there is no profile.
        BudgetError: no plan fits.
    """
    profile = find_profile(request.profile) if request.profile is not None else None
    device = describe(folder=bundle.folder)
    needs = _device_needs(request, profile)
    usable = device.effective_bytes if profile is None else profile.usable_bytes
    if needs is not None and needs.most is not None:  # memory of its own
        usable += needs.most
    budget = parse_budget(request.memory_budget, usable)
    manifest = for_device(bundle.manifest, request.device)
    if manifest.runtimes == (ORT_TRAINING,):
        raise UsageError(
            f"{bundle.folder} has training artifacts only, and for these nothing is planned; export it with "
            "--runtime portable or both"
        )
    if not has_model(manifest):
        raise BundleError(f"{bundle.folder} does not say what memory its blocks need (schema 1): export it again")
    idle, spare = _idle_bytes(bundle, profile, needs)
    threads = request.threads or (device.cores if profile is None else profile.cores)
    started = time.perf_counter()
    work = assumed_work(manifest, request, idle, threads, spare, needs)
    plan = make_plan(work, budget)
    plan_s = time.perf_counter() - started
    thresholds = make_thresholds(work)
    return {
        "bundle": str(bundle.folder),
        "network": manifest.network,
        "profile": None if profile is None else profile.as_dict(),
        "usable_bytes": usable,
        "samples": request.samples,
        "threads": threads,
        "validates": request.validate,
        "most_at_once": work.most,
        **plan.as_dict(),
        "units": [list(block.units) for block in manifest.blocks],
        "thresholds": {
            "everything_bytes": thresholds.everything,
            "states_bytes": thresholds.states,
            "whole_batch_bytes": thresholds.batch,
            "smallest_bytes": thresholds.least,
        },
        "paged_bytes_per_step": paged_bytes_per_step(manifest, plan),
        "cache": _cache(manifest, request, device.disk_free_bytes) if request.schedule == "sequential" else None,
        "advice": advice(manifest, plan, thresholds, usable),
        "plan_ms": round(1000 * plan_s, 3),
    }


def assumed_work(
    manifest: Manifest,
    request: PlanRequest,
    idle_bytes: int,
    threads: int,
    spare_bytes: int = 0,
    device: DeviceNeeds | None = None,
) -> Workload:
    """The workload with data that nobody has opened."""
    return Workload.of(
        manifest,
        batch=min(request.batch or manifest.defaults.batch, request.samples),
        schedule=request.schedule,
        idle_bytes=idle_bytes,
        spare_bytes=spare_bytes,
        pipeline=lambda batch: assumed_pipeline(manifest, request, batch),
        validates=request.validate,
        micro_batch=request.micro_batch,
        threads=threads,
        device=device,
    )


def assumed_pipeline(manifest: Manifest, request: PlanRequest, batch: int) -> PipelineBytes:
    """What data of the bundle's kind would take: images as bytes, all else as it enters the network."""
    spec = manifest.input
    item = {"int64": 8, "float32": 1 if len(spec.shape) == 3 else 4}[spec.dtype]
    counts = [request.samples]
    if request.validate:
        counts.append(max(1, request.samples // VALIDATION_SHARE))
    datasets = [AssumedData(count, item * math.prod(spec.shape), manifest.task) for count in counts]
    return pipeline_bytes(datasets, batch, spec, manifest.augment if request.augment else None)


def paged_bytes_per_step(manifest: Manifest, plan: Plan) -> int:
    """Bytes that paging reads from the disk and writes to it in a step; sequential: in the one that moves most, without
    a cache."""
    if plan.device is not None and plan.device.paging == "host":
        return 0
    moved = [0 if b.resident else _state_bytes(spec) for b, spec in zip(plan.blocks, manifest.blocks, strict=True)]
    if plan.schedule == "interleaved":
        return 2 * sum(moved)
    return max(2 * own + sum(moved[:index]) for index, own in enumerate(moved))


def advice(manifest: Manifest, plan: Plan, thresholds: Thresholds, usable_bytes: int) -> list[str]:
    """What the plan gave up, what that means, and what would avoid it."""
    found = []
    budget = plan.budget_bytes or 0
    if budget > usable_bytes:
        found.append(f"the budget is more than the {format_size(usable_bytes)} that are there to have")
    cut = [i for i, block in enumerate(plan.blocks) if block.accumulation > 1]
    if cut:
        found.append(_cut_text(manifest, plan, thresholds, cut))
    paged = [block for block in plan.blocks if not block.resident]
    if paged:
        need = f"; from {size_up(thresholds.states)} on it stays in memory" if thresholds.states is not None else ""
        of_all = f"the state of {len(paged)} of {len(plan.blocks)} blocks is paged"
        if plan.device is not None and plan.device.paging == "host":
            found.append(f"{of_all}: it waits in the host's memory, and goes to the device and back in every step")
        else:
            found.append(
                f"{of_all}: it waits on disk, is read before every step and written after it, which wears flash "
                f"memory{need}"
            )
    if plan.graphs_bytes is not None:
        kept = f"; from {size_up(thresholds.everything)} on they stay loaded" if thresholds.everything else ""
        found.append(
            f"graphs are loaded when a block's turn comes, which costs time in every step{kept}. --schedule sequential "
            "changes blocks less often"
        )
    return found


def _cut_text(manifest: Manifest, plan: Plan, thresholds: Thresholds, cut: Sequence[int]) -> str:
    sizes = sorted({plan.blocks[i].micro_batch for i in cut})
    several = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    text = f"{len(cut)} of {len(plan.blocks)} blocks take the batch of {plan.batch} in micro-batches of {several}"
    if any(t.kind == "buf" for i in cut for t in manifest.blocks[i].state()):
        text += (
            ": the gradients add up to those of the batch, but batch-norm statistics are those of each micro-batch, so "
            "results differ from a training with more memory"
        )
    else:
        text += ": the gradients add up to those of the batch"
    if thresholds.batch is not None and thresholds.batch > (plan.budget_bytes or 0):
        text += f"; from {size_up(thresholds.batch)} on the batch stays whole"
    return text


def _cache(manifest: Manifest, request: PlanRequest, disk_free_bytes: int) -> dict[str, Any]:
    """Disk for cached outputs of frozen blocks, two of them at a time, and what `--cache auto` takes on this disk."""
    elements = 2 * request.samples * max(math.prod(b.forward.outputs[0].resolve(1)) for b in manifest.blocks)
    precision = "off" if request.augment else cache_precision(manifest, request.samples, disk_free_bytes)
    return {
        "float32_bytes": 4 * elements,
        "float16_bytes": 2 * elements,
        "disk_free_bytes": disk_free_bytes,
        "auto": precision,
        "augmented": request.augment,
    }


def _load_training() -> None:
    """Make this process what `train` is when it opens its bundle: what is loaded later takes other memory."""
    for name in TRAINING_MODULES:
        import_module(f"edgelocal.{name}")
    start()


def _device_needs(request: PlanRequest, profile: Profile | None) -> DeviceNeeds | None:
    """What plans must know of the GPU: of the one in this machine, or as assumed of the profile's."""
    if request.device == "cpu":
        return None
    if profile is None:
        device = open_device(DeviceRequest(request.device), bounded=True)
        return None if device is None else device.needs
    if not profile.cuda_context_bytes:
        raise UsageError(f"{profile.name} has no GPU that CUDA knows: plan for its CPU, or choose another --profile")
    most = None if profile.shared_memory else profile.device_usable_bytes
    host = None if profile.shared_memory else profile.usable_bytes
    return DeviceNeeds(profile.cuda_context_bytes, most, WORKSPACE_BYTES, HANDLES_BYTES, profile.shared_memory, host)


def _idle_bytes(bundle: Bundle, profile: Profile | None, device: DeviceNeeds | None) -> tuple[int, int]:
    """Memory of the process before a training: of this one, or as it was measured elsewhere; and what another start
    may have more."""
    context = 0 if device is None else device.context
    if profile is not None:
        return idle_process_bytes((bundle.folder / MANIFEST).stat().st_size) + context, 0
    verify(bundle)  # as `train` does: a process that has read large files once is larger
    give_back()
    return idle_range(rss_bytes() + context)


def _state_bytes(spec: BlockSpec) -> int:
    return sum(tensor_bytes(t) for t in spec.state())
