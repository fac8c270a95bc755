"""The only module that imports ONNX Runtime: model bytes -> something that runs.

Options, and why: one arena for all sessions, because an arena keeps what it once took: with one a session the process
held the peaks of all blocks at once (ResNet-32 in 14 blocks, batch 128: 1231 MiB against 338, docs/decisions/0006); no
memory pattern (it doubles the peak from the second run on); no spinning, because every session has threads of its
own, and those that wait must not take the cores from the one that works; one operator after the other, so that only
one block's activations live. The model is read as ONNX, which was scanned, and never as the runtime's own format.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from edgelocal.device import describe
from edgelocal.doctor import advice
from edgelocal.errors import BudgetError, BundleError, EdgelocalError, RuntimeMissingError
from edgelocal.onnx_scan import scan
from edgelocal.spec import BATCH, GraphSpec, TensorSpec
from edgelocal.tensors import Array

GRAPH_LEVEL = "all"
OLDEST_RUNTIME = (1, 17)
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
        RuntimeMissingError: none is installed, or one older than 1.17; the message says what to type here.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 1.17 warns of newer interpreters when imported
            import onnxruntime
    except ImportError as error:
        raise RuntimeMissingError(f"no ONNX Runtime can be imported ({error}): {advice(describe())}") from None
    version: str = onnxruntime.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_RUNTIME:
        raise RuntimeMissingError(f"ONNX Runtime {version} is too old, 1.17 or later is needed: {advice(describe())}")
    module: ModuleType = onnxruntime
    return module


def runtime_info() -> RuntimeInfo:
    """Version, provider and settings that the bits of a run depend on."""
    return RuntimeInfo(runtime().__version__, "CPUExecutionProvider", GRAPH_LEVEL, platform.machine())


@cache
def _shared_arena() -> None:
    """Register the arena that every session of the process uses."""
    ort = runtime()
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(place, ort.OrtArenaCfg({"arena_extend_strategy": 0}))


class Tensor:
    """A tensor in the runtime's memory. `.array()` is a view where the runtime allows it, else a copy."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @classmethod
    def of(cls, array: Array) -> Tensor:
        """Copy (or wrap) a numpy array."""
        contiguous = np.ascontiguousarray(array).reshape(array.shape)
        return cls(runtime().OrtValue.ortvalue_from_numpy(contiguous))

    @property
    def batch(self) -> int:
        """The first dimension."""
        return int(self.value.shape()[0])

    def array(self) -> Array:
        """The values as a numpy array."""
        values: Array = self.value.numpy()
        return values

    def item(self) -> float:
        """The value of a () tensor.

        Raises:
            BundleError: the graph made one of another shape.
        """
        values = self.array()
        if values.shape != ():
            raise BundleError(f"a graph put out {list(values.shape)} in place of one number; export the bundle again")
        return float(values)


class Graph:
    """A loaded ONNX graph of a bundle.

    Raises:
        BundleError: the model holds what no graph of a bundle has, the runtime cannot load it, or it is not the one
            the manifest describes.
        BudgetError: no memory to load it.
    """

    def __init__(self, spec: GraphSpec, model: bytes, threads: int) -> None:
        self.spec = spec
        scan(model, spec.file)
        ort = runtime()
        _shared_arena()
        options = ort.SessionOptions()
        options.enable_mem_pattern = False
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        try:
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise _translated(error, f"{spec.file} cannot be loaded") from error
        self._check_signature()

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on all inputs of the graph; returns the outputs by name.

        Raises:
            BundleError: the graph wants an input that is not fed, or cannot be run on what is.
            BudgetError: the runtime could not get the memory it needs.
        """
        missing = [t.name for t in self.spec.inputs if t.name not in feeds]
        if missing:
            raise BundleError(
                f"{self.spec.file} wants {missing[0]!r}, which is not known here; upgrade edgelocal, or export again"
            )
        names = [t.name for t in self.spec.outputs]
        values = {t.name: feeds[t.name].value for t in self.spec.inputs}
        try:
            results = self._session.run_with_ort_values(names, values)
        except Exception as error:
            raise _translated(error, f"{self.spec.file} cannot be run") from error
        return {name: Tensor(value) for name, value in zip(names, results, strict=True)}

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
    if "allocate memory" in text or "bad_alloc" in text or "smaller than requested" in text:
        return BudgetError(f"{what}: out of memory ({text[:200]}); use a smaller --batch or more blocks")
    return BundleError(f"{what}: {text[:500]}; export the bundle again")
