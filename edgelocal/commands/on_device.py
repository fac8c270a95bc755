"""`--device`: which device a command works on, and what a report says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgelocal.bundle.targets import Device
from edgelocal.errors import UsageError
from edgelocal.runtime.accelerator import Accelerator
from edgelocal.runtime.provider import Provider
from edgelocal.training.trainer import Trainer


@dataclass(frozen=True)
class DeviceRequest:
    """What the command line asks for: "cpu" or "cuda", TF32 for products and convolutions, nodes on the CPU."""

    name: Device = "cpu"
    tf32: bool = False
    may_fall_back: bool = False

    def check(self) -> None:
        """That the options go together.

        Raises:
            UsageError: they do not.
        """
        for option, given in (("--tf32", self.tf32), ("--allow-cpu-fallback", self.may_fall_back)):
            if given and self.name == "cpu":
                raise UsageError(f"{option} is for GPUs: give --device cuda with it, or leave it out")


CPU_REQUEST = DeviceRequest()


def open_device(request: DeviceRequest, *, bounded: bool) -> Accelerator | None:
    """The device, ready to work; None for the CPU. `bounded`: there is a budget, so memory matters more than time.

    Raises:
        RuntimeMissingError: it cannot be used; the message says what to do.
    """
    if request.name == "cpu":
        return None
    from edgelocal.runtime.cuda import open_cuda

    return open_cuda(tf32=request.tf32, may_fall_back=request.may_fall_back, bounded=bounded)


def device_notes(device: Accelerator, provider: Provider) -> list[str]:
    """What ran on the CPU although a device was asked for, and what its memory's meter cannot see."""
    notes = []
    found = provider.strays
    if found:
        listed = ", ".join(f"{count} {name}" for name, count in found.most_common())
        notes.append(f"{found.total()} nodes ran on the CPU, as --allow-cpu-fallback permits: {listed}")
    if provider.may_fall_back and not provider.tells:
        notes.append("this runtime does not tell which nodes run on the CPU; onnxruntime-gpu 1.24.1 and later do")
    if not provider.one_arena:
        notes.append(
            "this runtime keeps tensors in an arena of their own, which grows by powers of two and counts as handles "
            "and code here: onnxruntime-gpu 1.23 and later do not"
        )
    if not device.meter.counts_context:
        notes.append("nothing here tells what CUDA's context takes of the device, so neither budget nor peak counts it")
    return notes


def device_report(device: Accelerator, trainer: Trainer) -> dict[str, Any]:
    """What was measured of the device's memory. The states are dropped for it: the training is over.

    What is freed when the arena is given back was the arena's; what stays above the context are handles and code of
    libraries.
    """
    provider = trainer.blocks[0].provider
    planned = trainer.plan.device if trainer.plan else None
    held = device.meter.used_bytes()
    trainer.drop_tensors()
    provider.give_back()
    kept = device.meter.used_bytes()
    arena = max(0, held - kept)
    peak = max(held, trainer.memory.device_peak_bytes)
    return {
        "name": device.name,
        "gpu": device.model,
        "shared_memory": device.needs.shared,
        "tf32": device.tf32,
        "measured_by": device.meter.source,
        "peak_bytes": peak,
        "context_bytes": device.needs.context if device.meter.counts_context else None,
        "arena_bytes": arena,
        "workspace_bytes": max(0, arena - planned.tensors) if planned else None,
        # Handles of graphs that were dropped before this was measured are in the peak.
        "outside_bytes": max(0, peak - device.needs.context - arena),
        "fallback_nodes": provider.strays.total() if provider.tells else None,
        "planned": None if planned is None else planned.as_dict(),
    }
