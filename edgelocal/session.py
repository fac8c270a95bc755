"""The only module that imports ONNX Runtime: model bytes -> something that runs, in memory that is planned.

Every run gets its inputs and outputs in memory of ours; what lives only while it runs comes from one arena that all
graphs of the process share, one region (see `reserve`). Each run begins with an empty arena, so it lays out
its values the same way each time, and the exporter could know the peak (docs/decisions/0012). For this, nodes run in
the order of the file, the runtime's own passes are off (they reorder, and undo recomputation), no memory pattern (it
doubles the peak from the second run on) and no list of dead buffers is kept. No spinning: every graph has threads of
its own, and those that wait must not take the cores from the one that works. The model is read as ONNX, which was
scanned, and never as the runtime's own format.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from edgelocal.device import describe
from edgelocal.doctor import advice
from edgelocal.errors import BundleError, EdgelocalError, OverBudgetError, RuntimeMissingError
from edgelocal.onnx_scan import scan
from edgelocal.packages import oldest_runtime, release
from edgelocal.protobuf import BYTES, VARINT, render
from edgelocal.spec import BATCH, GraphSpec, TensorSpec
from edgelocal.tensors import Array

GRAPH_LEVEL = "none"
OOM_ADVICE = "; use a smaller --batch or more blocks"  # ends the message where memory ran out
TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)", "bool": "tensor(bool)"}


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
    return RuntimeInfo(runtime().__version__, "CPUExecutionProvider", GRAPH_LEVEL, platform.machine())


_MMAP_FROM = 1 << 20
_MALLOPT_TRIM, _MALLOPT_MMAP = -1, -3  # glibc's malloc.h
_LARGEST_REGION = (1 << 31) - 256  # the arena's settings are 32-bit integers
_UNPLANNED = 1 << 20
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
    region = max(_UNPLANNED, min(-(-region_bytes // 256) * 256, _LARGEST_REGION))
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
    info = [(1, BYTES, b"x"), (2, BYTES, render([(1, BYTES, render([(1, VARINT, 1), (2, BYTES, _one_dim())]))]))]
    nodes = [
        render([(1, BYTES, a), (2, BYTES, b), (4, BYTES, b"Exp")]) for a, b in ((b"x", b"between"), (b"between", b"y"))
    ]
    graph = render(
        [
            *((1, BYTES, node) for node in nodes),
            (2, BYTES, b"first"),
            (11, BYTES, render(info)),
            (12, BYTES, render([(1, BYTES, b"y"), info[1]])),
        ]
    )
    model = render([(1, VARINT, 8), (7, BYTES, graph), (8, BYTES, render([(2, VARINT, 13)]))])
    session = runtime().InferenceSession(model, _options(1, shared=shared), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = [Tensor.empty((1,), "float32") for _ in range(2)]  # an output in the arena would keep its region there
    binding.bind_ortvalue_input("x", values[0].value)
    binding.bind_ortvalue_output("y", values[1].value)
    session.run_with_iobinding(binding, _releasing())


def empty_arena() -> None:
    """Give the arena's memory back, by way of a run that needs next to nothing of it.

    Raises:
        OverBudgetError: not even that little can be had.
    """
    try:
        _run_tiny(shared=True)
    except Exception as error:
        raise _translated(error, "not even a graph of two nodes can be run") from error


def _one_dim() -> bytes:
    return render([(1, BYTES, render([(1, VARINT, 1)]))])


def _releasing() -> Any:
    """Options of a run that gives the arena back at its end."""
    options = runtime().RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _options(threads: int, *, shared: bool = True) -> Any:
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


class Tensor:
    """A numpy array, C-contiguous, and the same memory as the runtime sees it."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self.value = runtime().OrtValue.ortvalue_from_numpy(array)

    @classmethod
    def of(cls, array: Array) -> Tensor:
        """The array itself where it is contiguous, else a copy."""
        return cls(np.ascontiguousarray(array).reshape(array.shape))

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Memory for a result.

        Raises:
            OverBudgetError: the system has none.
        """
        try:
            return cls(np.empty(shape, dtype=dtype))
        except MemoryError as error:
            raise OverBudgetError(f"out of memory ({error}){OOM_ADVICE}") from None

    @property
    def batch(self) -> int:
        """The first dimension."""
        return int(self._array.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        """Samples start .. stop - 1, in the same memory."""
        return Tensor(self._array[start:stop])

    def array(self) -> Array:
        """The values; the same memory."""
        return self._array

    def item(self) -> float:
        """The value of a () tensor."""
        return float(self._array)


class Graph:
    """A loaded ONNX graph of a bundle.

    Raises:
        BundleError: the model holds what no graph of a bundle has, the runtime cannot load it, or it is not the one
            the manifest describes.
        OverBudgetError: no memory to load it.
    """

    def __init__(self, spec: GraphSpec, model: bytes, threads: int, *, training: bool = False) -> None:
        self.spec = spec
        scan(model, spec.file, training=training)
        reserve(_UNPLANNED)
        ort = runtime()
        try:
            # No fallback: it prints to stdout and tries the same once more.
            self._session = ort.InferenceSession(
                model, _options(threads), providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:
            raise _translated(error, f"{spec.file} cannot be loaded") from error
        self._check_signature()

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, release: bool = False) -> None:
        """Run on `inputs`, in the graph's order, into `outputs`; with `release` the arena is given back at the end.

        An output may be an input's memory where the bundle says so (`GraphSpec.in_place`).

        Raises:
            BundleError: the graph cannot be run on these.
            OverBudgetError: the runtime could not get the memory it needs; the outputs are not to be used.
        """
        binding = self._session.io_binding()
        try:
            for spec, tensor in zip(self.spec.inputs, inputs, strict=True):
                binding.bind_ortvalue_input(spec.name, tensor.value)
            for spec, tensor in zip(self.spec.outputs, outputs, strict=True):
                binding.bind_ortvalue_output(spec.name, tensor.value)
            self._session.run_with_iobinding(binding, _releasing() if release else None)
        except Exception as error:
            translated = _translated(error, f"{self.spec.file} cannot be run")
            if isinstance(translated, OverBudgetError):
                empty_arena()  # a run that fails does not give it back itself
            raise translated from error

    def _check_signature(self) -> None:
        inputs = self._session.get_inputs(), self.spec.inputs
        outputs = self._session.get_outputs(), self.spec.outputs
        for found, expected in (inputs, outputs):
            if [argument.name for argument in found] != [tensor.name for tensor in expected]:
                raise BundleError(
                    f"{self.spec.file} has other inputs or outputs than the manifest says; export the bundle again"
                )
            for argument, tensor in zip(found, expected, strict=True):
                if not _fits(argument, tensor):
                    raise BundleError(
                        f"{self.spec.file}: {tensor.name} is {argument.type} {argument.shape}, the manifest says "
                        f"{tensor.dtype} {list(tensor.shape)}; export the bundle again"
                    )


def _fits(argument: Any, tensor: TensorSpec) -> bool:
    """Whether an input or output of a session is the tensor; the batch has any name there, or none."""
    shape = tuple(size if isinstance(size, int) else BATCH for size in argument.shape)
    return argument.type == TYPES[tensor.dtype] and shape == tensor.shape


def _translated(error: Exception, what: str) -> EdgelocalError:
    text = " ".join(str(error).split())
    if _is_out_of_memory(error):
        # The runtime's own words, without the places in its source that come before them.
        said = re.search(r"(Available memory of|Failed to allocate memory|std::bad_alloc).*", text)
        return OverBudgetError(f"{what}: out of memory ({(said[0] if said else text)[:200]}){OOM_ADVICE}")
    return BundleError(f"{what}: {text[:500]}; export the bundle again")


def _is_out_of_memory(error: Exception) -> bool:
    """By what the runtime and the system's loader say."""
    signs = ("allocate memory", "bad_alloc", "smaller than requested")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
