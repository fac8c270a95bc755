"""What is wrong with CUDA on a machine, and what to type: pure, from what was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edgelocal.machine.cuda_libraries import DRIVER, CudaSetup
from edgelocal.machine.device import DeviceInfo
from edgelocal.machine.elf import GpuCode
from edgelocal.machine.gpu import Gpu
from edgelocal.machine.packages import (
    FIRST_DRIVER,
    JETSON,
    ORIN,
    PYPI,
    THOR,
    accelerator,
    package,
    python_of,
    release,
)
from edgelocal.machine.problem import Problem

FIRST_WITH_PRELOAD = (1, 21)  # whose [cuda,cudnn] brings the libraries, and whose preload_dlls() finds them
_OLDER = 'pip install "onnxruntime-gpu[cuda,cudnn]>=1.23.2,<1.27"'

_NO_DRIVER = "install NVIDIA's driver, or start the container with the GPU (docker run --gpus all)"


@dataclass(frozen=True)
class Cuda:
    """The GPU, and what the installed runtime wants and finds of CUDA."""

    gpu: Gpu
    setup: CudaSetup


def cuda_command(info: DeviceInfo) -> str | None:
    """What installs the runtime for `train --device cuda` here, with what else to know; None: no wheel is known."""
    row = package(info, "cuda")
    if row is None:
        return None
    source = "" if row.source == PYPI else f", the file from {row.source}"
    return f"{row.command}{source} ({row.remark})"


def no_cuda_wheel(info: DeviceInfo) -> str:
    """Said where `cuda_command` is None."""
    return "no onnxruntime-gpu wheel is known for this GPU and Python {}.{}".format(*python_of(info))


def cuda_advice(info: DeviceInfo, runtimes: Mapping[str, str]) -> str:
    """What to type for `train --device cuda`, given the runtimes that are installed."""
    if not accelerator(info):
        return f"no NVIDIA GPU is seen here: {_NO_DRIVER}, or use --device cpu"
    command = cuda_command(info)
    if command is None:
        return f"{no_cuda_wheel(info)}; use --device cpu"
    remove = f"pip uninstall -y {' '.join(runtimes)} && " if runtimes else ""
    return f"{remove}{command}"


def cuda_problems(info: DeviceInfo, runtimes: Mapping[str, str], cuda: Cuda) -> Iterator[Problem]:
    """What keeps the one runtime that is installed from training on the GPU; nothing where nobody asked for one."""
    if len(runtimes) != 1:
        return  # none, or several that overwrote each other: the first thing to mend
    [(name, version)] = runtimes.items()
    if name == "onnxruntime" and accelerator(info) and package(info, "cuda") is not None:
        found = f"there is an NVIDIA GPU, and {name} {version} is for the CPU only"
        yield Problem(found, f"to train with --device cuda: {cuda_advice(info, runtimes)}; --device cpu works as it is")
    if name != "onnxruntime-gpu":
        return
    runtime = f"{name} {version}"
    if not accelerator(info):
        yield Problem(
            f"{runtime} is for an NVIDIA GPU, and none is seen here",
            f"{_NO_DRIVER}; training on the CPU works with it",
        )
    elif not cuda.setup.provider:
        yield Problem(f"{runtime} has no CUDA provider", cuda_advice(info, runtimes))
    else:
        yield from _library_problems(info, runtime, version, cuda.setup)
        yield from _driver_problems(info, runtime, cuda)
        yield from _code_problems(runtime, cuda)


def missing_text(setup: CudaSetup) -> str:
    """ "CUDA 13 libraries that were not found: libcublas.so.13", or "" where all were."""
    version = "CUDA" if setup.major is None else f"CUDA {setup.major}"
    return f"{version} libraries that were not found: {', '.join(setup.missing)}" if setup.missing else ""


def libraries_remedy(info: DeviceInfo, version: str) -> str:
    """What brings the libraries that a runtime of this version wants."""
    if accelerator(info) in (ORIN, THOR, JETSON):
        return "JetPack brings them: sudo apt install nvidia-jetpack (in a container: use one of NVIDIA's with CUDA)"
    if release(version) < FIRST_WITH_PRELOAD:
        return f"a newer one brings them: {cuda_command(info) or no_cuda_wheel(info)}"
    return f'pip install "onnxruntime-gpu[cuda,cudnn]=={version}"'


def _library_problems(info: DeviceInfo, runtime: str, version: str, setup: CudaSetup) -> Iterator[Problem]:
    missing = [name for name in setup.missing if name != DRIVER]
    if missing:
        wanted = "" if setup.major is None else f" of CUDA {setup.major}"
        found = f"{runtime} does not find these libraries{wanted}: {', '.join(missing)}"
        yield Problem(found, libraries_remedy(info, version))
    if DRIVER in setup.missing:
        yield Problem(
            f"NVIDIA's driver library {DRIVER} is not found",
            _NO_DRIVER,
        )


def _driver_problems(info: DeviceInfo, runtime: str, cuda: Cuda) -> Iterator[Problem]:
    have, first = cuda.gpu.driver_release, FIRST_DRIVER.get(cuda.setup.major or 0)
    if have is not None and first is not None and have < first:
        older = f", or {_OLDER} for CUDA 12" if cuda.setup.major == 13 and info.machine == "x86_64" else ""
        yield Problem(
            f"{runtime} is for CUDA {cuda.setup.major}, which wants a driver of release {first} or later; this is "
            f"{cuda.gpu.driver}",
            f"update NVIDIA's driver{older}",
        )


def _code_problems(runtime: str, cuda: Cuda) -> Iterator[Problem]:
    code, capability = cuda.setup.code, cuda.gpu.capability
    if code is None or capability is None or not (code.sass or code.ptx) or code.runs_on(capability):
        return
    yield Problem(
        f"{runtime} has no code for this GPU of compute capability {dotted(capability)}, only for {capabilities(code)}",
        "install a build for this GPU (docs/devices.md), or use --device cpu",
    )


def capabilities(code: GpuCode) -> str:
    """ "7.5, 8.0 and PTX 9.0": machine code, and what the driver can compile for later GPUs."""
    machine_code = ", ".join(dotted(number) for number in code.sass)
    ptx = ", ".join(dotted(number) for number in code.ptx)
    return " and ".join(text for text in (machine_code, f"PTX {ptx}" if ptx else "") if text)


def dotted(capability: int) -> str:
    """87 -> "8.7"."""
    return f"{capability // 10}.{capability % 10}"
