"""What is installed on which machine, what is wrong with it, and what to type.

Versions come from the metadata of installed distributions: nothing is imported, so a broken runtime can be examined.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from edgelocal.machine.budget import format_size
from edgelocal.machine.cuda_doctor import Cuda, cuda_command, cuda_problems, no_cuda_wheel
from edgelocal.machine.device import DeviceInfo
from edgelocal.machine.packages import (
    JETSON,
    ORIN,
    THOR,
    accelerator,
    oldest_runtime,
    package,
    python_of,
    release,
)
from edgelocal.machine.problem import Problem

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

# Those among RUNTIMES that can do what another cannot: the training build's operators; the NVIDIA GPU.
TRAINING_BUILDS = ("onnxruntime-training", "onnxruntime-training-cpu")
GPU_BUILDS = ("onnxruntime-training", "onnxruntime-gpu")

FIRST_RUNTIME_FOR_NUMPY_2 = (1, 19)
LITTLE_MEMORY_BYTES = 256 << 20

_UNKNOWN = (
    'pip install "onnxruntime>=1.17" (there may be no ready wheel for {machine} with {system} and Python {python}: '
    "if pip finds none, build ONNX Runtime from source)"
)
_CPU_ONLY = "this trains on the CPU"


@dataclass(frozen=True)
class Report:
    """Machine, versions by distribution name, the runtimes among them, what to install here, and what is wrong.

    `training_build` is whether the one runtime that is installed can `train --runtime ort-training`; `training` says
    so, or what to type for it, or that there is none for this machine and Python. `cuda`: the GPU, and what the runtime
    finds of CUDA; None where that was not looked at.
    """

    device: DeviceInfo
    packages: dict[str, str]
    runtimes: dict[str, str]
    advice: str
    training_build: bool
    training: str
    problems: tuple[Problem, ...]
    cuda: Cuda | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        values = dataclasses.asdict(self)
        values["device"]["effective_bytes"] = self.device.effective_bytes
        values["problems"] = list(values["problems"])
        if self.cuda is not None:
            values["cuda"]["setup"]["missing"] = self.cuda.setup.missing
        return values


def examine(info: DeviceInfo, packages: Mapping[str, str], cuda: Cuda | None = None) -> Report:
    """Pure: machine, installed versions and what was found of CUDA -> Report."""
    runtimes = {name: packages[name] for name in RUNTIMES if name in packages}
    kept = {_kept_runtime(info, runtimes): runtimes[_kept_runtime(info, runtimes)]} if runtimes else {}
    problems = (
        *_number_problems(info, runtimes),
        *_age_problems(info, kept),
        *_numpy_problems(info, packages.get("numpy", "0"), kept),
        *(cuda_problems(info, runtimes, cuda) if cuda is not None else ()),
        *_memory_problems(info),
    )
    build = len(runtimes) == 1 and next(iter(runtimes)) in TRAINING_BUILDS
    return Report(info, dict(packages), runtimes, advice(info), build, _training(info, runtimes), problems, cuda)


def advice(info: DeviceInfo) -> str:
    """The command that installs a runtime on this machine, with what else to know."""
    row = package(info, "portable")
    if row is None:
        return _unknown(info)
    more = [row.remark] if row.remark else []
    if accelerator(info):
        more += [_CPU_ONLY, _gpu_advice(info)]
    return f"{row.command} ({'; '.join(more)})" if more else row.command


def _unknown(info: DeviceInfo) -> str:
    return _UNKNOWN.format(machine=info.machine, system=info.system, python="{}.{}".format(*python_of(info)))


def _gpu_advice(info: DeviceInfo) -> str:
    """What `--device cuda` needs. One environment holds one runtime: it takes the place of the CPU's, and does its work
    too."""
    command = cuda_command(info)
    return no_cuda_wheel(info) if command is None else f"for --device cuda, instead of it: {command}"


def _training(info: DeviceInfo, runtimes: Mapping[str, str]) -> str:
    """Whether `--runtime ort-training` can be used, or what to type for it."""
    builds = [name for name in TRAINING_BUILDS if name in runtimes]
    if builds and len(runtimes) == 1:
        return f"{builds[0]} {runtimes[builds[0]]} is a training build: --runtime ort-training can be used"
    row = package(info, "ort-training")
    if builds:
        return "a training build is installed, but beside another runtime: mend that first"
    if row is None:
        python = "{}.{}".format(*python_of(info))
        return (
            f"none for {info.machine} with {info.system} and Python {python}: ONNX Runtime's training build was made "
            "for x86-64 and Python up to 3.12; --runtime portable does not need it"
        )
    remove = f"pip uninstall -y {' '.join(runtimes)} && " if runtimes else ""
    return f"for --runtime ort-training: {remove}{row.command} ({row.remark}; it also does --runtime portable)"


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


def _number_problems(info: DeviceInfo, runtimes: Mapping[str, str]) -> Iterator[Problem]:
    if not runtimes:
        yield Problem("no ONNX Runtime is installed; training and evaluation need one", advice(info))
    if len(runtimes) > 1:
        found = f"{len(runtimes)} ONNX Runtimes share one module name: {_listed(runtimes)}; which one runs is chance"
        yield Problem(found, _keep_one(info, runtimes))


def _age_problems(info: DeviceInfo, runtimes: Mapping[str, str]) -> Iterator[Problem]:
    for name, version in runtimes.items():
        oldest = oldest_runtime(info.machine)
        if release(version) < oldest:
            first = "{}.{}".format(*oldest)
            yield Problem(f"{name} {version} is older than {first}", _newer(info, name, version, first))
        row = package(info, "portable")
        if row is not None and row.leaves_out(version):
            found = f"{name} {version} does not run on every {info.machine} machine (docs/devices.md)"
            yield Problem(found, f'pip install --upgrade "{name}{row.for_installed}"')


def _keep_one(info: DeviceInfo, runtimes: Mapping[str, str]) -> str:
    """They overwrote each other's files: all go, and the one that can do most here comes anew."""
    kept = _kept_runtime(info, runtimes)
    version = runtimes[kept]
    remove = f"pip uninstall -y {' '.join(runtimes)}"
    if not _on_pypi(info, kept, version):
        return f"{remove}, then install the wheel of {kept} {version} again from where it came: PyPI does not have it"
    return f"{remove} && pip install {kept}=={version}"


def _kept_runtime(info: DeviceInfo, runtimes: Mapping[str, str]) -> str:
    """The first of RUNTIMES; one that is too old, or is for a GPU that is not here, only where there is no other."""

    def drawbacks(name: str) -> tuple[bool, bool]:
        return release(runtimes[name]) < oldest_runtime(info.machine), name in GPU_BUILDS and not accelerator(info)

    return min((name for name in RUNTIMES if name in runtimes), key=drawbacks)


def _on_pypi(info: DeviceInfo, name: str, version: str) -> bool:
    """Whether pip finds this build by its version; builds of others have local versions, or the same as PyPI's."""
    foreign = "+" in version or name == "ort-nightly"
    return not foreign and not (name in GPU_BUILDS and accelerator(info) in (ORIN, THOR, JETSON))


def _newer(info: DeviceInfo, name: str, version: str, oldest: str) -> str:
    if not _on_pypi(info, name, version):
        return f"install a wheel of {name} {oldest} or later from where this one came"
    row = package(info, "portable")
    above = row.for_installed if row is not None and f">={oldest}" in row.versions.split(",") else f">={oldest}"
    return f'pip install --upgrade "{name}{above}"'


def _numpy_problems(info: DeviceInfo, numpy: str, runtimes: Mapping[str, str]) -> Iterator[Problem]:
    for name, version in runtimes.items():
        if release(numpy) >= (2, 0) and release(version) < FIRST_RUNTIME_FOR_NUMPY_2:
            yield Problem(
                f"{name} {version} was built for numpy 1 and fails with numpy {numpy}",
                f'{_newer(info, name, version, "1.19")}, or pip install "numpy<2"',
            )


def _memory_problems(info: DeviceInfo) -> Iterator[Problem]:
    if info.effective_bytes < LITTLE_MEMORY_BYTES:
        yield Problem(
            f"{format_size(info.effective_bytes)} of memory can be used, little for a runtime and a block",
            "stop other programs or raise the container's limit; export with more blocks and a smaller --batch",
        )


def _listed(runtimes: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in runtimes.items())
