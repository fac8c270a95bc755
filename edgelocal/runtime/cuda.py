"""The CUDA provider: its first use, its settings, and one arena for all graphs.

Settings follow from the source of ONNX Runtime 1.25 (core/providers/cuda). With cuDNN 9 a convolution is not timed:
HEURISTIC and EXHAUSTIVE choose between two lists of plans, and the workspace of a plan comes out of the arena. NHWC
convolutions run on the CPU where weights are inputs, as they are here. One stream for a session, not one for each of
its runs: each brings handles of cuBLAS and cuDNN, with memory of their own outside of the arena. Every session has some
all the same.
"""

from __future__ import annotations

import os
from functools import partial

import numpy as np

from edgelocal.machine.budget import rss_bytes
from edgelocal.machine.device import describe
from edgelocal.machine.gpu_libraries import LibraryError
from edgelocal.machine.gpu_memory import Meter, gpu_meter
from edgelocal.machine.packages import release
from edgelocal.memory.needs import DeviceNeeds
from edgelocal.runtime.accelerator import HANDLES_BYTES, WORKSPACE_BYTES, Accelerator
from edgelocal.runtime.arena import session_options
from edgelocal.runtime.cuda_host import gpu_name, pinned
from edgelocal.runtime.cuda_setup import LEFT_OUT, PROVIDER, explained, load_libraries
from edgelocal.runtime.library import runtime
from edgelocal.runtime.provider import Provider
from edgelocal.runtime.tensor import Place
from edgelocal.runtime.tiny import tiny_model

NAME = PROVIDER
_SAME_AS_REQUESTED = 1  # of the arena's strategies: a region is as large as what did not fit, and can be given back
_FIRST_WITH_ONE_ARENA = (1, 23)  # before, tensors come from an arena of their own that grows by powers of two
_SPLIT_FROM = 256  # bytes of a rest that are worth a chunk of their own
_SMALL_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:1"  # KiB and pieces, for every handle: Hopper's default is 32 MiB


def open_cuda(*, tf32: bool = False, may_fall_back: bool = False, bounded: bool = False) -> Accelerator:
    """The first GPU, ready to work: its context is made and its libraries are loaded. `bounded`: memory matters more
    than time.

    Raises:
        RuntimeMissingError: the runtime that is installed has no CUDA, its libraries are missing, or there is no GPU.
    """
    os.environ.setdefault(*_SMALL_WORKSPACE)
    load_cuda()
    meter = _meter()  # before there is a context, so that it is counted
    warm_up(tf32=tf32)
    if isinstance(meter, LibraryError):
        raise meter
    shared = meter.shared
    context = meter.used_bytes()
    most = None if shared else context + meter.free_bytes()
    return Accelerator(
        name="cuda",
        model=gpu_name(),
        tf32=tf32,
        meter=meter,
        needs=DeviceNeeds(context, most, WORKSPACE_BYTES, HANDLES_BYTES, shared, None if shared else host_bytes()),
        prepare=partial(cuda_provider, tf32=tf32, may_fall_back=may_fall_back, bounded=bounded),
        waiting=pinned,
    )


def host_bytes() -> int:
    """What this process may take of the host's memory: what it holds, and what there is to have."""
    return rss_bytes() + describe().effective_bytes


def load_cuda() -> None:
    """Find the libraries of CUDA.

    Raises:
        RuntimeMissingError: the runtime that is installed has no CUDA provider.
    """
    load_libraries(runtime())


def warm_up(*, tf32: bool) -> None:
    """Run a convolution and a matrix product, outside of the arena that is shared, so that what the libraries load at
    their first use is there.

    Raises:
        RuntimeMissingError: CUDA cannot run them here; says what is missing.
        OverBudgetError: the device has no memory for them.
    """
    nodes = [("Conv", ("x", "w"), "y"), ("MatMul", ("y", "y"), "z")]
    model = tiny_model(nodes, {"x": (1, 1, 8, 8), "w": (1, 1, 3, 3)}, ("z", (1, 1, 6, 6)))
    ort = runtime()
    options = session_options(1, shared=False)
    try:
        session = ort.InferenceSession(
            model, options, providers=[(NAME, settings(None, tf32=tf32, bounded=True))], enable_fallback=0
        )
        there = NAME in session.get_providers()
        session.run(None, {"x": np.ones((1, 1, 8, 8), np.float32), "w": np.ones((1, 1, 3, 3), np.float32)})
    except Exception as error:
        raise explained(str(error), ort) from error
    if not there:
        raise explained(LEFT_OUT, ort)


def cuda_provider(
    limit_bytes: int | None = None, *, tf32: bool = False, may_fall_back: bool = False, bounded: bool = False
) -> Provider:
    """The CUDA provider with an arena of at most `limit_bytes` (None: what the device has), once in a process; its
    libraries are loaded."""
    _share_arena(limit_bytes)
    return Provider(
        name=NAME,
        place=Place("cuda"),
        options=settings(limit_bytes, tf32=tf32, bounded=bounded),
        arena="gpu:0",
        fixed_batch=True,
        may_fall_back=may_fall_back,
        one_arena=release(runtime().__version__) >= _FIRST_WITH_ONE_ARENA,
    )


def settings(limit_bytes: int | None, *, tf32: bool, bounded: bool) -> dict[str, str]:
    """The options of the provider. cuDNN chooses its plans by a quick list where memory is `bounded`, with cuDNN 8 also
    in little workspace; else by the better one, which cuDNN 8 finds by trying all."""
    found = {
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC" if bounded else "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": str(int(not bounded)),
        "use_tf32": str(int(tf32)),
        "prefer_nhwc": "0",
        "use_ep_level_unified_stream": "1",
    }
    return found if limit_bytes is None else {**found, "gpu_mem_limit": str(limit_bytes)}


_arena_limits: list[int] = []  # of this process's arena, once it has one


def _share_arena(limit_bytes: int | None) -> None:
    """One arena for all sessions and tensors; later calls change nothing."""
    if _arena_limits:
        return
    ort = runtime()
    place = ort.OrtMemoryInfo("Cuda", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    arena = {
        "max_mem": limit_bytes or 0,
        "arena_extend_strategy": _SAME_AS_REQUESTED,
        "max_dead_bytes_per_chunk": _SPLIT_FROM,
    }
    ort.create_and_register_allocator_v2(NAME, place, {}, ort.OrtArenaCfg(arena))
    _arena_limits.append(limit_bytes or 0)


def _meter() -> Meter | LibraryError:
    """A meter, or why there is none: the runtime's own words about the same are better, and come later."""
    try:
        return gpu_meter()
    except LibraryError as error:
        return error
