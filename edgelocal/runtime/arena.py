"""The memory that graphs take while they run: one arena for all graphs of the process, of one region (see `reserve`).

Each run begins with an empty arena, so it lays out its values the same way each time, and the exporter could know the
peak (docs/decisions/0012). For this, nodes run in the order of the file, the runtime's own passes are off (they
reorder, and undo recomputation), no memory pattern (it doubles the peak from the second run on) and no list of dead
buffers is kept. No spinning: every graph has threads of its own, and those that wait must not take the cores from the
one that works. The model is read as ONNX, which was scanned, and never as the runtime's own format.
"""

from __future__ import annotations

import contextlib
import ctypes
from functools import cache
from typing import Any

import numpy as np

from edgelocal.runtime.library import CPU_PROVIDER, runtime, translated
from edgelocal.runtime.tiny import tiny_model

_MMAP_FROM = 1 << 20
_MALLOPT_TRIM, _MALLOPT_MMAP = -1, -3  # glibc's malloc.h
_LARGEST_REGION = (1 << 31) - 256  # the arena's settings are 32-bit integers
UNPLANNED = 1 << 20
_CONSTANTS = 1 << 20  # those of loaded graphs count as the arena's memory, and lie outside of its regions


@cache
def start() -> None:
    """Load the runtime and make memory come and go in whole pieces: the process is idle when this returns.

    The system's allocator gives large pieces back as soon as they are freed, where it can be told to (glibc).
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MALLOPT_MMAP, _MMAP_FROM)
        libc.mallopt(_MALLOPT_TRIM, _MMAP_FROM)
    _run_tiny(shared=False)


def give_back() -> None:
    """Hand memory that was freed in small pieces back to the system, where there is a way (glibc)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


_reserved = False


def reserve(region_bytes: int, limit_bytes: int | None = None) -> None:
    """Set up the arena of the process, once, with a region of `region_bytes`; what does not fit there gets others, with
    it up to `limit_bytes` in all (None: as many as there is memory for).

    The untouched rest of a region is a free chunk like any other, and taken first where it is the smallest that fits.
    In a region of `MemorySpec.region_bytes` it never is, so values lie where the exporter's simulation puts them; in a
    smaller one of just what is touched they may not fit. A run takes the region as address space, touches what it uses,
    and beside it the table, 8 bytes for every 256 bytes of the region. A process has one arena: later calls change
    nothing.
    """
    global _reserved
    if _reserved:
        return
    start()
    ort = runtime()
    region = max(UNPLANNED, min(-(-region_bytes // 256) * 256, _LARGEST_REGION))
    settings = {
        "arena_extend_strategy": 0,
        "max_dead_bytes_per_chunk": 256,  # every remainder is split off, or half of the memory would lie waste
        # The first region is never given back, the second, whose size is the `growth` once the arena was shrunk, is.
        "initial_chunk_size_bytes": 256,
        "initial_growth_chunk_size_bytes": region,
        "max_mem": max(limit_bytes, region) + _CONSTANTS if limit_bytes is not None else 0,
    }
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(place, ort.OrtArenaCfg(settings))
    _reserved = True
    _run_tiny(shared=True)  # and give back what it took: from then on the arena grows by its second setting


def _run_tiny(*, shared: bool) -> None:
    """Run a graph of two nodes, so that the runtime's code is in memory, and give its memory back."""
    model = tiny_model([("Exp", ("x",), "between"), ("Exp", ("between",), "y")], {"x": (1,)}, ("y", (1,)))
    session = runtime().InferenceSession(model, session_options(1, shared=shared), providers=[CPU_PROVIDER])
    binding = session.io_binding()
    arrays = [np.empty(1, np.float32) for _ in range(2)]  # an output in the arena would keep its region there
    values = [runtime().OrtValue.ortvalue_from_numpy(array) for array in arrays]
    binding.bind_ortvalue_input("x", values[0])
    binding.bind_ortvalue_output("y", values[1])
    session.run_with_iobinding(binding, releasing())


def empty_arena() -> None:
    """Give the arena's memory back, by way of a run that needs next to nothing of it.

    Raises:
        OverBudgetError: not even that little can be had.
    """
    try:
        _run_tiny(shared=True)
    except Exception as error:
        raise translated(error, "not even a graph of two nodes can be run") from error


def releasing(arena: str = "cpu:0") -> Any:
    """Options of a run that gives the arena, by its name there, back at its end."""
    options = runtime().RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", arena)
    return options


def session_options(threads: int, *, shared: bool = True) -> Any:
    """Options of a session, in the arena of the process where it is `shared`."""
    ort = runtime()
    options = ort.SessionOptions()
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # the order of the file
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.use_env_allocators", str(int(shared)))
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")
    return options
