"""Devices one may plan for without having them at hand.

Memory, cores and names are the vendors': NVIDIA's data sheets of the Jetson Orin and Thor modules (LPDDR5 and LPDDR5X
that CPU and GPU share; Arm Cortex-A78AE, and Neoverse-V3AE in Thor) and Raspberry Pi's product briefs (Zero 2 W:
Cortex-A53, 4: Cortex-A72, 5: Cortex-A76, four cores each; their GPU, which nothing here uses, takes from the same
memory). A gateway is no product: four or two Arm cores behind a small memory.

`usable_percent` is an assumption of ours, on the careful side: what is left of the memory after the firmware's
carve-outs and a system without a desktop. It is less for small memories, because a system takes about the same of all.
On the device itself `edgelocal doctor` says what is free.

A PC with a CUDA GPU is no product either: a size of graphics memory that many cards have, in a machine that fits it.

`cuda_context_bytes` is an assumption too, never measured on any of them: what CUDA's context, code and libraries take
before the first tensor. NVIDIA publishes no figure. On PCs some hundred MiB are reported; of a Jetson (Xavier NX, with
older, eagerly loaded libraries) 1.4 GiB more than on the CPU (issue 14038 of ONNX Runtime). There it comes out of the
memory of all. A training measures its own.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from typing import Any

from edgelocal.errors import UsageError

_MIB, _GIB = 1 << 20, 1 << 30

# Resident memory of `train` before it opens a bundle, measured with Python 3.11, numpy 2.4.6 and onnxruntime 1.31.1 on
# x86-64 (66.3 MiB), and what a parsed manifest takes for each of its bytes (8.3 at 0.6 MB, 7.9 at 2.2 MB).
_BARE_BYTES, _MANIFEST_FACTOR = 67 * _MIB, 9

_PC_CONTEXT, _JETSON_CONTEXT = 512 * _MIB, 1 * _GIB

ASSUMED_SAMPLES = 50_000  # to train on, where nothing is known of the data


def idle_process_bytes(manifest_bytes: int) -> int:
    """Resident memory of a training's process before it plans, on a device that is not at hand."""
    return _BARE_BYTES + _MANIFEST_FACTOR * manifest_bytes


@dataclass(frozen=True)
class Profile:
    """A device. `shared_memory` says whether its GPU works in `ram_bytes`; `device_memory_bytes` is what a GPU has of
    its own; `cuda_context_bytes` is what CUDA itself is assumed to take of either, 0 where there is no CUDA. `machine`
    is aarch64 or x86_64."""

    name: str
    model: str
    ram_bytes: int
    usable_percent: int
    cores: int
    machine: str = "aarch64"
    shared_memory: bool = True
    device_memory_bytes: int = 0
    cuda_context_bytes: int = 0

    @property
    def cuda(self) -> bool:
        """Whether it has a GPU that `--device cuda` is for."""
        return self.cuda_context_bytes > 0

    @property
    def device_usable_bytes(self) -> int:
        """Memory that a training can have on the GPU, CUDA's context included; where it is shared, with the CPU."""
        if not self.cuda:
            return 0
        return self.usable_bytes if self.shared_memory else self.device_memory_bytes * self.usable_percent // 100

    @property
    def usable_bytes(self) -> int:
        """Memory that a training can have."""
        return self.ram_bytes * self.usable_percent // 100

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        usable = {"usable_bytes": self.usable_bytes, "device_usable_bytes": self.device_usable_bytes}
        return {**asdict(self), **usable}


def _jetson(name: str, model: str, ram_gib: int, usable_percent: int, cores: int) -> Profile:
    ram = ram_gib * _GIB
    return Profile(
        f"jetson-{name}", f"NVIDIA Jetson {model}", ram, usable_percent, cores, cuda_context_bytes=_JETSON_CONTEXT
    )


def _pc(gpu_gib: int, ram_gib: int, cores: int) -> Profile:
    return Profile(
        f"cuda-{gpu_gib}gb",
        f"PC with an NVIDIA GPU of {gpu_gib} GB",
        ram_gib * _GIB,
        90,
        cores,
        machine="x86_64",
        shared_memory=False,
        device_memory_bytes=gpu_gib * _GIB,
        cuda_context_bytes=_PC_CONTEXT,
    )


PROFILES = (
    _jetson("orin-nano-4gb", "Orin Nano 4GB", 4, 70, 6),
    _jetson("orin-nano-8gb", "Orin Nano 8GB", 8, 80, 6),
    _jetson("orin-nx-8gb", "Orin NX 8GB", 8, 80, 6),
    _jetson("orin-nx-16gb", "Orin NX 16GB", 16, 85, 8),
    _jetson("agx-orin-32gb", "AGX Orin 32GB", 32, 88, 8),
    _jetson("agx-orin-64gb", "AGX Orin 64GB", 64, 90, 12),
    _jetson("thor", "T5000 (Thor)", 128, 90, 14),
    Profile("raspberry-pi-4-2gb", "Raspberry Pi 4 Model B 2GB", 2 * _GIB, 80, 4),
    Profile("raspberry-pi-4-4gb", "Raspberry Pi 4 Model B 4GB", 4 * _GIB, 85, 4),
    Profile("raspberry-pi-4-8gb", "Raspberry Pi 4 Model B 8GB", 8 * _GIB, 90, 4),
    Profile("raspberry-pi-5-2gb", "Raspberry Pi 5 2GB", 2 * _GIB, 80, 4),
    Profile("raspberry-pi-5-4gb", "Raspberry Pi 5 4GB", 4 * _GIB, 85, 4),
    Profile("raspberry-pi-5-8gb", "Raspberry Pi 5 8GB", 8 * _GIB, 90, 4),
    Profile("raspberry-pi-5-16gb", "Raspberry Pi 5 16GB", 16 * _GIB, 92, 4),
    Profile("raspberry-pi-zero-2w", "Raspberry Pi Zero 2 W", 512 * _MIB, 55, 4),
    Profile("gateway-1gb", "gateway with 1 GB", 1 * _GIB, 70, 4, shared_memory=False),
    Profile("gateway-512mb", "gateway with 512 MB", 512 * _MIB, 60, 2, shared_memory=False),
    _pc(8, 16, 8),
    _pc(24, 32, 8),
)


def find_profile(name: str) -> Profile:
    """The profile of this name, upper or lower case.

    Raises:
        UsageError: there is none; the message has the names, and the one most like it.
    """
    known = {profile.name: profile for profile in PROFILES}
    wanted = name.strip().lower()
    if wanted not in known:
        close = difflib.get_close_matches(wanted, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(f"there is no device profile {name!r}{hint}; choose one of {', '.join(known)}")
    return known[wanted]
