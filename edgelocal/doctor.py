"""What is installed on which machine, what is wrong with it, and what to type.

Versions come from the metadata of installed distributions: nothing is imported, so a broken runtime can be examined.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from edgelocal.budget import format_size
from edgelocal.device import DeviceInfo

# All bring the module `onnxruntime`, so only one may be installed. Special ones first: somebody chose them, while the
# plain one may have come along with another package.
RUNTIMES = (
    "onnxruntime-training",
    "onnxruntime-training-cpu",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-rocm",
    "ort-nightly",
    "onnxruntime",
)
PACKAGES = ("edgelocal", "numpy", "click", "rich", "pillow", "torch", "onnx", "safetensors", *RUNTIMES)

OLDEST_RUNTIME = (1, 17)
FIRST_RUNTIME_FOR_NUMPY_2 = (1, 19)
LITTLE_MEMORY_BYTES = 256 << 20

_INSTALL = "pip install onnxruntime"
# (machine, accelerator) -> what to add to the command.
_ADVICE = {
    ("x86_64", ""): "",
    ("x86_64", "cuda"): (
        "to train on the NVIDIA GPU, pip install onnxruntime-gpu instead: one runtime only, and its CUDA "
        "version must match the driver's"
    ),
    ("x86_64", "jetson"): "",
    ("aarch64", ""): "",
    ("aarch64", "cuda"): (
        "this trains on the CPU; for the NVIDIA GPU ask its vendor for an onnxruntime-gpu wheel for aarch64"
    ),
    ("aarch64", "jetson"): (
        "this trains on the CPU; wheels for the Jetson's GPU come with or for its JetPack version: ask NVIDIA's pages "
        "for that version, and install that wheel instead, never beside it"
    ),
}
_UNKNOWN = "there may be no ready wheel for {machine}: if pip finds none, build ONNX Runtime from source"


@dataclass(frozen=True)
class Problem:
    """What was found, and what to type or do about it."""

    found: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """Machine, versions by distribution name, the runtimes among them, what to install here, and what is wrong."""

    device: DeviceInfo
    packages: dict[str, str]
    runtimes: dict[str, str]
    advice: str
    problems: tuple[Problem, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        values = dataclasses.asdict(self)
        values["device"]["effective_bytes"] = self.device.effective_bytes
        values["problems"] = list(values["problems"])
        return values


def examine(info: DeviceInfo, packages: Mapping[str, str]) -> Report:
    """Pure: machine and installed versions -> Report."""
    runtimes = {name: packages[name] for name in RUNTIMES if name in packages}
    problems = (*_runtime_problems(info, runtimes), *_numpy_problems(packages, runtimes), *_memory_problems(info))
    return Report(info, dict(packages), runtimes, advice(info), problems)


def advice(info: DeviceInfo) -> str:
    """The command that installs a runtime on this machine, with what else to know."""
    accelerator = "jetson" if info.jetson else "cuda" if info.cuda else ""
    more = _ADVICE.get((info.machine, accelerator), _UNKNOWN.format(machine=info.machine))
    return f"{_INSTALL} ({more})" if more else _INSTALL


def installed_packages(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of those distributions among `names` that are installed here."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def installed_runtimes() -> dict[str, str]:
    """Versions of the installed ONNX Runtime distributions."""
    return installed_packages(RUNTIMES)


def _runtime_problems(info: DeviceInfo, runtimes: Mapping[str, str]) -> Iterator[Problem]:
    if not runtimes:
        yield Problem("no ONNX Runtime is installed; training and evaluation need one", advice(info))
    if len(runtimes) > 1:
        kept = _kept_runtime(info, runtimes)
        yield Problem(
            f"{len(runtimes)} ONNX Runtimes share one module name: {_listed(runtimes)}; which one runs is chance",
            f"pip uninstall -y {' '.join(runtimes)} && pip install {kept}=={runtimes[kept]}",
        )
    for name, version in runtimes.items():
        if _release(version) < OLDEST_RUNTIME:
            yield Problem(f"{name} {version} is older than 1.17", f'pip install --upgrade "{name}>=1.17"')


def _kept_runtime(info: DeviceInfo, runtimes: Mapping[str, str]) -> str:
    usable = [name for name in RUNTIMES if name in runtimes and (info.cuda or name != "onnxruntime-gpu")]
    return usable[0]


def _numpy_problems(packages: Mapping[str, str], runtimes: Mapping[str, str]) -> Iterator[Problem]:
    numpy = packages.get("numpy", "0")
    for name, version in runtimes.items():
        if _release(numpy) >= (2, 0) and _release(version) < FIRST_RUNTIME_FOR_NUMPY_2:
            yield Problem(
                f"{name} {version} was built for numpy 1 and fails with numpy {numpy}",
                f'pip install --upgrade "{name}>=1.19", or pip install "numpy<2"',
            )


def _memory_problems(info: DeviceInfo) -> Iterator[Problem]:
    if info.effective_bytes < LITTLE_MEMORY_BYTES:
        yield Problem(
            f"{format_size(info.effective_bytes)} of memory can be used, little for a runtime and a block",
            "stop other programs or raise the container's limit; export with more blocks and a smaller --batch",
        )


def _listed(runtimes: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in runtimes.items())


def _release(version: str) -> tuple[int, int]:
    """Major and minor number; (0, 0) for a version that does not begin with them."""
    match = re.match(r"([0-9]{1,9})\.([0-9]{1,9})", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
