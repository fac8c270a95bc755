"""The CUDA libraries are loaded through the runtime; and where CUDA does not work, that is explained by what the doctor
finds.

Seen of onnxruntime-gpu 1.31.1: where a library is missing, it writes to stderr, makes the session on the CPU, and
raises nothing, also with `enable_fallback=0`; only `get_providers()` tells. Where the libraries are there and the
device is not (stand-ins that answer "no device"), the session raises. A GPU that the build has no code for shows with
the first kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgelocal.errors import OverBudgetError, RuntimeMissingError
from edgelocal.machine.cuda_doctor import Cuda, cuda_advice, cuda_hints, cuda_problems, missing_text
from edgelocal.machine.cuda_libraries import SYSTEM, CudaSetup, preload_folders, read_cuda
from edgelocal.machine.device import DeviceInfo, describe
from edgelocal.machine.doctor import installed_runtimes
from edgelocal.machine.gpu import read_gpu
from edgelocal.machine.gpu_libraries import CudaRuntime, LibraryError, Load

PROVIDER = "CUDAExecutionProvider"
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_FAILURE = re.compile(r"CUDA (?:failure|error) ?([0-9]*):? ?([^;]*)")
LEFT_OUT = "the runtime could not load its CUDA provider and would go on with the CPU"


def look() -> tuple[DeviceInfo, Cuda]:
    """This machine, and what it has of CUDA."""
    info = describe()
    return info, Cuda(read_gpu(), read_cuda(machine=info.machine))


def load_libraries(ort: Any, machine: Callable[[], tuple[DeviceInfo, Cuda]] = look) -> None:
    """Load the CUDA libraries from where they are.

    Raises:
        RuntimeMissingError: the runtime has no CUDA provider; says what to install.
    """
    info, cuda = machine()
    if PROVIDER not in ort.get_available_providers():
        advice = cuda_advice(info, installed_runtimes())
        raise RuntimeMissingError(f"the ONNX Runtime that is installed has no {PROVIDER}: {advice}")
    preload(ort, cuda.setup)


def preload(ort: Any, setup: CudaSetup) -> str:
    """Load the libraries from where they were found; gives back what the runtime printed about it.

    Runtimes before 1.21 cannot (nor do they need it where the system's loader knows CUDA, as on a Jetson).
    """
    printed = io.StringIO()
    if hasattr(ort, "preload_dlls"):
        folders = preload_folders(setup.libraries)
        with contextlib.redirect_stdout(printed):  # it prints what it misses, and stdout is for answers
            for folder in folders["cuda"]:
                ort.preload_dlls(cuda=True, cudnn=False, directory=folder)
            for folder in folders["cudnn"]:
                ort.preload_dlls(cuda=False, cudnn=True, directory=folder)
    return printed.getvalue()


def explained(
    reason: str, ort: Any, machine: Callable[[], tuple[DeviceInfo, Cuda]] = look, load: Load = ctypes.CDLL
) -> RuntimeMissingError | OverBudgetError:
    """Why CUDA cannot be used: what the runtime raised or did, with what the doctor finds on this machine."""
    info, cuda = machine()
    if cuda.gpu.capability is None:
        cuda = replace(cuda, gpu=replace(cuda.gpu, capability=_capability(load)))
    reason = " ".join(reason.split())
    found = _FAILURE.search(reason)
    short = f"CUDA failure {found[1]}: {found[2].strip()}" if found else reason[:300]
    if found and found[1] == str(_OUT_OF_MEMORY):
        return OverBudgetError(f"the GPU has no memory for a CUDA context ({short}); stop other programs on it")
    runtimes = installed_runtimes()
    found_here = (*cuda_hints(info, runtimes), *cuda_problems(info, runtimes, cuda))
    problems = [f"{problem.found} -> {problem.remedy}" for problem in found_here]
    hidden = _hidden_folders(cuda.setup)
    if hidden and not hasattr(ort, "preload_dlls"):
        problems.append(f"this runtime loads what the system's loader knows: export LD_LIBRARY_PATH={':'.join(hidden)}")
    if not problems:
        missing = missing_text(cuda.setup)
        problems = [missing or "see `edgelocal doctor`, `nvidia-smi`, and what the runtime wrote above"]
    return RuntimeMissingError(f"CUDA cannot be used ({short}): {'; '.join(problems)}; or train with --device cpu")


def _capability(load: Load) -> int | None:
    """As CUDA says, which the doctor does not ask: to load its library would come before the runtime's preload."""
    try:
        return CudaRuntime(load).capability()
    except LibraryError:
        return None


def _hidden_folders(setup: CudaSetup) -> list[str]:
    """Where libraries were found that the system's loader does not know."""
    firsts = [dict(library.places) for library in setup.libraries if library.needed and library.places]
    paths = [next(iter(places.values())) for places in firsts if SYSTEM not in places]
    return list(dict.fromkeys(str(Path(path).parent) for path in paths))
