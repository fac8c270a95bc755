"""The CUDA provider: its libraries, its settings, one arena for all graphs, and the device's memory as the driver
counts it.

Settings follow from the source of ONNX Runtime 1.25 (core/providers/cuda). With cuDNN 9 a convolution is not timed:
HEURISTIC and EXHAUSTIVE choose between two lists of plans, and the workspace of a plan comes out of the arena. NHWC
convolutions run on the CPU where weights are inputs, as they are here. One stream for all sessions: each stream would
bring handles of cuBLAS and cuDNN of its own, which lie outside of the arena.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgelocal.errors import RuntimeMissingError
from edgelocal.machine.device import describe
from edgelocal.machine.doctor import advice
from edgelocal.runtime.library import runtime
from edgelocal.runtime.provider import Provider
from edgelocal.runtime.tensor import Place

NAME = "CUDAExecutionProvider"
_SAME_AS_REQUESTED = 1  # of the arena's strategies: a region is as large as what did not fit, and can be given back
_SPLIT_FROM = 256  # bytes of a rest that are worth a chunk of their own
_RUNTIMES = ("libcudart.so.13", "libcudart.so.12")


def cuda_provider(limit_bytes: int | None = None, *, tf32: bool = False, may_fall_back: bool = False) -> Provider:
    """The CUDA provider with an arena of at most `limit_bytes` (None: what the device has).

    Raises:
        RuntimeMissingError: the runtime that is installed has none, or its libraries are missing.
    """
    ort = runtime()
    if NAME not in ort.get_available_providers():
        raise RuntimeMissingError(f"the ONNX Runtime that is installed has no {NAME}: {advice(describe())}")
    if hasattr(ort, "preload_dlls"):  # from 1.21 on; before, the system has to find CUDA
        ort.preload_dlls(directory="")
    _share_arena(ort, limit_bytes)
    return Provider(
        name=NAME,
        place=Place("cuda"),
        options=settings(limit_bytes, tf32=tf32),
        arena="gpu:0",
        fixed_batch=True,
        may_fall_back=may_fall_back,
    )


def settings(limit_bytes: int | None, *, tf32: bool) -> dict[str, str]:
    """The options of the provider."""
    found = {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": str(int(tf32)),
        "prefer_nhwc": "0",
        "use_ep_level_unified_stream": "1",
    }
    return found if limit_bytes is None else {**found, "gpu_mem_limit": str(limit_bytes)}


def _share_arena(ort: Any, limit_bytes: int | None) -> None:
    """One arena for all sessions and tensors."""
    place = ort.OrtMemoryInfo("Cuda", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    arena = {
        "max_mem": limit_bytes or 0,
        "arena_extend_strategy": _SAME_AS_REQUESTED,
        "max_dead_bytes_per_chunk": _SPLIT_FROM,
    }
    ort.create_and_register_allocator_v2(NAME, place, {}, ort.OrtArenaCfg(arena))


@dataclass(frozen=True)
class DeviceMemory:
    """Of the device, all processes together, in bytes."""

    free: int
    total: int


def device_memory(load: Callable[[str], Any] = ctypes.CDLL) -> DeviceMemory:
    """What the CUDA runtime says (cudaMemGetInfo); makes the process's context if there is none yet.

    Raises:
        RuntimeMissingError: no CUDA runtime can be loaded, or it has no device.
    """
    library = _cuda_runtime(load)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    code = library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    if code != 0:
        raise RuntimeMissingError(f"CUDA does not tell the device's memory (error {code}): check `nvidia-smi`")
    return DeviceMemory(free.value, total.value)


def _cuda_runtime(load: Callable[[str], Any]) -> Any:
    for name in _RUNTIMES:
        try:
            return load(name)
        except OSError:
            continue
    raise RuntimeMissingError(f"none of {', '.join(_RUNTIMES)} can be loaded: {advice(describe())}")
