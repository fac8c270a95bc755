"""ONNX Runtime as it is installed here: the only module that imports it."""

from __future__ import annotations

import platform
import re
import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from edgelocal.errors import BundleError, EdgelocalError, OverBudgetError, RuntimeMissingError
from edgelocal.machine.device import describe
from edgelocal.machine.doctor import advice
from edgelocal.machine.packages import oldest_runtime, release

GRAPH_LEVEL = "none"
CPU_PROVIDER = "CPUExecutionProvider"
# What the CUDA provider says when it was loaded, and then lacks a library or code for the GPU.
_MISSING = ("cuDNN is not available", "cudaErrorNoKernelImageForDevice", "no kernel image is available")
OOM_ADVICE = "; use a smaller --batch or more blocks"  # ends the message where memory ran out


@dataclass(frozen=True)
class RuntimeInfo:
    """The runtime in use. Bits are the same for equal values of all of them."""

    version: str
    provider: str
    graph_level: str
    machine: str

    def as_dict(self) -> dict[str, str]:
        """Plain values for run.json."""
        return {
            "onnxruntime": self.version,
            "provider": self.provider,
            "graph_level": self.graph_level,
            "machine": self.machine,
        }


def runtime() -> ModuleType:
    """The onnxruntime module.

    Raises:
        RuntimeMissingError: none is installed, or one that is too old for this machine; the message says what to type.
        OverBudgetError: no memory to import it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 1.17 warns of newer interpreters when imported
            import onnxruntime
    except ImportError as error:
        if _is_out_of_memory(error):
            raise OverBudgetError(f"no memory to import ONNX Runtime ({error}){OOM_ADVICE}") from None
        raise RuntimeMissingError(f"no ONNX Runtime can be imported ({error}): {advice(describe())}") from None
    version: str = onnxruntime.__version__
    oldest = oldest_runtime(platform.machine())
    if release(version) < oldest:
        first = "{}.{}".format(*oldest)
        raise RuntimeMissingError(
            f"ONNX Runtime {version} is too old, {first} or later is needed: {advice(describe())}"
        )
    _keep_to_itself(onnxruntime)
    module: ModuleType = onnxruntime
    return module


@cache
def _keep_to_itself(module: ModuleType) -> None:
    """No data leaves the device: builds of the runtime that would report events are told not to."""
    module.disable_telemetry_events()


def has_training() -> bool:
    """Whether the runtime is a training build, which knows the operators of its own training artifacts."""
    return hasattr(runtime().capi._pybind_state, "CheckpointState")


def runtime_info() -> RuntimeInfo:
    """Version, provider and settings that the bits of a run depend on."""
    return RuntimeInfo(runtime().__version__, CPU_PROVIDER, GRAPH_LEVEL, platform.machine())


def translated(error: Exception, what: str) -> EdgelocalError:
    """What the runtime raised, as an error of ours; `what` says what was tried."""
    text = " ".join(str(error).split())
    if _is_out_of_memory(error):
        # The runtime's own words, without the places in its source that come before them.
        said = re.search(r"(Available memory of|Failed to allocate memory|std::bad_alloc|CU[A-Z]+ failure).*", text)
        return OverBudgetError(f"{what}: out of memory ({(said[0] if said else text)[:200]}){OOM_ADVICE}")
    if any(sign in text for sign in _MISSING):
        return RuntimeMissingError(f"{what}: {text[:500]}; `edgelocal doctor` says what is missing")
    return BundleError(f"{what}: {text[:500]}; export the bundle again")


def _is_out_of_memory(error: Exception) -> bool:
    """By what the runtime and the system's loader say."""
    signs = ("allocate memory", "bad_alloc", "smaller than requested", "CUDA failure 2: ", "STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
